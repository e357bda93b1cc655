"""Reads weights for the converter: from runs of either framework, and from what `meanflow.weights.reading` reads."""

import pathlib

from jax_impl import checkpoints as jax_checkpoints
from meanflow.commands import snapshots
from meanflow.config.workdir import FILE_NAME
from meanflow.errors import UserError
from meanflow.weights import hub, reading
from meanflow.weights.reading import Choice
from meanflow.weights.sources import Source
from torch_impl import checkpoints as torch_checkpoints


def read(source: str | pathlib.Path, choice: Choice) -> Source:
    """Read a work directory of either trainer, or anything that `reading.read` reads.  Raises UserError."""
    path = pathlib.Path(source)
    if hub.is_address(source) or not path.is_dir():
        return reading.read(source, choice)
    kinds = [
        (torch_checkpoints.DIRECTORY, torch_checkpoints, "PyTorch work directory"),
        (jax_checkpoints.DIRECTORY, jax_checkpoints, "JAX work directory"),
    ]
    if (path / FILE_NAME).is_file():  # snapshots alone belong to no framework
        kinds.append((snapshots.DIRECTORY, torch_checkpoints, "work directory"))
    for directory, checkpoints, kind in kinds:
        if (path / directory).is_dir():
            ema = choice.ema or 0
            config, weights = checkpoints.read_weights(path, ema, choice.step)
            which = "raw parameters" if ema == -1 else f"EMA {ema} of decay {config.train.ema_decays[ema]}"
            found = Source(weights, f"{kind}, its {which}", config, ours=True)
            return reading.settled(found, choice.time, source)
    for part in (path, *path.parents[:2]):
        if part.name == "checkpoints" and (part.parent / FILE_NAME).is_file():
            raise UserError(f"{path} is inside a work directory: name that, {part.parent}")
    return reading.read(path, choice)
