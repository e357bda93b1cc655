"""Reads weights from wherever they are: a file, a folder, an archive or an address on the hub."""

import pathlib
from typing import NamedTuple

import numpy as np
import tqdm

from meanflow.errors import UserError
from meanflow.weights import dialects, files, folders, hub, sources, times
from meanflow.weights.sources import Source


class Choice(NamedTuple):
    """Which of the weights to read, and how."""

    ema: int | None = None  # which EMA, -1 for the raw parameters; None for the first EMA, or what there is
    prefix: str = ""  # of the names to keep
    step: int | None = None  # of several checkpoints in a directory
    time: str | None = None  # how the time of a flow model runs, see `times.settle`


FIRST = Choice()
PAGE = 4096  # bytes


def read(source: str | pathlib.Path, choice: Choice = FIRST) -> Source:
    """Return the canonical weights of a source that is no work directory, their time running our way.

    source: a path, or an address of `hub`.  Which of several entries was taken is said in its `kind`.
    Raises UserError for what is not there, damaged, unsafe or not known.
    """
    path = hub.locate(str(source)) if hub.is_address(source) else pathlib.Path(source)
    if not path.exists():
        raise UserError(f"there is no {path}")
    if path.is_file() and files.is_archive(path):
        with folders.unpacked(path) as inner:
            return read(inner, choice)
    if path.is_dir():
        found = folders.read(path, choice.ema, choice.prefix, choice.step)
    elif choice.step is not None:
        raise UserError(f"--step chooses a checkpoint of a directory, and {path} is a file")
    else:
        found = sources.read(path, choice.ema, choice.prefix)
    return settled(found, choice.time, source)


def settled(found: Source, time: str | None, where: object) -> Source:
    """Return a source by canonical names, its time running our way.

    Weights that this project wrote have both, unless `time` says otherwise.
    """
    read_in(found.weights)
    if time is None and found.ours:
        return found
    weights, named = dialects.translate(found.weights, where)
    weights, turned = times.settle(weights, found.arguments, time, where)
    return found._replace(weights=weights, kind=", ".join(filter(None, (found.kind, named, turned))))


def read_in(weights: dict[str, np.ndarray]) -> None:
    """Read mapped arrays from the disk, with a progress bar if that takes long, so that using them does not wait."""
    total = sum(a.nbytes for a in weights.values())
    with tqdm.tqdm(total=total, desc="weights", unit="B", unit_scale=True, leave=False, delay=1, disable=None) as bar:
        for a in weights.values():
            a.ravel(order="K")[:: PAGE // a.itemsize].max(initial=0)
            bar.update(a.nbytes)
