"""Snapshots of a run: each EMA as canonical weights, WORKDIR/snapshots/STEP/ema_DECAY.safetensors.

They are small beside a checkpoint, and every command that takes canonical weights reads them.
"""

import contextlib
import json
import os
import pathlib
from collections.abc import Callable, Iterable

import numpy as np

from meanflow import files
from meanflow.commands.checkpoints import STEP
from meanflow.config import latents, options, store
from meanflow.errors import UserError

DIRECTORY = "snapshots"

Weights = dict[str, np.ndarray]
Save = Callable[[str | os.PathLike, Weights, dict[str, str]], None]


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

    emas: canonical weights {name: array} of each of `train.ema_decays`, made one at a time.  save: (path, weights,
    metadata), which writes safetensors.  Raises UserError if it cannot be written.
    """
    for decay, weights in zip(config.train.ema_decays, emas, strict=True):
        path = path_of(workdir, step, decay)
        unfinished = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save(unfinished, weights, metadata(config, step, decay))
            os.replace(unfinished, path)
        except OSError as error:
            raise files.cannot_write(path, error) from error
        finally:
            with contextlib.suppress(OSError):  # it is gone, or was never there
                unfinished.unlink()


def metadata(config: options.Config, step: int, decay: float) -> dict[str, str]:
    """Return what a snapshot says of itself: its step, its EMA, the config, the convention of the latents."""
    convention = latents.of(config)
    of_latents = {} if convention is None else {"latents": json.dumps(latents.to_dict(convention))}
    source = f"step {step}, EMA of decay {decay}"
    return {"format": "canonical", "source": source, "step": str(step), "ema": str(decay)} | of_latents | {
        "config": store.to_json(config)
    }  # fmt: skip


def choose(workdir: str | os.PathLike, decay: float | None, step: int | None, stored: list[int]) -> pathlib.Path | None:
    """Return the snapshot to read the EMA of a step from, or None for its checkpoint.

    decay: None for the raw parameters, of which there are no snapshots.  step: None for the newest checkpoint.
    stored: the steps of the checkpoints.  Raises UserError listing the steps that are there if that is none of them.
    """
    if step in stored or (step is None and stored):
        return None
    small = [] if decay is None else steps(workdir, decay)
    if step in small and decay is not None:
        return path_of(workdir, step, decay)
    there = f"checkpoints of steps {_listed(stored)}" if stored else "no checkpoint"
    there += f", snapshots of steps {_listed(small)}" if small else ""
    if step is None:
        raise UserError(f"{workdir} has {there}" + ("; choose one by --step" if small else " yet"))
    raise UserError(f"{workdir} has no step {step}, only {there}" if stored or small else f"{workdir} has {there} yet")


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))
