"""Rehearses every published run and writes docs/rehearsal.md and docs/rehearsal.json.

    python benchmarks/presets.py
    python benchmarks/presets.py --only='meanflow_imagenet:(b4|xl2)' --frameworks=jax --card=a100
    python benchmarks/presets.py --table            (writes the pages from what was rehearsed before)

Takes hours on two cores.  What was rehearsed is kept in --workdir and not rehearsed again; delete a file there to
repeat it.  `benchmarks/gpu.py` compares the steps of one card with what a card takes.
"""

import argparse
import itertools
import json
import pathlib
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from tqdm import tqdm

from benchmarks.on_gpu.pieces import ROWS, STEPS
from benchmarks.rehearsal import bounds, cards
from benchmarks.rehearsal.attempts import rehearse
from benchmarks.rehearsal.report import GIB, table
from meanflow.config import checks, options, paths, store
from meanflow.errors import UserError, exit_on_user_error

ROOT = pathlib.Path(__file__).parents[1]
PAGE = ROOT / "docs/rehearsal.md"
FRAMEWORKS = ("jax", "torch")
SAME_STEP = {  # {a variant to rehearse: others whose steps need the same}, by config file
    "meanflow_imagenet": {"xl2": ("xl2_plus",), "b4_nocfg": (), "b4": (), "b4_jax": (), "b2": (), "m2": (), "l2": ()},
    "imf_imagenet": {"xl2": ("xl2_2step",), "b2": (), "m2": (), "l2": ()},
    "dmf_imagenet": {"dmf_512": (), "dmf_256": (), "sit_256": (), "sit_512": ()},
    "remeanflow_imagenet": {"512": (), "64": ()},
    "meanflow_cifar10": {"v1": ("v0",), "reproduction": ()},
}
SMALLEST = "meanflow_imagenet", "imf_imagenet"  # files for which to find the smallest machine
MOST = 8  # micro-batches that still leave a card enough to do
COUNTS = (1, 2, 4, 8)  # cards of a machine


class Job(NamedTuple):
    """One rehearsal."""

    framework: str
    config: str  # FILE:variant
    devices: int
    rows: int = 0  # of the batch; 0: as published


def jobs(devices: int, frameworks: Iterable[str], only: str) -> Iterator[Job]:
    """Yield every rehearsal: published batches on a machine, then the steps on one card that `make gpu` times."""
    names = [f"{file}:{variant}" for file, variants in SAME_STEP.items() for variant in variants]
    for name, framework in itertools.product(names, frameworks):
        if re.search(only, name):
            yield Job(framework, name, devices)
    for variant, framework in itertools.product(STEPS, frameworks):
        if re.search(only, f"meanflow_imagenet:{variant}"):
            yield Job(framework, f"meanflow_imagenet:{variant}", 1, ROWS)


def load(name: str, rows: int = 0) -> options.Config:
    """Return the config FILE:variant, with another batch size if rows is not 0."""
    config = store.load_file(f"configs/{name.replace(':', '.py:')}")
    config.train.batch_size = rows or config.train.batch_size
    return checks.check(config)


def path_of(job: Job, card: str, workdir: pathlib.Path) -> pathlib.Path:
    """Return where the report of a rehearsal is kept."""
    rows = f"-{job.rows}" if job.rows else ""
    return workdir / f"{job.framework}-{job.config.replace(':', '-')}-{job.devices}x{card}{rows}.json"


def report_of(job: Job, card: str, workdir: pathlib.Path) -> dict:
    """Return the report of a rehearsal, see `jax_step.rehearse`, made now or before, and what was rehearsed."""
    path = path_of(job, card, workdir)
    if not path.exists():
        found = rehearse(job.framework, load(job.config, job.rows), card, job.devices, 1)
        workdir.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found, indent=2) + "\n")
    kept = ("parts", "peak_bytes", "peak_kind", "peaks", "collectives", "custom_calls", "flops", "forward_flops",
            "seconds")  # fmt: skip
    found = json.loads(path.read_text())
    batch = load(job.config, job.rows).train.batch_size
    of_job = {"framework": job.framework, "config": job.config, "card": card, "cards": job.devices, "batch": batch}
    return of_job | {name: found[name] for name in kept if name in found}


def split(report: dict) -> tuple[float, float]:
    """Return the bytes of a card that do not depend on the batch, and those for each of its rows."""
    growing = report["parts"]["temporaries"] + report["parts"]["batch"]
    return report["peak_bytes"] - growing, growing / (report["batch"] / report["cards"])


def most_rows(report: dict, card: cards.Card) -> int:
    """Return how many rows fit a card, if what a step needs grows with them."""
    fixed, each = split(report)
    return max(0, int((cards.usable(card) - fixed) / each))


def fewest_cards(report: dict, card: cards.Card) -> tuple[int, int] | None:
    """Return (cards, micro-batches) of the smallest machine for the batch, fewest micro-batches; None if none does."""
    for count in COUNTS:
        rows, most = report["batch"] // count, most_rows(report, card)
        parts = next((n for n in (1, 2, 4, MOST) if rows % n == 0 and rows // n <= most), None)
        if parts:
            return count, parts
    return None


def page(reports: list[dict], card_name: str, devices: int) -> str:
    """Return docs/rehearsal.md."""
    card, found = cards.find(card_name), {(r["framework"], r["config"], r["cards"]): r for r in reports}
    lines = ["# What the published runs need", "",
             f"Rehearsed by `python benchmarks/presets.py` on {devices} x {card.title}, none of which was there: XLA "
             "compiled the JAX steps for the card, the PyTorch steps ran on fake tensors, compiled, without the "
             "fusions of inductor, so theirs is an upper bound.  `benchmarks/rehearse.py` does the same for one run "
             "and says what it assumes.", "",
             f"A step can use {cards.usable(card) / GIB:.1f} GiB of a card.  Largest batches are those at which what "
             "grows with the batch fills it; they have not been rehearsed.  A bound is the largest of the time of the "
             "arithmetic at the card's peak, of memory at its bandwidth and of the links: no run is that fast.", "",
             *table(HEAD, preset_rows(found, card, devices)), "",
             "## The smallest machine", "",
             "The fewest cards of a kind on which the published batch fits, alike in memory to the card above, without "
             f"`fsdp` or `remat`; in brackets `train.accumulate`, up to {MOST}, where it needs that.", "",
             *smallest_table(found, devices), "",
             "## One card", "", "The steps that `make gpu` times.", "",
             *table(ONE_CARD, one_card_rows(found, card)), ""]  # fmt: skip
    return "\n".join(lines)


HEAD = ("run", "batch", "steps", "JAX: GiB a card", "largest batch", "PyTorch: GiB a card", "largest batch",
        "a step, at least ms", "the run, at least GPU-hours")  # fmt: skip
ONE_CARD = "step", "rows", "JAX: GiB", "PyTorch: GiB", "at least ms"


def preset_rows(found: dict, card: cards.Card, devices: int) -> Iterator[tuple]:
    """Yield a row for each published run that was rehearsed in either framework."""
    for file, variants in SAME_STEP.items():
        for rehearsed, same in variants.items():
            reports = {f: found.get((f, f"{file}:{rehearsed}", devices)) for f in FRAMEWORKS}
            first = next(filter(None, reports.values()), None)
            if first is None:
                continue
            for variant in (rehearsed, *same):
                config = load(f"{file}:{variant}")
                b = bounds.of(config, first, card, devices)
                memory = itertools.chain(*(memory_cells(reports[f], card, devices) for f in FRAMEWORKS))
                yield (f"`{file}:{variant}`", first["batch"], config.train.steps, *memory, f"{b.step * 1e3:.1f}",
                       f"{b.gpu_hours:.0f}")  # fmt: skip


def memory_cells(report: dict | None, card: cards.Card, devices: int) -> tuple[str, str]:
    """Return (GiB, largest batch)."""
    if report is None:
        return "–", "–"
    over = " (does not fit)" if report["peak_bytes"] > cards.usable(card) else ""
    return f"{report['peak_bytes'] / GIB:.1f}{over}", str(most_rows(report, card) * devices)


def smallest_table(found: dict, devices: int) -> list[str]:
    """Return the table of the fewest cards of each kind, for both frameworks."""
    rows = []
    for file in SMALLEST:
        for variant in SAME_STEP[file]:
            for framework in FRAMEWORKS:
                if report := found.get((framework, f"{file}:{variant}", devices)):
                    fewest = (fewest_cards(report, card) for card in cards.CARDS.values())
                    cells = (f"{f[0]} ({f[1]})" if f and f[1] > 1 else str(f[0]) if f else "–" for f in fewest)
                    rows.append((f"`{file}:{variant}`", framework, *cells))
    return table(("run", "framework", *cards.CARDS), rows)


def one_card_rows(found: dict, card: cards.Card) -> Iterator[tuple]:
    """Yield a row for each step on one card."""
    for variant in STEPS:
        name = f"meanflow_imagenet:{variant}"
        reports = [found.get((framework, name, 1)) for framework in FRAMEWORKS]
        first = next(filter(None, reports), None)
        if first:
            step = bounds.of(load(name, ROWS), first, card, 1).step
            cells = ("–" if r is None else f"{r['peak_bytes'] / GIB:.2f}" for r in reports)
            yield f"`{name}`", ROWS, *cells, f"{step * 1e3:.1f}"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--card", default="h100", help=f"one of {', '.join(cards.CARDS)} (default: %(default)s)")
    parser.add_argument("--devices", type=int, default=8, help="cards (default: %(default)s)")
    parser.add_argument("--frameworks", nargs="+", choices=FRAMEWORKS, default=FRAMEWORKS, help="(default: both)")
    parser.add_argument("--only", metavar="REGEX", default="", help="runs whose FILE:variant matches")
    parser.add_argument("--table", action="store_true", help="rehearse nothing more")
    parser.add_argument("--workdir", type=paths.written, default=pathlib.Path("runs/rehearsal"),
                        help="(default: %(default)s)")  # fmt: skip
    parser.add_argument("--output", type=paths.written, default=PAGE, help="(default: docs/rehearsal.md)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Rehearse what was not yet, and write both files."""
    args = parse(argv)
    cards.find(args.card)
    chosen = list(jobs(args.devices, args.frameworks, args.only))
    if not chosen:
        raise UserError(f"no run matches --only={args.only}")
    if not args.table:
        for job in tqdm(chosen, "rehearsing", disable=None):
            report_of(job, args.card, args.workdir)
    everything = jobs(args.devices, FRAMEWORKS, "")
    kept = [job for job in everything if path_of(job, args.card, args.workdir).exists()]
    reports = [report_of(job, args.card, args.workdir) for job in kept]
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.with_suffix(".json").write_text(json.dumps(reports, indent=1) + "\n")
    args.output.write_text(page(reports, args.card, args.devices))


if __name__ == "__main__":
    with exit_on_user_error():
        main()
