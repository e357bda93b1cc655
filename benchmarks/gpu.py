"""Everything worth knowing on the day there is a GPU, in both frameworks, within nine minutes.

    make gpu
    python benchmarks/gpu.py --only='step/.*|attention' --budget=200
    python benchmarks/gpu.py --list
    python benchmarks/gpu.py --cpu --only='attention'      (tiny pieces, where there is no GPU)

Trains every recipe on digits, compiled, in bfloat16; kills and resumes, samples and evaluates a run; compares
the CPU with the GPU in float32 (logged scalars, gradients, samples) and both frameworks in float64 on the GPU; trains
in two processes where there are two GPUs; compares fused attention with plain; then times steps of MeanFlow on
ImageNet, alone on the card, beside what benchmarks/rehearse.py predicted.

A piece that fails or takes too long stops nothing.  Writes WORKDIR/CARD.md and WORKDIR/CARD.json; exit code 1 if a
piece failed or was out of time.
"""

import argparse
import datetime
import importlib.metadata
import os
import pathlib
import platform
import re
import subprocess
import sys

from benchmarks.on_gpu import report
from benchmarks.on_gpu.pieces import every_piece
from benchmarks.on_gpu.runner import Card, Schedule
from meanflow.config import paths
from meanflow.errors import UserError, exit_on_user_error

BUDGET = 540  # seconds
PACKAGES = ("jax", "flax", "torch", "numpy")
QUERY = ("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader,nounits")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=int, default=BUDGET, help="seconds for everything (default: %(default)s)")
    parser.add_argument("--only", metavar="REGEX", default="", help="pieces whose name matches")
    parser.add_argument("--list", action="store_true", help="name the pieces, and run nothing")
    parser.add_argument("--cpu", action="store_true", help="run tiny pieces on the CPU, to see that they run")
    parser.add_argument("--jobs", type=int, default=max(2, (os.cpu_count() or 2) // 2),
                        help="pieces that run side by side (default: %(default)s)")  # fmt: skip
    parser.add_argument(
        "--workdir", type=paths.written, default=pathlib.Path("runs/gpu"), help="(default: %(default)s)"
    )
    return parser.parse_args(argv)


def gpus() -> list[tuple[str, float, str]]:
    """Return (name, GiB, driver) of each GPU."""
    try:
        lines = subprocess.run(QUERY, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        return []
    found = []
    for line in lines:
        name, mib, driver = (part.strip() for part in line.split(","))
        found.append((name, float(mib) / 1024, driver))
    return found


def describe_machine(found: list) -> dict:
    """Return what the figures were measured on: card, date and versions."""
    name = found[0][0] if found else f"CPU {platform.machine()}"
    machine = {"card": name, "date": datetime.date.today().isoformat(), "GPUs": len(found), "CPU cores": os.cpu_count()}
    if found:
        machine["driver"] = found[0][2]
    return machine | {package: importlib.metadata.version(package) for package in PACKAGES}


def main(argv: list[str] | None = None) -> int:
    """Run the pieces, write the page, and return the exit code.  Raises UserError if there is no GPU."""
    args = parse(argv)
    workdir = args.workdir.absolute()
    pieces = [piece for piece in every_piece(workdir, args.cpu) if re.search(args.only, piece.name)]
    if not pieces:
        raise UserError(f"no piece matches --only={args.only}; --list names them")
    if args.list:
        print("\n".join(piece.name for piece in pieces))
        return 0
    found = [] if args.cpu else gpus()
    if not found and not args.cpu:
        raise UserError("nvidia-smi finds no GPU; --cpu tries tiny pieces without one")
    card = Card(found[0][1], len(found)) if found else Card(float("inf"), 1)
    rows = Schedule(pieces, card, args.jobs, args.budget, workdir / "logs").run()
    page = report.write(rows, describe_machine(found), workdir)
    print(page.read_text(), end="")
    print(f"Written to {page} and {page.with_suffix('.json')}.", file=sys.stderr)
    return int(any(row.status in ("failed", "out of time") for row in rows))


if __name__ == "__main__":
    with exit_on_user_error():
        sys.exit(main())
