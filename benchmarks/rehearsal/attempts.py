"""Rehearsals in processes of their own, and the search for what fits a card."""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

from tqdm import tqdm

from benchmarks.rehearsal import cards
from meanflow.config import checks, options, store
from meanflow.errors import UserError

ROOT = pathlib.Path(__file__).parents[2]
APART = pathlib.Path(sys.prefix) / "rehearse"  # where `make install` puts JAX's compiler for GPUs
REMEDIES = (  # what to try if a step does not fit, cheapest first; fsdp only if there are several cards
    {"train.accumulate": 2}, {"train.accumulate": 4}, {"train.remat": True},
    {"train.remat": True, "train.accumulate": 2}, {"train.remat": True, "train.accumulate": 4},
)  # fmt: skip
TRIES = 4  # of a search


def rehearse(framework: str, config: options.Config, card: str, devices: int, nodes: int) -> dict:
    """Return the report of a rehearsal (see `jax_step.rehearse`), made in a process of its own with a progress line.

    Raises UserError for what the user can fix, and RuntimeError with the end of stderr if the rehearsal fails.
    """
    module = f"benchmarks.rehearsal.{framework}_step"
    with tempfile.TemporaryDirectory() as directory, open(f"{directory}/stderr", "w+") as stderr:
        pathlib.Path(f"{directory}/config.json").write_text(store.to_json(config))
        argv = [sys.executable, "-m", module, f"{directory}/config.json", card, str(devices), str(nodes)]
        process = subprocess.Popen(argv, stdout=-1, stderr=stderr, text=True, env=os.environ | environment(framework))
        text = communicate(process, f"{config.name or 'rehearsal'}, batch {config.train.batch_size}")
        stderr.seek(0)
        lines = stderr.read().splitlines() or [""]
    if process.returncode == 2 and lines[-1].startswith("error: "):
        raise UserError(lines[-1].removeprefix("error: "))
    if process.returncode:
        raise RuntimeError("\n".join([f"{module} failed with exit code {process.returncode}", *lines[-15:]]))
    return json.loads(text.splitlines()[-1])


def environment(framework: str) -> dict[str, str]:
    """Return what a process needs to rehearse.

    JAX's plugin calls into the driver unless told not to; its devices are only described, so a CPU does the rest.
    """
    path = os.pathsep.join([str(ROOT), *([str(APART)] if framework == "jax" and APART.exists() else ())])
    return {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
            "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": ""}  # fmt: skip


def communicate(process: subprocess.Popen, title: str) -> str:
    """Return what a process prints, and count the seconds meanwhile."""
    with tqdm(desc=title, bar_format="{desc}: {elapsed}", leave=False, disable=None) as line:
        while True:
            try:
                return process.communicate(timeout=1)[0]
            except subprocess.TimeoutExpired:
                line.refresh()


def changed(config: options.Config, changes: dict[str, Any]) -> options.Config:
    """Return a checked copy of the config with options by dotted name."""
    config = store.from_json(store.to_json(config))
    config.update_from_flattened_dict(changes)
    return checks.check(config)


def fits(found: dict, card: cards.Card) -> bool:
    """Return whether a step fits the card."""
    return found["peak_bytes"] <= cards.usable(card)


def largest_batch(found: dict, config: options.Config, card: cards.Card, num_cards: int, try_batch) -> int:
    """Return the largest global batch that fits, 0 if none was found.  try_batch: batch -> report.

    Assumes that temporaries and the batch grow with it, and rehearses what that suggests until one fits and is within
    a few rows of the suggestion.
    """
    best, batch = 0, config.train.batch_size
    unit = num_cards * config.train.accumulate * 4  # a fraction of a quarter of the rows is a whole number then
    for _ in range(TRIES):
        if fits(found, card):
            best = max(best, batch)
        growing = found["parts"]["temporaries"] + found["parts"]["batch"]
        fixed = found["peak_bytes"] - growing
        suggested = int((cards.usable(card) - fixed) * batch / growing) // unit * unit
        if suggested <= best or suggested == batch:
            break
        batch = suggested
        found = try_batch(batch)
    return max(best, batch if fits(found, card) else 0)


def remedy(config: options.Config, card: cards.Card, num_cards: int, try_changes) -> tuple[dict, dict] | None:
    """Return the first changes that make a step fit, and their report; None if none does.  try_changes: -> report."""
    sharded = [{"train.fsdp": num_cards}] if num_cards > 1 and config.train.fsdp == 1 else []
    both = [changes | sharded[0] for changes in REMEDIES[2:]] if sharded else []
    for changes in (*sharded, *REMEDIES, *both):
        try:
            found = try_changes(changes)
        except UserError:  # the batch does not divide
            continue
        if fits(found, card):
            return changes, found
    return None
