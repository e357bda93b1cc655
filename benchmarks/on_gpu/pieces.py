"""What is tried on a GPU, most important first: each piece is a program of its own with a time limit."""

import os
import pathlib
import sys
from typing import NamedTuple

FRAMEWORKS = ("jax", "torch")
CHAINS = {  # recipes of configs/digits.py that are trained one after the other: the second starts from the first
    "dit": ("",), "imf": ("imf",), "unet": ("unet",), "dmf": ("flow", "dmf"), "remeanflow": ("edm2_flow", "remeanflow"),
}  # fmt: skip  # in bfloat16; float32 is compared with the CPU
COMPARED = ("", ":imf", ":unet", ":dmf", ":remeanflow")  # recipes of configs/digits.py: a step on the CPU and the GPU
ROWS = 32  # of a step on one card: a batch of 256 on eight
STEPS = {"b4": 12, "xl2": 40}  # recipes of configs/meanflow_imagenet.py: GiB at most, in either framework
# Of parity/check.py: a forward, losses, training and samples of every system.
PARITY = (
    "^float64/(unet/|imf/|dmf/|edm2/)?(forward|split/kappa|coin/kappa|split|coin|mg|v1|re2|train/.*|sample/steps2"
    "|sample/euler)$"
)


class Piece(NamedTuple):
    """One program."""

    name: str
    argv: tuple[str, ...]
    limit: int  # seconds; of a timed piece, until it is ready
    timed: bool = False  # waits until it has the card to itself
    gib: int = 4  # of the card, at most
    num_gpus: int = 1  # that it needs


def every_piece(workdir: pathlib.Path, cpu: bool = False) -> list[Piece]:
    """Return all pieces.  cpu: tiny ones for a machine without a GPU, which show that they run."""
    gpu = () if cpu else ("--gpu",)
    pieces = []
    for recipe, gib in STEPS.items():
        config = ("configs/digits.py", 8) if cpu else (f"configs/meanflow_imagenet.py:{recipe}", ROWS)
        pieces += [Piece(f"step/{recipe}/{f}", module("timed", f, *config), 300, True, gib) for f in FRAMEWORKS]
    pieces += [
        Piece(f"resume/{f}", module("resume", f, workdir / "resume" / f, 120 if cpu else 300), 400) for f in FRAMEWORKS
    ]
    pieces += [Piece(f"attention/{f}", module("attention", f), 120) for f in FRAMEWORKS]
    for recipe in COMPARED:
        argv = (sys.executable, "parity/full_step.py", f"--config=configs/digits.py{recipe}", *gpu)
        pieces.append(Piece(f"cpu_and_gpu/{recipe.strip(':') or 'dit'}", argv, 300))
    for name, chain in CHAINS.items():
        argv = (workdir / "digits", *chain)
        pieces += [Piece(f"digits/{name}/{f}", module("digits", f, "bfloat16", *argv), 400) for f in FRAMEWORKS]
    jobs = max(1, (os.cpu_count() or 1) // 4)
    argv = (sys.executable, "parity/check.py", "--only", PARITY, f"--jobs={jobs}", *gpu)
    pieces.append(Piece("parity/float64", argv, 300, gib=2 * jobs))
    pieces += [
        Piece(f"two_processes/{f}", module("two", f, workdir / "two" / f), 200, num_gpus=1 if cpu else 2)
        for f in FRAMEWORKS
    ]
    return pieces


def module(name: str, *arguments) -> tuple[str, ...]:
    """Return the command line of a program of this package."""
    return (sys.executable, "-m", f"benchmarks.on_gpu.{name}", *map(str, arguments))
