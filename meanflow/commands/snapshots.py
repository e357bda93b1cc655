"""Canonical weights in a work directory: snapshots of its EMAs, and weights that it was made of.

Snapshots are WORKDIR/snapshots/STEP/ema_DECAY.safetensors.  They are much smaller than a checkpoint, and every command
that takes canonical weights reads them.  A directory of weights alone, as `parity.convert` makes it, has no checkpoint
but WORKDIR/model.safetensors beside its config: a run there starts from them, in either framework.
"""

import json
import os
import pathlib
from collections.abc import Callable, Iterable

import numpy as np

from meanflow import files
from meanflow.commands.checkpoints import STEP, whole_steps
from meanflow.config import latents, options, store
from meanflow.config.workdir import FILE_NAME, read_workdir
from meanflow.errors import UserError

DIRECTORY = "snapshots"
ALONE = "model.safetensors"

Weights = dict[str, np.ndarray]
Save = Callable[[str | os.PathLike, Weights, dict[str, str]], None]


def is_run(path: str | os.PathLike) -> bool:
    """Return whether this is a work directory in which a trainer of either framework has saved."""
    path = pathlib.Path(path)
    return (path / FILE_NAME).is_file() and any((path / name).is_dir() for name in ("checkpoints", DIRECTORY))


def path_of(workdir: str | os.PathLike, step: int, decay: float) -> pathlib.Path:
    """Return the file of one EMA."""
    return pathlib.Path(workdir) / DIRECTORY / str(step) / f"ema_{decay}.safetensors"


def steps(workdir: str | os.PathLike, decay: float) -> list[int]:
    """Return the steps, ascending, of the snapshots of one EMA."""
    path = pathlib.Path(workdir) / DIRECTORY
    found = [d.name for d in path.iterdir()] if path.is_dir() else []
    return sorted(int(name) for name in found if STEP.fullmatch(name) and path_of(workdir, int(name), decay).is_file())


def write(workdir: str | os.PathLike, config: options.Config, step: int, emas: Iterable[Weights], save: Save) -> None:
    """Write a snapshot, each file atomically.

    emas: canonical weights {name: array} for each of `train.ema_decays`, made one at a time.  save: (path, weights,
    metadata), which writes safetensors.  Raises UserError if it cannot be written.
    """
    for decay, weights in zip(config.train.ema_decays, emas, strict=True):
        path = path_of(workdir, step, decay)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with files.replacing(path) as unfinished:
                save(unfinished, weights, metadata(config, step, decay))
        except OSError as error:
            raise files.cannot_write(path, error) from error


def metadata(config: options.Config, step: int, decay: float) -> dict[str, str]:
    """Return the metadata of a snapshot: step, EMA, config and convention of the latents."""
    convention = latents.of(config)
    of_latents = {} if convention is None else {"latents": json.dumps(latents.to_dict(convention))}
    source = f"step {step}, EMA of decay {decay}"
    return {"format": "canonical", "source": source, "step": str(step), "ema": str(decay)} | of_latents | {
        "config": store.to_json(config)
    }  # fmt: skip


def locate(
    workdir: str | os.PathLike, path: pathlib.Path, marker: str, ema: int, step: int | None
) -> tuple[options.Config, pathlib.Path | None, list[int]]:
    """Return a run's config, and where its weights are: a file, or None and the steps of checkpoints to try.

    path, marker: of the framework's checkpoints.  ema: index into train.ema_decays; -1: the raw parameters, of which
    there are no snapshots.  step: None for the newest checkpoint.  Weights alone are all of these, at step 0.
    Raises UserError if there is no such run, step or EMA; it lists those that there are.
    """
    config = read_workdir(workdir)
    decays = config.train.ema_decays
    _check_framework(workdir, path)
    if not -1 <= ema < len(decays):
        raise UserError(f"there is no EMA {ema}; {workdir} has {len(decays)}, -1 is the raw parameters")
    whole = whole_steps(path, marker)
    if step in whole or (step is None and whole):
        return config, None, whole if step is None else [step]
    alone = pathlib.Path(workdir) / ALONE
    if alone.is_file() and not step:
        return config, alone, []
    small = [] if ema < 0 else steps(workdir, decays[ema])
    if step in small:
        return config, path_of(workdir, step, decays[ema]), []
    named = {"checkpoints": whole, "snapshots": small}
    there = [f"{name} of steps {_listed(found)}" for name, found in named.items() if found]
    there += ["the weights of step 0"] if alone.is_file() else []
    if step is not None and there:
        raise UserError(f"{workdir} has no step {step}, only {', '.join(there)}")
    way_out = "; choose one by --step" if there else " yet"
    raise UserError(", ".join([f"{workdir} has no checkpoint", *there]) + way_out)


def locate_state(
    workdir: str | os.PathLike, path: pathlib.Path, marker: str, step: int | None
) -> tuple[options.Config, list[int]]:
    """Return a run's config and the steps of checkpoints to try, of which there is one at least.

    See `locate`, which it is like, but for whole training states: snapshots and weights alone are none.
    """
    config = read_workdir(workdir)
    _check_framework(workdir, path)
    whole = whole_steps(path, marker)
    if not whole:
        raise UserError(f"{workdir} has no checkpoint to go on from, only weights at most: add --weights_only")
    if step is not None and step not in whole:
        raise UserError(f"{workdir} has no checkpoint of step {step}, only of {_listed(whole)}")
    return config, whole if step is None else [step]


def _check_framework(workdir, path):
    """Raise UserError if the checkpoints of a run are those of the other framework."""
    ours, other = ("JAX", "torch") if path.name == "jax" else ("PyTorch", "jax")
    if not path.is_dir() and (path.parent / other).is_dir():
        theirs = "PyTorch" if other == "torch" else "JAX"
        raise UserError(f"{workdir} holds a {theirs} checkpoint, not {ours}: convert it with python -m parity.convert")


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))
