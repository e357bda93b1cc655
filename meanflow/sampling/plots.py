"""Embeds figures in HTML pages."""

import base64
import html
import io

from matplotlib.figure import Figure


def image(figure: Figure, description: str) -> str:
    """Return a figure as a self-contained <img>; `description` is its alternative text."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f"<img alt='{html.escape(description)}' src='data:image/png;base64,{data}'>"
