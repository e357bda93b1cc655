"""Reads directories of weights into canonical weights: runs of either framework, and Orbax checkpoints."""

import json
import pathlib
from typing import Any

import numpy as np
import orbax.checkpoint as ocp

from jax_impl import checkpoints as jax_checkpoints
from meanflow.commands import snapshots
from meanflow.config.workdir import FILE_NAME
from meanflow.errors import UserError
from meanflow.weights import files
from meanflow.weights.sources import Source, from_flax
from torch_impl import checkpoints as torch_checkpoints

ORBAX = ("_METADATA", "manifest.ocdbt")  # a file in a tree that Orbax saved, current or old
DEPTH = 2  # of the items of a step, in a directory of steps
NEITHER = "is neither a work directory nor an Orbax checkpoint"


def read_directory(path: pathlib.Path, ema: int | None = None, prefix: str = "", step: int | None = None) -> Source:
    """Read a work directory of either trainer, or an Orbax checkpoint of official JAX code.

    ema, prefix: see `meanflow.weights.sources.read`.  step: of a work directory, see its `read_weights`.
    Raises UserError.
    """
    kinds = [
        (torch_checkpoints.DIRECTORY, torch_checkpoints, "PyTorch work directory"),
        (jax_checkpoints.DIRECTORY, jax_checkpoints, "JAX work directory"),
    ]
    if (path / FILE_NAME).is_file():  # snapshots alone belong to no framework
        kinds.append((snapshots.DIRECTORY, torch_checkpoints, "work directory"))
    for directory, checkpoints, kind in kinds:
        if (path / directory).is_dir():
            config, weights = checkpoints.read_weights(path, ema or 0, step)
            which = "raw parameters" if ema == -1 else f"EMA {ema or 0} of decay {config.train.ema_decays[ema or 0]}"
            return Source(weights, f"{kind}, its {which}", config)
    return from_flax(read_orbax(path), ema, prefix, path, "Orbax checkpoint")


def read_orbax(path: pathlib.Path) -> dict:
    """Return the tree of an Orbax checkpoint as numpy arrays, whatever devices it was written on.

    path: its directory, or one above that holds no other.  Raises UserError.
    """
    path = orbax_in(path)
    try:
        handler = ocp.PyTreeCheckpointer()
        metadata: Any = handler.metadata(path.absolute())
        if metadata.item_metadata is None:
            raise ValueError("Orbax finds no tree of arrays in it")
        args = map_leaves(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), metadata.item_metadata.tree)
        tree = handler.restore(path.absolute(), restore_args=args)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"cannot read {path} as an Orbax checkpoint, it may be damaged: {reason}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path} is an Orbax checkpoint, but its content is not a tree of parameters")
    return tree


def map_leaves(function, tree):
    """Map over nested dicts, lists and tuples; anything else is a leaf."""
    if isinstance(tree, dict):
        return {key: map_leaves(function, value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [map_leaves(function, value) for value in tree]
    return function(tree)


def orbax_in(path: pathlib.Path) -> pathlib.Path:
    """Return the directory of the only Orbax checkpoint in `path`.  Raises UserError saying what is there instead."""
    for part in (path, *path.parents[:2]):
        if part.name == "checkpoints" and (part.parent / FILE_NAME).is_file():
            raise UserError(f"{path} is inside a work directory: name that, {part.parent}")
    level = [path]
    for _ in range(DEPTH + 1):
        found = [d for d in level if any((d / name).is_file() for name in ORBAX)]
        if len(found) == 1:
            return found[0]
        if found:
            raise UserError(f"{path} holds several Orbax checkpoints: name one, {listed(found)}")
        level = [child for d in level for child in sorted(d.iterdir()) if child.is_dir()]
    raise UserError(f"{path} {NEITHER}: {what_is(path)}")


def what_is(path: pathlib.Path) -> str:
    """Return what a directory with no checkpoint of ours or of Orbax is, and what to do."""
    names = {child.name for child in path.iterdir()}
    if not names:
        return "it is empty"
    if ".metadata" in names or any(name.endswith(".distcp") for name in names):
        return (
            "it is a checkpoint of torch.distributed; make it one file first:  "
            f"python -m torch.distributed.checkpoint.format_utils dcp_to_torch {path} FILE.pt"
        )
    kind = class_of(path)
    if "model_index.json" in names or kind:
        return f"diffusers saved it ({kind or 'a pipeline'}); from diffusers only autoencoders are read, by latents.vae"
    if any(name.endswith(".index.json") for name in names):
        return "its weights are split over several files, which is not supported; save them in one"
    weights = [child for child in sorted(path.iterdir()) if child.is_file() and holds_weights(child)]
    if weights:
        return f"name the file of weights in it, {listed(weights)}"
    if "config.json" in names:
        return "it has a config.json, but neither checkpoints/jax nor checkpoints/torch: the run has not saved yet"
    return f"it has neither checkpoints/jax, checkpoints/torch nor {ORBAX[0]}, here or in a directory below"


def class_of(path: pathlib.Path) -> str:
    """Return the class named in a config.json of diffusers, '' if there is none."""
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ""
    return str(config.get("_class_name", "")) if isinstance(config, dict) else ""


def holds_weights(path: pathlib.Path) -> bool:
    """Return whether a file is one that `convert.py` reads, judged by its content."""
    try:
        return bool(files.kind_of(path))
    except UserError:
        return False


def listed(paths: list[pathlib.Path]) -> str:
    """Return up to three paths, for messages."""
    return " or ".join(map(str, paths[:3])) + (f" ({len(paths)} in all)" if paths[3:] else "")
