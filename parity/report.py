"""The result of a parity run as one self-contained HTML page."""

import html as text
import math

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from meanflow.sampling import grids
from meanflow.sampling.plots import image
from parity.adapters.frameworks import FRAMEWORKS, full_precision
from parity.cases import objectives
from parity.checks import Check

matplotlib.use("Agg")
COLOURS = {"jax": "tab:blue", "torch": "tab:orange", "jax-torch": "tab:green"}
FLOOR = 1e-18  # where zero errors are drawn on a logarithmic axis
STYLE = """
body { font-family: sans-serif; margin: 2em; max-width: 75em }
table { border-collapse: collapse; font-size: 85% }
td, th { padding: 0.15em 0.7em; text-align: left; border-bottom: 1px solid #ddd }
tr.failed { background: #f6b9b9 } tr.ok td.verdict { color: #197b30 }
img { max-width: 100% }
"""


def html(checks: list[Check], not_covered: list[str]) -> str:
    """Return the page: plots of all checks and of the lower precisions, samples of both frameworks, and the table."""
    num_failed = sum(not check.ok for check in checks)
    parts = [f"<p>{len(checks)} checks, {num_failed} failed, {len(not_covered)} not covered.</p>"]
    parts += [f"<p>Not covered: {text.escape(name)}</p>" for name in not_covered]
    parts += ["<h2>Error over bound</h2>", image(ratios(checks), "error over bound of every check")]
    lower = [check for check in checks if check.case.startswith(("float32/", "bfloat16/"))]
    if lower:
        parts += ["<h2>Loss of precision against float64</h2>", image(precisions(lower), "float32 and bfloat16 errors")]
    parts += ["<h2>Samples of both frameworks, float32, and their difference</h2>"]
    parts += [image(samples(), "samples of JAX and PyTorch"), "<h2>Checks</h2>", table(checks)]
    head = f"<!doctype html><html lang='en'><meta charset='utf-8'><title>Parity</title><style>{STYLE}</style>"
    return f"{head}<h1>Parity of the JAX and PyTorch implementations</h1>{''.join(parts)}</html>\n"


def table(checks: list[Check]) -> str:
    """Return the table rows of all checks, failures first."""
    rows = ["<tr><th>case<th>framework<th>quantity<th>error<th>bound<th>verdict</tr>"]
    for check in sorted(checks, key=lambda check: check.ok):
        verdict = "ok" if check.ok else "failed"
        cells = (check.case, check.framework, check.quantity, f"{check.error:.1e}", f"{check.bound:.1e}")
        shown = "".join(f"<td>{text.escape(cell)}</td>" for cell in cells)
        rows.append(f"<tr class='{verdict}'>{shown}<td class='verdict'>{verdict}</td></tr>")
    return f"<table>{''.join(rows)}</table>"


def ratios(checks: list[Check]) -> Figure:
    """Plot error over bound of every check, by case; anything above the line fails."""
    names = list(dict.fromkeys(check.case for check in checks))
    figure = Figure(figsize=(11, 1.5 + 0.2 * len(names)), layout="constrained")
    axes = figure.subplots()
    for framework, colour in COLOURS.items():
        chosen = [check for check in checks if check.framework == framework and math.isfinite(check.ratio)]
        x = [max(check.ratio, FLOOR) for check in chosen]
        axes.scatter(x, [names.index(check.case) for check in chosen], s=9, color=colour, label=framework)
    axes.axvline(1, color="tab:red")
    axes.set_xscale("log")
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel(f"error / bound (exactly 0 is drawn at {FLOOR:g})")
    axes.legend()
    return figure


def precisions(checks: list[Check]) -> Figure:
    """Plot the error of each framework in each lower precision against float64, by quantity."""
    quantities = list(dict.fromkeys(quantity(check) for check in checks))
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    axes = figure.subplots()
    for dtype, marker in (("float32", "o"), ("bfloat16", "^")):
        for framework in FRAMEWORKS:
            chosen = [c for c in checks if c.framework == framework and c.case.startswith(f"{dtype}/")]
            x = [quantities.index(quantity(check)) for check in chosen]
            axes.plot(x, [max(check.error, FLOOR) for check in chosen], marker, color=COLOURS[framework],
                      label=f"{framework}, {dtype}", alpha=0.7)  # fmt: skip
    axes.set_yscale("log")
    axes.set_xticks(range(len(quantities)), quantities, rotation=40, ha="right", fontsize=8)
    axes.set_ylabel("relative error against float64")
    axes.legend()
    return figure


def quantity(check: Check) -> str:
    """Return the label of a lower-precision check: its case and quantity, without the worst entry's name."""
    return f"{check.case.partition('/')[2]}: {check.quantity.partition(' (worst')[0]}"


@full_precision()
def samples() -> Figure:
    """Draw the images that both frameworks sample from the same noise, and their difference."""
    config = objectives.config(model={"compute_dtype": "float32"}, sample={"steps": 2})
    rows, draws = objectives.batch(config)
    images = {
        name: f.sample(net, draws["noise"], rows["label"], config.sample) for name, f, net in objectives.nets(config)
    }
    difference = np.abs(images["jax"] - images["torch"])
    scale = max(difference.max(), FLOOR)
    shown = {name: a / np.abs(a).max() for name, a in images.items()}
    shown[f"|difference|, white = {scale:.1e}"] = difference / scale * 2 - 1
    figure = Figure(figsize=(11, 4), layout="constrained")
    for axes, (name, a) in zip(figure.subplots(1, len(shown)), shown.items(), strict=True):
        axes.imshow(grids.grid(a), interpolation="nearest")
        axes.set_title(name, fontsize=9)
        axes.set_axis_off()
    return figure
