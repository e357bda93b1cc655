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
import textwrap
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from tqdm import tqdm

from benchmarks.on_gpu.pieces import ROWS, STEPS
from benchmarks.rehearsal import bounds, cards
from benchmarks.rehearsal.attempts import changed, rehearse
from benchmarks.rehearsal.report import GIB, table
from meanflow.config import options, paths, store
from meanflow.errors import UserError, exit_on_user_error

ROOT = pathlib.Path(__file__).parents[1]
PAGE = ROOT / "docs/rehearsal.md"
FRAMEWORKS = ("jax", "torch")
VARIED = "meanflow_imagenet:xl2"
SAME_STEP = {  # {a variant to rehearse: others whose steps need the same}, by config file
    "meanflow_imagenet": {"xl2": ("xl2_plus",), "b4_nocfg": (), "b4": (), "b4_jax": (), "b2": (), "m2": (), "l2": ()},
    "imf_imagenet": {"xl2": ("xl2_2step",), "b2": (), "m2": (), "l2": ()},
    "dmf_imagenet": {"dmf_512": (), "dmf_256": (), "sit_256": (), "sit_512": ()},
    "remeanflow_imagenet": {"512": (), "64": ()},
    "meanflow_cifar10": {"v1": ("v0",), "reproduction": ()},
}
SMALLEST = "meanflow_imagenet", "imf_imagenet"  # files for which to find the smallest machine
MOST = 8  # micro-batches that still leave a card enough to do
HIDDEN = 0.1
COUNTS = (1, 2, 4, 8)  # cards of a machine


class Job(NamedTuple):
    """One rehearsal."""

    framework: str
    config: str  # FILE:variant
    devices: int
    changes: tuple[tuple[str, Any], ...] = ()  # options

    @property
    def label(self) -> str:
        """Its config, devices and changes."""
        changes = (f" {name.rpartition('.')[2]}={value}" for name, value in self.changes)
        return f"{self.config} {self.devices}x{''.join(changes)}"


def jobs(devices: int, frameworks: Iterable[str], only: str = "") -> Iterator[Job]:
    """Yield the rehearsals whose label matches `only`.

    Published batches on a machine, then the steps on one card that `make gpu` times, then XL/2 in other settings.
    """
    names = [f"{file}:{variant}" for file, variants in SAME_STEP.items() for variant in variants]
    every = [Job("", name, devices) for name in names]
    every += [Job("", f"meanflow_imagenet:{variant}", 1, (("train.batch_size", ROWS),)) for variant in STEPS]
    every += [Job("", VARIED, devices, tuple(setting.items())) for setting in settings()]
    for job, framework in itertools.product(every, frameworks):
        if re.search(only, job.label):
            yield job._replace(framework=framework)


def settings() -> Iterator[dict[str, Any]]:
    """Yield the settings of XL/2 to compare, without the published one."""
    for pixels, fused, remat, fsdp in itertools.product((32, 64), ("fused", "plain"), (False, True), (1, 8)):
        if fused == "fused" or not remat:
            values = (pixels, fused, remat, fsdp)
            yield dict(zip(("model.input_size", "model.attention", "train.remat", "train.fsdp"), values, strict=True))


def load(name: str, changes: tuple[tuple[str, Any], ...] = ()) -> options.Config:
    """Return the config FILE:variant with changes."""
    return changed(store.load_file(f"configs/{name.replace(':', '.py:')}"), dict(changes))


def path_of(job: Job, card: str, workdir: pathlib.Path) -> pathlib.Path:
    """Return where the report of a rehearsal is kept."""
    return workdir / f"{job.framework}-{re.sub('[^A-Za-z0-9_=]+', '-', job.label)}-{card}.json"


def report_of(job: Job, card: str, workdir: pathlib.Path) -> dict:
    """Return the report of a rehearsal, see `jax_step.rehearse`, made now or before, and what was rehearsed."""
    path = path_of(job, card, workdir)
    if not path.exists():
        found = rehearse(job.framework, load(job.config, job.changes), card, job.devices, 1)
        workdir.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found, indent=2) + "\n")
    kept = ("parts", "peak_bytes", "peak_kind", "peaks", "collectives", "custom_calls", "flops", "forward_flops",
            "seconds")  # fmt: skip
    found = json.loads(path.read_text())
    of_job = {
        "framework": job.framework, "config": job.config, "changes": dict(job.changes), "card": card,
        "cards": job.devices, "batch": load(job.config, job.changes).train.batch_size,
    }  # fmt: skip
    return of_job | {name: found[name] for name in kept if name in found}


def split(report: dict) -> tuple[float, float]:
    """Return the bytes of a card that do not depend on the batch, and those for each of its rows.

    If temporaries are less than `HIDDEN` of the peak, gradients may have taken their place at it: both then count as
    growing, which is too much.
    """
    parts = report["parts"]
    growing = parts["temporaries"] + parts["batch"]
    growing += parts["gradients"] if growing < HIDDEN * report["peak_bytes"] else 0
    return report["peak_bytes"] - growing, growing / (report["batch"] / report["cards"])


def most_rows(report: dict, card: cards.Card, parts: int = 1) -> int:
    """Return how many rows of a micro-batch fit a card, if what a step needs grows with them.

    Several micro-batches need their sum of gradients, and up to another copy while it is added to: XL/2 on one H100,
    256 rows in four parts, needs 25.5 GiB in JAX, and this says 26.2.
    """
    fixed, each = split(report)
    fixed += 2 * report["parts"]["gradients"] if parts > 1 else 0
    return max(0, int((cards.usable(card) - fixed) / each))


def fewest_cards(report: dict, card: cards.Card) -> tuple[int, int] | None:
    """Return (cards, micro-batches) of the smallest machine for the batch, fewest micro-batches; None if none does."""
    for count in COUNTS:
        rows = report["batch"] // count
        fitting = (n for n in (1, 2, 4, MOST) if rows % n == 0 and rows // n <= most_rows(report, card, n))
        parts = next(fitting, None)
        if parts:
            return count, parts
    return None


def page(reports: list[dict], card_name: str, devices: int) -> str:
    """Return docs/rehearsal.md."""
    card = cards.find(card_name)
    found = {key(r["framework"], r["config"], r["cards"], r["changes"]): r for r in reports}
    lines = [
        "# What the published runs need", "", ASSUMED.format(devices=devices, title=card.title), "",
        COLUMNS.format(usable=cards.usable(card) / GIB), "", *table(HEAD, preset_rows(found, card, devices)), "",
        "## The smallest machine", "", MACHINES.format(most=MOST), "", *smallest_table(found, devices), "",
        f"## {VARIED} in other settings", "", SETTINGS.format(kinds=", ".join(KINDS)), "",
        *table(GRID, grid_rows(found, devices)), "",
        "## One card", "", "The steps that `make gpu` times.", "", *table(ONE_CARD, one_card_rows(found, card)), "",
    ]  # fmt: skip
    return "\n".join(
        line if line.startswith("|") else textwrap.fill(line, 120, break_on_hyphens=False) for line in lines
    )


ASSUMED = (
    "Rehearsed by `python benchmarks/presets.py` on {devices} x {title}, none of which was there: XLA compiled the JAX "
    "steps for the card, the PyTorch steps ran on fake tensors, compiled, without the fusions of inductor, so theirs "
    "is an upper bound.  `benchmarks/rehearse.py` does the same for one run and says what it assumes."
)
COLUMNS = (
    "A step can use {usable:.1f} GiB of a card.  Largest batches are those at which what grows with the batch fills "
    "it; they have not been rehearsed.  A bound is the largest of the time of the arithmetic at the card's peak, of "
    "memory at its bandwidth and of the links: no run is that fast.  A dash: not rehearsed."
)
MACHINES = (
    "The fewest cards of a kind on which the published batch fits, alike in memory to the card above, without `fsdp` "
    "or `remat`; in brackets `train.accumulate`, up to {most}, where it needs that.  Computed from the table above."
)
SETTINGS = (
    "Collectives of the JAX step, MiB of their results on one card: {kinds}.  In PyTorch, `fsdp` shards the state "
    "alone: the step gathers all parameters at once and scatters all gradients at once, because a JVP cannot be "
    "compiled through the hooks that would do so block by block."
)
HEAD = ("run", "batch", "steps", "JAX: GiB a card", "largest batch", "PyTorch: GiB a card", "largest batch",
        "a step, at least ms", "the run, at least GPU-hours")  # fmt: skip
KINDS = ("all-gather", "reduce-scatter", "all-reduce")
GRID = ("pixels", "attention", "remat", "fsdp", "JAX: GiB a card", "collectives", "PyTorch: GiB a card")
ONE_CARD = "step", "rows", "JAX: GiB", "PyTorch: GiB", "at least ms"


def key(framework: str, config: str, num_cards: int, changes: dict | None = None) -> tuple:
    """Return what a report is found by."""
    return framework, config, num_cards, tuple((changes or {}).items())


def preset_rows(found: dict, card: cards.Card, devices: int) -> Iterator[tuple]:
    """Yield a row for each published run that was rehearsed in either framework."""
    for file, variants in SAME_STEP.items():
        for rehearsed, same in variants.items():
            reports = {f: found.get(key(f, f"{file}:{rehearsed}", devices)) for f in FRAMEWORKS}
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
                if report := found.get(key(framework, f"{file}:{variant}", devices)):
                    fewest = (fewest_cards(report, card) for card in cards.CARDS.values())
                    cells = (f"{f[0]} ({f[1]})" if f and f[1] > 1 else str(f[0]) if f else "–" for f in fewest)
                    rows.append((f"`{file}:{variant}`", framework, *cells))
    return table(("run", "framework", *cards.CARDS), rows)


def one_card_rows(found: dict, card: cards.Card) -> Iterator[tuple]:
    """Yield a row for each step on one card."""
    for variant in STEPS:
        name, changes = f"meanflow_imagenet:{variant}", {"train.batch_size": ROWS}
        reports = [found.get(key(framework, name, 1, changes)) for framework in FRAMEWORKS]
        first = next(filter(None, reports), None)
        if first:
            step = bounds.of(load(name, tuple(changes.items())), first, card, 1).step
            yield f"`{name}`", ROWS, *map(gib, reports), f"{step * 1e3:.1f}"


def grid_rows(found: dict, devices: int) -> Iterator[tuple]:
    """Yield a row for each setting of XL/2 that was rehearsed in either framework."""
    for setting in settings():
        jax, torch = (found.get(key(framework, VARIED, devices, setting)) for framework in FRAMEWORKS)
        if jax or torch:
            sizes = (jax["collectives"].get(kind, {"bytes": 0})["bytes"] / 2**20 for kind in KINDS) if jax else ()
            pixels, attention, remat, fsdp = setting.values()
            yield (8 * pixels, attention, "yes" if remat else "no", fsdp, gib(jax),
                   ", ".join(f"{size:.0f}" for size in sizes) or "–", gib(torch))  # fmt: skip


def gib(report: dict | None) -> str:
    """Return the memory of a step on one card."""
    return "–" if report is None else f"{report['peak_bytes'] / GIB:.2f}"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--card", default="h100", help=f"one of {', '.join(cards.CARDS)} (default: %(default)s)")
    parser.add_argument("--devices", type=int, default=8, help="cards (default: %(default)s)")
    parser.add_argument("--frameworks", nargs="+", choices=FRAMEWORKS, default=FRAMEWORKS, help="(default: both)")
    parser.add_argument("--only", metavar="REGEX", default="", help="rehearsals whose label matches: FILE:variant 8x")
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
    everything = jobs(args.devices, FRAMEWORKS)
    kept = [job for job in everything if path_of(job, args.card, args.workdir).exists()]
    reports = [report_of(job, args.card, args.workdir) for job in kept]
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.with_suffix(".json").write_text(json.dumps(reports, indent=1) + "\n")
    args.output.write_text(page(reports, args.card, args.devices))


if __name__ == "__main__":
    with exit_on_user_error():
        main()
