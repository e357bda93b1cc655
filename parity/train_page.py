"""Runs side by side as one self-contained HTML page: their curves, and how far they are apart."""

import html as text

from matplotlib.figure import Figure

from meanflow.config import options
from meanflow.sampling.plots import image

STYLE = "body { font-family: sans-serif; margin: 2em; max-width: 75em } img { max-width: 100% }"
LINES = ("-", "--", "-.", ":", (0, (1, 3)))  # runs lie on top of each other, so each needs its own
FLOOR = 1e-17  # where a difference of 0 is drawn


def html(config: options.Config, dtype: str, runs, differences, switch: int, problems: list[str]) -> str:
    """Return the page.  runs, differences: see `parity.train.compare`.  problems: sentences, shown first."""
    about = f"{config.name}, {config.model.name}, {config.method.name}, batch {config.train.batch_size}, {dtype}"
    verdict = problems or ["All differences are within their bounds."]
    parts = [
        f"<h1>One run in two frameworks</h1><p>{text.escape(about)}</p>",
        *(f"<p>{text.escape(line)}</p>" for line in verdict),
        image(curves(runs, switch), "loss curves of all runs, on top of each other"),
        "<h2>Relative differences by step</h2>",
        image(apart(differences, switch), "relative differences by step, on a logarithmic axis"),
    ]
    head = f"<!doctype html><html lang='en'><meta charset='utf-8'><title>Runs</title><style>{STYLE}</style>"
    return f"{head}{''.join(parts)}</html>\n"


def curves(runs, switch: int) -> Figure:
    """Plot the raw error, which unlike an adaptively weighted loss shows progress, and the gradient norm."""
    names = [name for name in ("loss", "raw_error", "grad_norm") if name in next(iter(runs.values()))]
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        for (title, found), line in zip(runs.items(), LINES * len(runs), strict=False):
            axes.plot(range(1, len(found[name]) + 1), found[name], linestyle=line, label=title)
        finish(axes, switch, name.replace("_", " "))
    return figure


def apart(differences, switch: int) -> Figure:
    """Plot the differences of every run, a panel for each quantity."""
    names = list(dict.fromkeys(key for found in differences.values() for key in found))
    rows = -(-len(names) // 2)
    figure = Figure(figsize=(11, 3.6 * rows), layout="constrained")
    panels = figure.subplots(rows, 2, squeeze=False).ravel()
    for axes, name in zip(panels, names, strict=False):
        for (title, found), line in zip(differences.items(), LINES * len(differences), strict=False):
            if name in found:
                points = found[name].items()
                axes.plot([i for i, _ in points], [max(a, FLOOR) for _, a in points], linestyle=line, label=title)
        axes.set_yscale("log")
        finish(axes, switch, f"relative difference: {name.replace('_', ' ')}")
    for axes in panels[len(names) :]:
        axes.set_axis_off()
    return figure


def finish(axes, switch, title):
    """Add the switch, labels and a legend."""
    if switch:
        axes.axvline(switch, color="gray", linewidth=0.8)
    axes.set_xlabel("step")
    axes.set_title(title, fontsize=9)
    axes.legend(fontsize=7)
