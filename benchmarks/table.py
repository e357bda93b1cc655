"""Writes rows of figures as Markdown, JSON and plots."""

import json
import pathlib

COLUMNS = {  # title: (name of the figure, format)
    "step": ("case", "{}"),
    "batch": ("batch", "{}"),
    "tokens": ("tokens", "{}"),
    "median s": ("median_s", "{:.4g}"),
    "examples/s": ("examples_per_s", "{:.4g}"),
    "ratio": ("ratio", "{:.3f}"),
    "limit": ("limit", "{:.3f}"),
    "ratio / limit": ("ratio_over_limit", "{:.3f}"),
    "ratio at matmul rate": ("ratio_at_matmul_rate", "{:.3f}"),
    "peak MiB": ("peak_bytes", "MiB"),
    "peak RSS MiB": ("rss_peak_bytes", "MiB"),
    "GFLOP counted": ("counted_flops", "1e9"),
    "ratio counted": ("counted_ratio", "{:.3f}"),
    "off the limit": ("counted_off_limit", "{:+.1%}"),
    "GFLOP by formula": ("formula_flops", "1e9"),
    "GFLOP/s": ("flops_per_s", "1e9"),
    "of matmul rate": ("share_of_matmul_rate", "{:.1%}"),
    "compiled / eager": ("compiled_over_eager", "{:.3f}"),
    "time / without remat": ("time_over_plain", "{:.3f}"),
    "memory / without remat": ("memory_over_plain", "{:.3f}"),
}


def markdown(rows, columns=None):
    """Return a table of the rows without empty columns; empty cells show a dash."""
    columns = columns or COLUMNS
    shown = {title: spec for title, spec in columns.items() if any(row.get(spec[0]) is not None for row in rows)}
    lines = [shown.keys(), ["---"] * len(shown)]
    lines += [[cell(row.get(name), form) for name, form in shown.values()] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def cell(value, form):
    """Return a figure as text.  form: the unit `MiB` or `1e9`, or a format string."""
    if value is None:
        return "–"
    units = {"MiB": ("{:.4g}", 2**20), "1e9": ("{:.4g}", 1e9)}
    if form in units:
        form, unit = units[form]
        value /= unit
    return form.format(value)


def write(rows, setting, args, columns=None):
    """Print the table and write it to the files named on the command line.  setting: one line above it."""
    text = f"{setting}\n\n{markdown(rows, columns)}"
    print(text, end="")
    for path, content in ((args.markdown, text), (args.json, to_json(rows, setting))):
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)


def to_json(rows, setting):
    """Return {"setting": one line, "rows": [...]} as indented JSON."""
    return json.dumps({"setting": setting, "rows": rows}, indent=2) + "\n"


def plot(rows, path: pathlib.Path, setting):
    """Plot time and examples/s of a step against what the sweep varies, with one line per case.

    That is the batch size, the tokens per image or both; if both vary, there is one line per value of the other.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    axes_of = [axes for axes in (("batch", "tokens"), ("tokens", "batch")) if len({row[axes[0]] for row in rows}) > 1]
    axes_of = axes_of or [("batch", "tokens")]
    size = (6.5 * len(axes_of), 9)
    figure, grid = pyplot.subplots(2, len(axes_of), figsize=size, layout="constrained", squeeze=False)
    figure.suptitle(setting, wrap=True)
    for column, (x, other) in enumerate(axes_of):
        for line, (y, label) in enumerate(
            (("median_s", "seconds per step"), ("examples_per_s", "examples per second"))
        ):
            axis = grid[line][column]
            for name, points in lines_of(rows, x, other, y).items():
                axis.plot(*zip(*points, strict=True), marker="o", label=name)
            axis.set(xlabel={"batch": "batch size", "tokens": "tokens per image"}[x], ylabel=label)
            axis.set(xscale="log", yscale="log")
            axis.xaxis.set_major_locator(ticker.FixedLocator(sorted({row[x] for row in rows})))
            axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
            for ticks in (axis.xaxis, axis.yaxis):
                ticks.set_major_formatter("{x:g}")
                ticks.set_minor_formatter(ticker.NullFormatter())
            axis.grid(alpha=0.3)
        grid[0][column].legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def lines_of(rows, x, other, y):
    """Return {line name: [(x, y), ...]}, sorted by x."""
    several = len({row[other] for row in rows}) > 1
    lines = {}
    for row in sorted(rows, key=lambda row: row[x]):
        name = f"{row['case']}, {other} {row[other]}" if several else row["case"]
        lines.setdefault(name, []).append((row[x], row[y]))
    return lines
