"""The result of a guidance sweep as one self-contained HTML page."""

import html as text
import math

import numpy as np
from matplotlib.figure import Figure

from meanflow.commands import guidance_sweep
from meanflow.config import options
from meanflow.sampling import grids
from meanflow.sampling.plots import image

STYLE = """
body { font-family: sans-serif; margin: 2em; max-width: 75em }
table { border-collapse: collapse } td, th { padding: 0.15em 0.9em; text-align: right; border-bottom: 1px solid #ddd }
img { max-width: 100% }
"""


def html(config: options.Config, rows: list[guidance_sweep.Row], images: dict[float, np.ndarray]) -> str:
    """Return the page: metrics over omega, the table, and samples for each omega.

    rows, images: see `guidance_sweep.sweep`.  config: the run's, for what all rows share.
    """
    c = config.sample
    steps = f"times {c.times}" if c.times else f"{c.steps} step{'s' if c.steps > 1 else ''}"
    ema = f"EMA {config.train.ema_decays[c.ema]}" if c.ema >= 0 else "raw parameters"
    shown = f"interval {guidance_sweep.interval_text(rows[0]['interval'])}"
    parts = [
        f"<h1>Guidance of {text.escape(config.name)}</h1>",
        f"<p>{config.evaluation.num_samples} samples per row, all with the same noise and labels (seed {c.seed}); "
        f"{steps}, {ema}.</p>",
        "".join(f"<p>{text.escape(line)}</p>" for line in guidance_sweep.best_lines(rows)),
        image(curves(rows), "each metric over omega, one line per interval"),
        f"<h2>Table</h2>{table(rows)}",
        f"<h2>Samples, {shown}</h2>{image(pictures(images), f'samples of each omega, {shown}')}",
    ]
    head = f"<!doctype html><html lang='en'><meta charset='utf-8'><title>Guidance</title><style>{STYLE}</style>"
    return f"{head}{''.join(parts)}</html>\n"


def table(rows: list[guidance_sweep.Row]) -> str:
    """Return the table of `guidance_sweep.cells` in HTML."""
    names, *lines = ("".join(f"<td>{text.escape(cell)}</td>" for cell in line) for line in guidance_sweep.cells(rows))
    return f"<table><tr>{names.replace('td>', 'th>')}</tr>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def curves(rows: list[guidance_sweep.Row]) -> Figure:
    """Plot every metric over omega, one line per interval; dashed: real test images."""
    names, omegas = guidance_sweep.metrics_of(rows), sorted({row["omega"] for row in rows})
    figure = Figure(figsize=(11, 4.2 * math.ceil(len(names) / 2)), layout="constrained")
    panels = figure.subplots(math.ceil(len(names) / 2), min(len(names), 2), squeeze=False).ravel()
    for axes, name in zip(panels, names, strict=False):
        for interval in dict.fromkeys(row["interval"] for row in rows):
            points = sorted((row["omega"], row[name]) for row in rows if row["interval"] == interval)
            axes.plot(*zip(*points, strict=True), "o-", label=f"interval {guidance_sweep.interval_text(interval)}")
        if f"real_{name}" in rows[0]:
            axes.axhline(rows[0][f"real_{name}"], linestyle="--", color="gray", label="real test images")
        axes.set_xscale("log")
        axes.set_xticks(omegas, [f"{omega:g}" for omega in omegas])
        axes.minorticks_off()
        axes.set_xlabel("omega")
        axes.set_ylabel(name)
        axes.legend()
    for axes in panels[len(names) :]:
        axes.set_axis_off()
    return figure


def pictures(images: dict[float, np.ndarray]) -> Figure:
    """Draw a grid of samples [n h w c] for each omega; the n-th always has the same noise and label."""
    columns = 4 if len(images) > 2 else 2
    lines = math.ceil(len(images) / columns)
    figure = Figure(figsize=(11, 11.6 / columns * lines), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).ravel()
    for axes in panels:
        axes.set_axis_off()
    for axes, (omega, samples) in zip(panels, images.items(), strict=False):
        picture = grids.grid(samples)
        axes.imshow(picture, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        axes.set_title(f"omega {omega:g}", fontsize=9)
    return figure
