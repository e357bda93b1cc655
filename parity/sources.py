"""Reads weights, ours and other people's, into canonical weights.  Nothing that a file holds is ever executed."""

import argparse
import pathlib
import pickle
from typing import Any, NamedTuple

import flax.serialization
import flax.traverse_util
import ml_collections
import msgpack
import numpy as np
import orbax.checkpoint as ocp
import torch

from configs.errors import UserError
from jax_impl import checkpoints as jax_checkpoints
from parity import pickles
from parity.names import flax_tree_to_canonical
from torch_impl import checkpoints as torch_checkpoints
from torch_impl import weights as canonical_files

# Entries of a training checkpoint that hold weights, the one to sample from first.
TORCH_ENTRIES = ("ema", "model", "state_dict")
FLAX_ENTRIES = ("ema_params", "params")
# py-meanflow keeps its network and one more for each EMA in one state dict: net.*, net_ema.*, net_ema1.*, net_ema2.*
SEVERAL_NETWORKS = "net_ema."
# Before every name: of DistributedDataParallel, and of the class around the network in improved MeanFlow.
AROUND = ("module.", "net.")


class Source(NamedTuple):
    """Canonical weights and where they come from."""

    weights: dict[str, np.ndarray]
    config: ml_collections.ConfigDict | None  # of a work directory
    kind: str


def read(path: pathlib.Path, ema: int, prefix: str) -> Source:
    """Read any source that `convert.py` lists.  Raises UserError for one that is none, damaged or unsafe.

    ema: of a work directory, see its `read_weights`, or of a state dict of several networks: 0 net_ema, 1 net_ema1,
    ..., -1 net.  prefix: keep only the names below it; '' finds the weights.
    """
    if not path.exists():
        raise UserError(f"there is no {path}")
    if path.is_dir():
        return read_directory(path, ema, prefix)
    if path.suffix == ".safetensors":
        return Source(below(canonical_files.load(path), prefix), None, "canonical safetensors")
    if path.suffix in (".pt", ".pth"):
        return Source(read_torch(path, ema, prefix), None, "PyTorch state dict")
    if path.suffix == ".pkl":
        return Source(below(pickles.read_network(path), prefix), None, "EDM2 pickle")
    return Source(read_msgpack(path, prefix), None, "Flax msgpack")


def read_directory(path: pathlib.Path, ema: int, prefix: str) -> Source:
    """Read a work directory of either trainer, or an Orbax checkpoint of official JAX code."""
    if (path / torch_checkpoints.DIRECTORY).is_dir():
        config, weights = torch_checkpoints.read_weights(path, ema)
        return Source(weights, config, "PyTorch work directory")
    if (path / jax_checkpoints.DIRECTORY).is_dir():
        config, weights = jax_checkpoints.read_weights(path, ema)
        return Source(weights, config, "JAX work directory")
    return Source(from_flax(read_orbax(path), prefix, path), None, "Orbax checkpoint")


def read_torch(path: pathlib.Path, ema: int, prefix: str) -> dict[str, np.ndarray]:
    """Return the weights of a .pt or .pth file: a state dict, or a checkpoint with one under `TORCH_ENTRIES`.

    Of a state dict of several networks (`SEVERAL_NETWORKS`), those of one, as `read` says.
    The unpickler takes tensors, containers and argparse's Namespace, in which official trainers keep their arguments,
    and refuses anything else.  A prefix of all names that only says what is around the network (`AROUND`) is dropped.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(f"{path} is refused: it holds more than tensors ({first_line(error)})") from error
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        raise UserError(f"cannot read {path} as a PyTorch file: {first_line(error)}") from error
    if not isinstance(loaded, dict):
        raise UserError(f"{path} holds a {type(loaded).__name__}, not a state dict")
    if prefix:
        loaded = below(flatten(loaded, "."), prefix)
    else:
        loaded = next((loaded[entry] for entry in TORCH_ENTRIES if isinstance(loaded.get(entry), dict)), loaded)
    for around in AROUND:
        if all(name.startswith(around) for name in loaded):
            loaded = {name.removeprefix(around): value for name, value in loaded.items()}
    if any(name.startswith(SEVERAL_NETWORKS) for name in loaded):
        chosen = "net." if ema == -1 else f"net_ema{ema or ''}."
        if not any(name.startswith(chosen) for name in loaded):
            there = sorted({name.partition(".")[0] for name in loaded if name.startswith("net")})
            raise UserError(
                f"{path} has no {chosen[:-1]} (--ema {ema}), only {', '.join(there)}: -1 net, 0 net_ema, ..."
            )
        loaded = below(loaded, chosen)
    for name, value in loaded.items():
        if not isinstance(value, torch.Tensor):
            raise UserError(f"{path}: {name!r} is a {type(value).__name__}, not a tensor; choose the entry by --prefix")
    return {name: to_numpy(tensor) for name, tensor in loaded.items()}


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """Return a tensor as an array; half precision becomes float32, which holds it exactly."""
    return (tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor).numpy()


def read_msgpack(path: pathlib.Path, prefix: str) -> dict[str, np.ndarray]:
    """Return the weights of a Flax msgpack file: a tree of parameters, or a train state that holds one."""
    try:
        tree = flax.serialization.msgpack_restore(path.read_bytes())
    except (OSError, ValueError, TypeError, msgpack.UnpackException) as error:
        raise UserError(
            f"{path} is neither .safetensors, .pt, .pth, .pkl nor a Flax msgpack file ({first_line(error)})"
        ) from error
    if not isinstance(tree, dict):
        raise UserError(f"{path} is a msgpack file, but its content is not a tree of parameters")
    return from_flax(tree, prefix, path)


def read_orbax(path: pathlib.Path) -> dict:
    """Return the tree of an Orbax checkpoint directory as numpy arrays, whatever devices it was written on."""
    try:
        handler = ocp.PyTreeCheckpointer()
        metadata: Any = handler.metadata(path.absolute())
        args = map_leaves(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), metadata.item_metadata.tree)
        return handler.restore(path.absolute(), restore_args=args)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is neither a work directory nor an Orbax checkpoint ({first_line(error)})") from error


def map_leaves(function, tree):
    """Map over nested dicts, lists and tuples; anything else is a leaf."""
    if isinstance(tree, dict):
        return {key: map_leaves(function, value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [map_leaves(function, value) for value in tree]
    return function(tree)


def from_flax(tree: dict, prefix: str, path: pathlib.Path) -> dict[str, np.ndarray]:
    """Return the canonical weights of an official Flax tree, or of a train state that holds one."""
    if prefix:
        return flax_tree_to_canonical(below(flatten(tree, "/"), prefix))
    tree = next((tree[entry] for entry in FLAX_ENTRIES if entry in tree), tree)
    flat = flatten(tree, "/")
    if not flat:
        raise UserError(f"{path} holds no parameters")
    return flax_tree_to_canonical(flat)


def flatten(tree: dict, separator: str) -> dict:
    """Return {joined path: leaf} of nested dicts."""
    flat = {}
    for key, value in tree.items():
        nested = flatten(value, separator) if isinstance(value, dict) else None
        flat |= {f"{key}{separator}{rest}": leaf for rest, leaf in nested.items()} if nested else {str(key): value}
    return flat


def below(flat: dict, prefix: str) -> dict:
    """Return the entries whose names begin with `prefix`, without it.  Raises UserError if there are none."""
    chosen = {name.removeprefix(prefix): value for name, value in flat.items() if name.startswith(prefix)}
    if not chosen:
        some = ", ".join(sorted(flat)[:3])
        raise UserError(f"no name begins with --prefix {prefix!r}; there are {some}, ... ({len(flat)} in all)")
    return chosen


def first_line(error: Exception) -> str:
    """Return the first line of a message."""
    return next(iter(str(error).splitlines()), type(error).__name__)
