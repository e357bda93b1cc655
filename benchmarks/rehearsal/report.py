"""Shows what was rehearsed: as text, JSON and a plot."""

import json
import pathlib

from meanflow.config import options

GIB = 2**30


def title(config: options.Config, framework: str, card, devices: int, nodes: int) -> str:
    """Return one line that says what is rehearsed."""
    c = config.train
    sharding = f", fsdp {c.fsdp}" if c.fsdp > 1 else ""
    kept = ", remat" if c.remat else ""
    parts = f", {c.accumulate} micro-batches" if c.accumulate > 1 else ""
    hosts = f"{nodes} hosts of {devices}" if nodes > 1 else str(devices)
    return (
        f"{config.name or config.model.name}, {framework}, {config.model.compute_dtype}, batch {c.batch_size}{sharding}"
        f"{kept}{parts}, on {hosts} x {card.title}"
    )


def markdown(found: dict, heading: str) -> str:
    """Return the report as Markdown."""
    b, parts = found["bounds"], found["parts"]
    verdict = "fits" if found["fits"] else "does NOT fit"
    lines = [
        f"## {heading}", "",
        f"**{found['peak_bytes'] / GIB:.1f} GiB a card, {found['peak_kind']}: {verdict}** "
        f"{found['usable_bytes'] / GIB:.1f} GiB that a step can use.", "",
        *table(("part", "GiB a card"), ((name, f"{size / GIB:.2f}") for name, size in parts.items())), "",
    ]  # fmt: skip
    if "peaks" in found:
        lines += ["; ".join(f"{name}: {size / GIB:.2f} GiB" for name, size in found["peaks"].items()) + ".", ""]
    if "largest_batch" in found:
        lines += [f"Largest batch that fits: {found['largest_batch']}.", ""]
    if not found["fits"]:
        lines += [advice(found["remedy"]), ""]
    lines += table(("lower bound", ""), bound_rows(b))
    lines += ["", *table(("collective", "number", "MiB"), collective_rows(found)), ""] if found["collectives"] else [""]
    lines += table(("custom call", "number"), found["custom_calls"].items()) if found["custom_calls"] else []
    lines += ["", "Largest at the peak:", ""]
    lines += table(
        ("MiB", "number", "each", "made by"),
        ((f"{a['bytes'] / 2**20:.0f}", a["count"], a["shape"], a["where"]) for a in found["largest"]),
    )
    lines += ["", "Assumed:", "", *(f"* {sentence}" for sentence in found["assumed"]), ""]
    return "\n".join([*lines, f"Rehearsed in {found['seconds']:.0f} s.", ""])


def table(head, rows) -> list[str]:
    """Return the lines of a table."""
    rows = [[str(cell) for cell in row] for row in (head, ["---"] * len(head), *rows)]
    return [f"| {' | '.join(row)} |" for row in rows]


def bound_rows(b: dict) -> list[tuple[str, str]]:
    """Return (name, value) of the bounds."""
    return [
        ("FLOPs of a step on a card, by the formula", f"{b['flops'] / 1e12:.2f} TFLOP"),
        ("arithmetic at the card's peak", f"{b['arithmetic'] * 1e3:.1f} ms"),
        ("memory at its bandwidth", f"{b['memory'] * 1e3:.1f} ms"),
        ("links", f"{b['communication'] * 1e3:.1f} ms"),
        ("a step", f"{b['step'] * 1e3:.1f} ms"),
        ("the run", f"{b['run_days']:.2f} days, {b['gpu_hours']:.0f} GPU-hours"),
        ("50 000 samples", f"{b['samples']:.0f} s"),
    ]


def collective_rows(found: dict) -> list[tuple]:
    """Return (kind, number, MiB) of the collectives."""
    return [(kind, a["count"], f"{a['bytes'] / 2**20:.0f}") for kind, a in found["collectives"].items()]


def advice(remedy: dict | None) -> str:
    """Return what makes the step fit."""
    if remedy is None:
        return "Nothing that was tried makes it fit: use more cards, or ones with more memory."
    flags = " ".join(f"--config.{name}={value}" for name, value in remedy["changes"].items())
    return f"It fits with {flags}: {remedy['peak_bytes'] / GIB:.1f} GiB."


def write(found: dict, heading: str, to_markdown, to_json, to_png) -> None:
    """Print the report, and write it to the files that are named."""
    text = markdown(found, heading)
    print(text, end="")
    for path, content in ((to_markdown, text), (to_json, json.dumps({"title": heading} | found, indent=2) + "\n")):
        if path:
            pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
            pathlib.Path(path).write_text(content)
    if to_png:
        plot(found, heading, to_png)


def plot(found: dict, heading: str, path) -> None:
    """Draw memory by part as one stacked bar, against what a card has."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(9, 2.6), layout="constrained")
    left = 0.0
    for name, size in found["parts"].items():
        axis.barh(0, size / GIB, left=left, label=f"{name} {size / GIB:.1f}")
        left += size / GIB
    axis.axvline(found["usable_bytes"] / GIB, color="black", linestyle="--", label="usable")
    axis.set(xlabel="GiB a card", yticks=[])
    axis.set_title(heading, wrap=True, fontsize="small")
    axis.legend(ncols=4, fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.35))
    pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
