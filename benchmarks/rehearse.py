"""What a training run would need on cards that are not there: memory, collectives, FLOPs and time.

    python benchmarks/rehearse.py --framework=jax --config=configs/meanflow_imagenet.py:xl2 --card=h100
    python benchmarks/rehearse.py --framework=jax --config=configs/imf_imagenet.py:xl2 --card=a100-40 --search
    python benchmarks/rehearse.py --framework=torch --config=configs/meanflow_imagenet.py:xl2 --card=h100 \\
        --devices=8 --nodes=2 --config.train.fsdp=8 --plot=memory.png --json=memory.json

In JAX, XLA compiles the trainer's own step for the card, which takes minutes; in PyTorch, the trainer's own step runs
on fake tensors.  Exit code 1 if the step does not fit the card; then what does fit is tried.
"""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

from absl import flags
from tqdm import tqdm

from benchmarks.rehearsal import bounds, cards, report
from meanflow.config import checks, options, paths, store
from meanflow.config.flags import config as config_flag
from meanflow.config.flags import run
from meanflow.errors import UserError

flags.DEFINE_enum("framework", None, ["jax", "torch"], "Which trainer.")
flags.DEFINE_string("card", "h100", f"One of {', '.join(cards.CARDS)}.")
flags.DEFINE_integer("devices", 8, "Cards of a host.", lower_bound=1)
flags.DEFINE_integer("nodes", 1, "Hosts.", lower_bound=1)
flags.DEFINE_bool("search", False, "Find the largest batch that fits, by a few more rehearsals.")
flags.DEFINE(paths.WRITTEN, "json", None, "Also write the figures here.")
flags.DEFINE(paths.WRITTEN, "markdown", None, "Also write the tables here.")
flags.DEFINE(paths.WRITTEN, "plot", None, "Plot memory by part against the card's limit to this PNG.")

ROOT = pathlib.Path(__file__).parents[1]
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
    path = os.pathsep.join([str(ROOT), *([str(APART)] if framework == "jax" and APART.exists() else ())])
    own = {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
           "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": ""}  # fmt: skip
    with tempfile.TemporaryDirectory() as directory, open(f"{directory}/stderr", "w+") as stderr:
        pathlib.Path(f"{directory}/config.json").write_text(store.to_json(config))
        argv = [sys.executable, "-m", module, f"{directory}/config.json", card, str(devices), str(nodes)]
        process = subprocess.Popen(argv, stdout=-1, stderr=stderr, text=True, env=os.environ | own)
        text = communicate(process, f"{config.name or 'rehearsal'}, batch {config.train.batch_size}")
        stderr.seek(0)
        lines = stderr.read().splitlines() or [""]
    if process.returncode == 2 and lines[-1].startswith("error: "):
        raise UserError(lines[-1].removeprefix("error: "))
    if process.returncode:
        raise RuntimeError("\n".join([f"{module} failed with exit code {process.returncode}", *lines[-15:]]))
    return json.loads(text.splitlines()[-1])


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


def main():
    """Rehearse, print and write; exits with code 1 if the step does not fit."""
    f, config = flags.FLAGS, config_flag()
    if config is None or f.framework is None:
        raise UserError("name a trainer and a recipe: --framework=jax --config=configs/meanflow_imagenet.py:b4")
    if f.framework == "jax" and importlib.util.find_spec("tensorflow") is None:
        raise UserError("the rehearsal reads XLA's dumps with TensorFlow: pip install tensorflow-cpu")
    card, num_cards, config = cards.find(f.card), f.devices * f.nodes, checks.check(config)
    checks.check_divisible(config, num_cards, "devices")

    def attempt(changes):
        return rehearse(f.framework, changed(config, changes), f.card, f.devices, f.nodes)

    found = attempt({})
    found |= {"card": card.title, "cards": num_cards, "fits": fits(found, card), "usable_bytes": cards.usable(card)}
    if f.search:
        by_batch = largest_batch(found, config, card, num_cards, lambda b: attempt({"train.batch_size": b}))
        found["largest_batch"] = by_batch
    found["bounds"] = bounds.of(config, found, card, num_cards)._asdict()
    if not found["fits"]:
        fitting = remedy(config, card, num_cards, attempt)
        found["remedy"] = fitting and {"changes": fitting[0], "peak_bytes": fitting[1]["peak_bytes"]}
    report.write(found, report.title(config, f.framework, card, f.devices, f.nodes), f.markdown, f.json, f.plot)
    if not found["fits"]:
        sys.exit(1)


if __name__ == "__main__":
    run(main)
