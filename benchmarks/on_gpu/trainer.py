"""Runs the trainers and the commands around them, as users do."""

import json
import math
import os
import pathlib
import subprocess
import sys
import time
from typing import Any

SCRIPTS = {"main": "train"}  # names of commands in PyTorch, where they differ
SMALL: dict[str, Any] = {  # changes to a recipe that only has to show that it works
    "train.steps": 30, "train.log_every": 10, "train.checkpoint_every": 30, "train.sample_every": 30,
    "train.warmup_steps": 0, "sample.batch_size": 64,
}  # fmt: skip


def command(framework: str, name: str, *arguments: str) -> list[str]:
    """Return the command line of a command of a framework, such as `main`, the trainer, or `sample`."""
    script = f"torch_impl/{SCRIPTS.get(name, name)}.py"
    return [sys.executable, *(["-m", f"jax_impl.{name}"] if framework == "jax" else [script]), *arguments]


def train(framework: str, recipe: str, workdir, changes: dict) -> list[str]:
    """Return the command line that trains a recipe, FILE or FILE:variant, with changes by dotted option."""
    options = [f"--config.{name}={value}" for name, value in changes.items()]
    return command(framework, "main", f"--config={recipe}", f"--workdir={workdir}", *options)


def run(argv: list[str], **environment: str) -> str:
    """Run a command and return what it prints.  Exits with the end of its errors if it fails.

    Says so on stderr, for whoever stops the piece because it takes too long.
    """
    print(f"{time.strftime('%X')} {' '.join(argv[1:])}", file=sys.stderr, flush=True)
    done = subprocess.run(argv, capture_output=True, text=True, env=os.environ | environment, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(argv[1:])}\nexit code {done.returncode}\n{done.stderr[-3000:]}")
    return done.stdout


def metrics(workdir) -> list[dict]:
    """Return the lines that a run has logged."""
    path = pathlib.Path(workdir) / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def check_finite(workdir, step: int) -> dict:
    """Return the last line that a run has logged.  Exits if that is of another step or has a number that is none."""
    last = metrics(workdir)[-1]
    if last["step"] != step or not all(map(math.isfinite, last.values())):
        sys.exit(f"{workdir} should have ended at step {step}, with finite numbers: {last}")
    return last
