"""Reads weights, ours and other people's, into canonical weights.  Nothing that a file holds is ever executed."""

import pathlib
from typing import Any, NamedTuple

import flax.serialization
import ml_collections
import msgpack
import numpy as np
import torch

from jax_impl import checkpoints as jax_checkpoints
from meanflow.commands import snapshots
from meanflow.config import resolve
from meanflow.errors import UserError
from meanflow.weights import edm2_pickles, entries, files, torch_files
from meanflow.weights.names import flax_tree_to_canonical
from meanflow.weights.pickles import Array, Scalar
from parity import directories
from torch_impl import checkpoints as torch_checkpoints
from torch_impl.weights import SCALARS

CANONICAL = "canonical safetensors"  # the kind of a file that convert.py wrote


class Source(NamedTuple):
    """Canonical weights and where they come from."""

    weights: dict[str, np.ndarray]
    config: ml_collections.ConfigDict | None  # of a work directory
    kind: str  # with the entry that was read, for messages
    arguments: Any = None  # that the trainer kept in the file


def read(path: pathlib.Path, ema: int | None, prefix: str, step: int | None = None) -> Source:
    """Read any source that `convert.py` lists.  Raises UserError for one that is none, damaged or unsafe.

    ema: which EMA, -1 for the raw parameters; None: the first EMA, or what there is.  prefix: keep only the names below
    it; '' finds the weights.  step: of a work directory, see its `read_weights`.
    """
    if not path.exists():
        raise UserError(f"there is no {path}")
    if path.is_dir():
        return read_directory(path, ema, prefix, step)
    if step is not None:
        raise UserError(f"--step chooses a checkpoint of a work directory, and {path} is a file")
    kind = files.kind_of(path)
    if kind == "pickle":
        weights, label = edm2_pickles.read_network(path, ema)
        return Source(below(weights, prefix), None, named("EDM2 pickle", label))
    if kind == "msgpack":
        return from_flax(read_msgpack(path), ema, prefix, path, "Flax msgpack")
    tree, kind = (
        (files.load(path), CANONICAL if "source" in files.metadata(path) else "safetensors")
        if kind == "safetensors"
        else (read_torch(path), "PyTorch state dict")
    )
    network = entries.choose(below(flatten(tree, "."), prefix) if prefix else tree, ema, ".", path)
    arguments = tree.get("args", tree.get("hyper_parameters"))
    return Source(to_arrays(network.leaves, path), None, named(kind, network.label), arguments)


def named(kind: str, label: str) -> str:
    """Return the kind of a source with the entry that was read, as messages show them."""
    return f"{kind}, its {label}" if label else kind


def read_directory(path: pathlib.Path, ema: int | None, prefix: str, step: int | None = None) -> Source:
    """Read a work directory of either trainer, or an Orbax checkpoint of official JAX code."""
    kinds = [
        (torch_checkpoints.DIRECTORY, torch_checkpoints, "PyTorch work directory"),
        (jax_checkpoints.DIRECTORY, jax_checkpoints, "JAX work directory"),
    ]
    if (path / resolve.FILE_NAME).is_file():  # snapshots alone are of no framework
        kinds.append((snapshots.DIRECTORY, torch_checkpoints, "work directory"))
    for directory, checkpoints, kind in kinds:
        if (path / directory).is_dir():
            config, weights = checkpoints.read_weights(path, ema or 0, step)
            which = "raw parameters" if ema == -1 else f"EMA {ema or 0} of decay {config.train.ema_decays[ema or 0]}"
            return Source(weights, config, f"{kind}, its {which}")
    return from_flax(directories.read_orbax(path), ema, prefix, path, "Orbax checkpoint")


def read_torch(path: pathlib.Path) -> dict[str, Any]:
    """Return the dict that a PyTorch file holds.  Raises UserError if it holds something else, or is unsafe."""
    loaded = torch_files.load(path)
    if not isinstance(loaded, dict):
        raise UserError(f"{path} holds a {type(loaded).__name__}, not a state dict")
    return loaded


def to_arrays(leaves: dict[str, Any], path: pathlib.Path) -> dict[str, np.ndarray]:
    """Return arrays of tensors, parameters and arrays; scalar gains lose an axis that FSDP needs.  Raises UserError."""
    arrays = {name: to_numpy(value, f"{path}: {name!r}") for name, value in leaves.items()}
    return {n: a.reshape(()) if n.endswith(SCALARS) and a.size == 1 else a for n, a in arrays.items()}


def to_numpy(value: Any, where: str) -> np.ndarray:
    """Return a tensor as an array; half precision becomes float32, which holds it exactly.  Raises UserError."""
    value = value.array() if isinstance(value, Array | Scalar) else value
    if isinstance(value, np.ndarray | np.generic):
        if value.dtype.name.startswith("float8"):
            raise UserError(f"{where} is of {value.dtype}, which needs scales; save float32, bfloat16 or float16")
        return np.asarray(value, np.float32 if value.dtype.name in ("float16", "bfloat16") else None)
    if not isinstance(value, torch.Tensor):
        raise UserError(f"{where} is a {type(value).__name__}, not a tensor; choose the entry by --prefix")
    if type(value) not in (torch.Tensor, torch.nn.Parameter):
        raise UserError(f"{where} is a {type(value).__name__}, of which the whole is needed: gather it before saving")
    if value.layout != torch.strided or value.is_quantized or value.is_meta:
        what = "without values" if value.is_meta else "quantised" if value.is_quantized else f"of {value.layout}"
        raise UserError(f"{where} is {what}; save dense tensors of float32, bfloat16 or float16")
    if value.is_floating_point() and value.dtype not in (torch.float32, torch.float64):
        if value.element_size() != 2:
            raise UserError(f"{where} is of {value.dtype}, which needs scales; save float32, bfloat16 or float16")
        value = value.float()
    return value.detach().resolve_conj().resolve_neg().numpy()


def read_msgpack(path: pathlib.Path) -> dict:
    """Return the tree of a Flax msgpack file: of parameters, or a train state that holds one.  Raises UserError."""
    try:
        tree = flax.serialization.msgpack_restore(path.read_bytes())
    except (OSError, ValueError, TypeError, msgpack.UnpackException) as error:
        raise UserError(f"cannot read {path} as a Flax msgpack file: {torch_files.first_line(error)}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path} is a msgpack file, but its content is not a tree of parameters")
    return tree


def from_flax(tree: dict, ema: int | None, prefix: str, path: pathlib.Path, kind: str) -> Source:
    """Return the canonical weights of an official Flax tree, or of a train state that holds one."""
    network = entries.choose(below(flatten(tree, "/"), prefix) if prefix else tree, ema, "/", path)
    if not network.leaves:
        raise UserError(f"{path} holds no parameters")
    weights = flax_tree_to_canonical(to_arrays(network.leaves, path))
    return Source(weights, None, named(kind, network.label.removesuffix(".net")))


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
