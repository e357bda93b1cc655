"""Reads weights from wherever they are: a file, a folder, an archive or an address on the hub."""

import copy
import pathlib
import types
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import tqdm

from meanflow.config import checks, options
from meanflow.errors import UserError, naming
from meanflow.weights import dialects, files, fitting, folders, hub, sources, times
from meanflow.weights.sources import Source


class Choice(NamedTuple):
    """Which of the weights to read, and how."""

    ema: int | None = None  # which EMA, -1 for the raw parameters; None for the first EMA, or what there is
    prefix: str = ""  # of the names to keep
    step: int | None = None  # of several checkpoints in a directory
    time: str | None = None  # how the time of a flow model runs, see `times.settle`


FIRST = Choice()
PAGE = 4096  # bytes


class Network(NamedTuple):
    """A network that is read, config and weights fitted to each other."""

    config: options.Config
    weights: dict[str, np.ndarray]  # canonical
    kind: str  # see `Source`
    published: bool  # whether nothing gave a config, so that it is that of the published network of these sizes


def network(
    source: str | pathlib.Path,
    config: options.Config | None = None,
    choice: Choice = FIRST,
    model: Mapping[str, Any] = types.MappingProxyType({}),
) -> Network:
    """Return the network of a source that is no work directory.

    config: None for the one that the source has, or else that of the published network.  model: options of
    `config.model` that are given instead.  Raises UserError as `read`, for weights of no known network, and for latents
    of another convention than the config's; it names the source.
    """
    found = read(source, choice)
    with naming(source):
        given = config if config is not None else found.config
        metadata = {} if found.latents is None else {"latents": found.latents}
        if given is None:
            config = fitting.published_config(found.weights, dict(model))
            convention = fitting.convention_in(str(source), metadata)
            config.latents.update({} if convention is None else convention._asdict())  # pyright: ignore
        else:
            config = copy.deepcopy(given)
            config.model.update(model)  # pyright: ignore
            fitting.check_latents(config, str(source), metadata)
        config, weights = fitting.fit(checks.check(config), found.weights)
    return Network(config, weights, found.kind, given is None)


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
            try:
                return read(inner, choice)
            except UserError as error:  # the folder is gone when the message is read
                raise UserError(str(error).replace(str(inner), str(path))) from error
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
