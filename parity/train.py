"""Trains a recipe in JAX, in PyTorch, and in runs that change framework half-way, and compares them step by step.

    python parity/train.py --config=configs/digits.py [--steps=200] [--switch=100] [--dtype=float64] [--output=DIR]

All start from the same weights and take the same batches and draws, which follow from config.seed, in the steps that
the trainers compile.  Prints the differences from JAX of loss, raw error, gradient norm, parameters and EMAs, and
writes DIR/train.html, train.png and train.json: the curves, and the differences by step on a logarithmic axis.
Rounding makes runs part, and training makes that grow: so in float32 PyTorch also trains with another number of
threads, as the yardstick of how far one framework is from itself.
Exit code 0 if the differences are within the bounds (float64: 1e-9 of everything; float32: 1e-3 of the loss), 1 if not,
2 for a usage error.
"""

import json
import pathlib
import sys

import numpy as np
import torch
from absl import flags
from tqdm import tqdm

from meanflow import files
from meanflow.config import checks, options, paths
from meanflow.config.flags import config as config_flag
from meanflow.config.flags import run
from meanflow.console_log import setup_logging
from meanflow.data import draws
from meanflow.data.examples import with_latents
from meanflow.data.loader import make_loader
from meanflow.data.prefetch import Prefetcher
from meanflow.errors import UserError
from parity import train_page
from parity.trainers import TRAINERS, TorchTrainer, Trainer, set_precision

BOUNDS = {"float64": {"": 1e-9}, "float32": {"loss": 1e-3}}  # of a quantity; '': of every one
SCALARS = ("loss", "raw_error", "grad_norm")  # of those logged
SHOWN = 10  # lines of the table
REFERENCE, OTHER = "jax", "torch"
Curves = dict[str, dict[str, list[float]]]  # {run: {scalar: by step}}


def define_flags() -> None:
    """Define the flags of the command."""
    flags.DEFINE_integer("steps", 200, "Steps to take, the first of the recipe.", lower_bound=1)
    flags.DEFINE_integer("switch", None, "Step after which two runs change framework; 0: none (default: half).")
    flags.DEFINE_enum("dtype", "float32", ["float32", "float64"], "Precision of everything.")
    flags.DEFINE_integer("every", 1, "Compare parameters and EMAs after every so many steps.", lower_bound=1)
    flags.DEFINE_bool("yardstick", None, "Train in PyTorch with another number of threads (default: float32).")
    flags.DEFINE(paths.WRITTEN, "output", "runs/parity_train", "Directory of the page.")


def compare(
    config: options.Config, steps: int, switch: int = 0, every: int = 1, yardstick: bool = False
) -> tuple[Curves, dict[str, dict[str, dict[int, float]]]]:
    """Take the steps.  Returns the curves, and {run: {quantity: {step: difference from JAX}}}.

    switch: the step after which each framework's state goes on in the other as well, 0 for never.
    yardstick: whether PyTorch also trains with another number of threads; its differences are from PyTorch.
    Raises UserError for what the trainers refuse.
    """
    set_precision(config)
    config = with_latents(config)
    loader = make_loader(config, config.train.batch_size)
    batches = Prefetcher(loader, dict, config.data.prefetch, lambda step: draws.of_process(config, step))
    trainers: dict[str, Trainer] = {name: trainer(config) for name, trainer in TRAINERS.items()}
    if yardstick:
        threads = torch.get_num_threads()
        other = threads // 2 if threads > 1 else 2
        trainers[f"{OTHER}, {other} thread{'s' if other > 1 else ''}"] = TorchTrainer(config, num_threads=other)
    curves: Curves = {name: {} for name in trainers}
    differences: dict[str, dict[str, dict[int, float]]] = {}
    for step in tqdm(range(1, steps + 1), "steps", disable=None):
        if switch and step == switch + 1:
            for begun, other in ((REFERENCE, OTHER), (OTHER, REFERENCE)):
                name = f"{begun} to {other}"
                trainers[name] = TRAINERS[other](config, trainers[begun].export())
                curves[name] = {key: list(values) for key, values in curves[begun].items()}
        batch = next(batches)
        for name, trainer in trainers.items():
            for key, value in trainer.step(batch).items():
                curves[name].setdefault(key, []).append(value)
        measure(trainers, curves, differences, step, every)
    batches.close()
    return curves, differences


def measure(trainers, curves, differences, step, every):
    """Add the relative differences after a step to `differences`."""
    whole = step % every == 0
    arrays = {name: flat(trainer) for name, trainer in trainers.items()} if whole else {}
    for name in trainers:
        if name == REFERENCE:
            continue
        of = OTHER if name.startswith(f"{OTHER},") else REFERENCE
        found = differences.setdefault(name, {})
        for key in SCALARS:
            if key in curves[name]:
                one, other = curves[name][key][-1], curves[of][key][-1]
                found.setdefault(key, {})[step] = abs(one - other) / max(abs(other), sys.float_info.min)
        for key, a in arrays.get(name, {}).items():
            expected = arrays[of][key]
            norm = max(float(np.linalg.norm(expected)), sys.float_info.min)
            found.setdefault(key, {})[step] = float(np.linalg.norm(a - expected)) / norm


def flat(trainer: Trainer) -> dict[str, np.ndarray]:
    """Return the parameters and each EMA of a trainer as one float64 vector."""
    state = trainer.export()
    trees = {"parameters": state.params} | {f"EMA {i}": ema for i, ema in enumerate(state.emas)}
    return {key: np.concatenate([tree[n].ravel().astype(np.float64) for n in tree]) for key, tree in trees.items()}


def beyond(differences, dtype: str) -> list[str]:
    """Return a sentence for each quantity whose largest difference exceeds its bound; the yardstick has none."""
    sentences = []
    for name, found in differences.items():
        for key, by_step in found.items():
            bound = BOUNDS[dtype].get(key, BOUNDS[dtype].get("", np.inf))
            step = max(by_step, key=lambda i: by_step[i])
            if not by_step[step] <= bound and not name.startswith(f"{OTHER},"):
                sentences.append(f"{name}: {key} differs by {by_step[step]:.1e} at step {step}, more than {bound:g}")
    return sentences


def table(differences, steps: int) -> str:
    """Return the differences at some steps, and their largest."""
    names = [(name, key) for name, found in differences.items() for key in found]
    shown = sorted({round(steps * i / SHOWN) for i in range(1, SHOWN + 1)} - {0} | {1})
    lines = [f"{'run':18} {'difference of':13}" + "".join(f"{i:>9}" for i in shown) + "      max"]
    for name, key in names:
        found = differences[name][key]
        cells = "".join(f"{found[i]:9.1e}" if i in found else f"{'':9}" for i in shown)
        lines.append(f"{name:18} {key:13}{cells}{max(found.values()):9.1e}")
    return "\n".join(lines)


def settings(config: options.Config, dtype: str) -> options.Config:
    """Return the config in a precision, as both frameworks can take its steps in one process."""
    config.model.compute_dtype, config.train.matmul_precision = dtype, "highest"
    config.train.update(fsdp=1)
    for name in ("attention", "attention_jvp"):  # whose kernels are for lower precisions
        if dtype == "float64" and name in config.model:
            config.model[name] = "plain"
    return checks.check(config)


def main():
    """Train, compare, and write the page."""
    setup_logging()
    f = flags.FLAGS
    config, steps = settings(checks.check(config_flag()), f.dtype), f.steps
    switch = steps // 2 if f.switch is None else f.switch
    if not 0 <= switch < steps:
        raise UserError(f"--switch is {switch}; it must be below --steps, {steps}, or 0 for runs that stay")
    yardstick = f.dtype == "float32" if f.yardstick is None else f.yardstick
    curves, differences = compare(config, steps, switch, f.every, yardstick)
    print(table(differences, steps))
    output = pathlib.Path(f.output)
    problems = beyond(differences, f.dtype)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise files.cannot_write(output, error) from error
    files.replace_text(output / "train.json", json.dumps({"curves": curves, "differences": differences}))
    files.replace_text(output / "train.html", train_page.html(config, f.dtype, curves, differences, switch, problems))
    train_page.curves(curves, switch).savefig(output / "train.png", dpi=110)
    print(*problems, f"see {output / 'train.html'}", sep="\n")
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    define_flags()
    run(main)
