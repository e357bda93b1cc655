"""Writes what was found on a GPU as one JSON file and one page of Markdown."""

import json
import pathlib
from collections.abc import Sequence

from benchmarks.on_gpu.runner import Row
from benchmarks.rehearsal import bounds, cards
from benchmarks.rehearsal.report import GIB, table
from meanflow.config import store

ROOT = pathlib.Path(__file__).parents[2]
PREDICTED = ROOT / "docs/rehearsal.json"  # what benchmarks/presets.py has rehearsed


def predictions() -> dict[tuple[str, str], dict]:
    """Return {(framework, config's name): report of its rehearsal on one card}."""
    if not PREDICTED.exists():
        return {}
    found = json.loads(PREDICTED.read_text())
    return {(r["framework"], r["config"]): r for r in found if r["cards"] == 1}


def predict(row: Row, card: cards.Card | None) -> dict:
    """Return what the rehearsal says of a timed step: peak_bytes and, for a card with public numbers, step_s."""
    framework, figures = row.name.rpartition("/")[2], row.figures
    report = predictions().get((framework, figures.get("config", "")))
    if not report or report["batch"] != figures["rows"]:
        return {}
    found = {"peak_bytes": report["peak_bytes"]}
    if card:
        config = store.load_file(f"configs/{figures['config'].replace(':', '.py:')}")
        config.train.batch_size = figures["rows"]
        found["step_s"] = bounds.of(config, report, card, 1).step
    return found


def markdown(rows: Sequence[Row], machine: dict) -> str:
    """Return the page.  machine: of `gpu.describe_machine`."""
    card = next((c for c in cards.CARDS.values() if c.title == machine["card"]), None)
    counts = {status: sum(row.status == status for row in rows) for status in dict.fromkeys(row.status for row in rows)}
    steps = [row for row in rows if row.name.startswith("step/") and row.status == "passed"]
    result = ", ".join(f"{number} {status}" for status, number in counts.items())
    versions = [f"* {name}: {value}" for name, value in machine.items() if name not in ("card", "date")]
    lines = [f"# {machine['card']}", "", f"`make gpu`, {machine['date']}: {result}.", "", *versions, ""]
    if steps:
        lines += ["## Steps", "", "Medians of steps between large matmuls, alone on the card; model FLOP/s are those "
                  "that the mathematics needs.", "", *step_table(steps, card), ""]  # fmt: skip
    lines += ["## Everything that was tried", ""]
    lines += table(("piece", "status", "s", "found"), ((r.name, r.status, f"{r.seconds:.0f}", cell(r)) for r in rows))
    for row in rows:
        if row.status in ("failed", "out of time") and row.said:
            lines += ["", f"### {row.name}: {row.status}", "", "```", row.said, "```"]
    return "\n".join([*lines, ""])


def step_table(steps: Sequence[Row], card: cards.Card | None) -> list[str]:
    """Return the table of timed steps beside what was rehearsed."""
    head = ("step", "rows", "dtype", "ms", "images/s", "model TFLOP/s", "of the card's matmul rate", "peak GiB",
            "rehearsed: peak GiB", "at least ms", "compiled in s")  # fmt: skip
    rows = []
    for row in steps:
        f, expected = row.figures, predict(row, card)
        peaks = [found["peak_bytes"] / GIB if found.get("peak_bytes") else None for found in (f, expected)]
        least = expected.get("step_s")
        rows.append((
            row.name.removeprefix("step/"), f["rows"], f["dtype"], f"{f['median_s'] * 1e3:.1f}",
            f"{f['rows'] / f['median_s']:.0f}", f"{f['model_flops_per_s'] / 1e12:.2f}",
            f"{f['share_of_matmul_rate']:.1%}", *("–" if p is None else f"{p:.2f}" for p in peaks),
            "–" if least is None else f"{least * 1e3:.1f}", f"{f['preparing_s']:.0f}",
        ))  # fmt: skip
    return table(head, rows)


def cell(row: Row) -> str:
    """Return one cell for what a piece has found."""
    if row.status != "passed":
        return row.said.splitlines()[-1].replace("|", "\\|") if row.said else ""
    if row.name.startswith("step/"):
        return f"{row.figures['median_s'] * 1e3:.1f} ms"
    return ", ".join(f"{name}: {short(value)}" for name, value in row.figures.items()).replace("|", "\\|")


def short(value) -> str:
    """Return a value as short text."""
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, dict):
        return " ".join(f"{name} {short(v)}" for name, v in value.items())
    return str(value)


def write(rows: Sequence[Row], machine: dict, directory: pathlib.Path) -> pathlib.Path:
    """Write CARD.md and CARD.json, and return the path of the page."""
    stem = directory / machine["card"].lower().replace(" ", "_").replace("/", "_")
    directory.mkdir(parents=True, exist_ok=True)
    content = {"machine": machine, "rows": [row._asdict() for row in rows]}
    stem.with_suffix(".json").write_text(json.dumps(content, indent=2) + "\n")
    page = stem.with_suffix(".md")
    page.write_text(markdown(rows, machine))
    return page
