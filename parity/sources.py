"""Reads weights, ours and other people's, into canonical weights.  Nothing that a file holds is ever executed."""

import argparse
import pathlib
import pickle
import re
import struct
import warnings
from typing import Any, NamedTuple

import flax.serialization
import ml_collections
import msgpack
import numpy as np
import torch

from configs.errors import UserError
from data import weight_files
from data.pickles import DAMAGE, Array, Dtype, Record, Scalar
from jax_impl import checkpoints as jax_checkpoints
from parity import directories, entries, pickles
from parity.names import flax_tree_to_canonical
from torch_impl import checkpoints as torch_checkpoints
from torch_impl.weights import SCALARS

# What a PyTorch file may hold beside tensors, each in place of what the name stands for: argparse's Namespace, in which
# trainers keep their arguments, paths among them, and the numbers and arrays of NumPy, as inert records.
INERT: list[Any] = [
    argparse.Namespace,
    (Dtype, "numpy.dtype"), (Record, "numpy.ndarray"),
    *((record, f"numpy.{core}.multiarray.{name}") for core in ("core", "_core")
      for name, record in (("scalar", Scalar), ("_reconstruct", Array))),
    *((Record, f"{module}.{name}") for module in ("pathlib", "pathlib._local")
      for name in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")),
]  # fmt: skip
CANONICAL = "canonical safetensors"  # the kind of a file that convert.py wrote
ESCAPES = re.compile(r"\x1b\[[0-9;]*m")  # that colour a terminal
REFUSED = re.compile(r"GLOBAL (\S+)|unrecognized function (\S+)")


class Source(NamedTuple):
    """Canonical weights and where they come from."""

    weights: dict[str, np.ndarray]
    config: ml_collections.ConfigDict | None  # of a work directory
    kind: str  # with the entry that was read, for messages
    arguments: Any = None  # that the trainer kept in the file


def read(path: pathlib.Path, ema: int | None, prefix: str) -> Source:
    """Read any source that `convert.py` lists.  Raises UserError for one that is none, damaged or unsafe.

    ema: which EMA, -1 for the raw parameters; None: the first EMA, or what there is.  prefix: keep only the names below
    it; '' finds the weights.
    """
    if not path.exists():
        raise UserError(f"there is no {path}")
    if path.is_dir():
        return read_directory(path, ema, prefix)
    kind = weight_files.kind_of(path)
    if kind == "pickle":
        weights, label = pickles.read_network(path, ema)
        return Source(below(weights, prefix), None, named("EDM2 pickle", label))
    if kind == "msgpack":
        return from_flax(read_msgpack(path), ema, prefix, path, "Flax msgpack")
    tree, kind = (
        (weight_files.load(path), CANONICAL if "source" in weight_files.metadata(path) else "safetensors")
        if kind == "safetensors"
        else (read_torch(path), "PyTorch state dict")
    )
    network = entries.choose(below(flatten(tree, "."), prefix) if prefix else tree, ema, ".", path)
    arguments = tree.get("args", tree.get("hyper_parameters"))
    return Source(to_arrays(network.leaves, path), None, named(kind, network.label), arguments)


def named(kind: str, label: str) -> str:
    """Return the kind of a source with the entry that was read, as messages show them."""
    return f"{kind}, its {label}" if label else kind


def read_directory(path: pathlib.Path, ema: int | None, prefix: str) -> Source:
    """Read a work directory of either trainer, or an Orbax checkpoint of official JAX code."""
    for checkpoints, framework in ((torch_checkpoints, "PyTorch"), (jax_checkpoints, "JAX")):
        if (path / checkpoints.DIRECTORY).is_dir():
            config, weights = checkpoints.read_weights(path, ema or 0)
            which = "raw parameters" if ema == -1 else f"EMA {ema or 0} of decay {config.train.ema_decays[ema or 0]}"
            return Source(weights, config, f"{framework} work directory, its {which}")
    return from_flax(directories.read_orbax(path), ema, prefix, path, "Orbax checkpoint")


def read_torch(path: pathlib.Path) -> dict[str, Any]:
    """Return what a PyTorch file holds, a dict: tensors, containers and what `INERT` lists.

    The unpickler refuses anything else; nothing is executed.  Raises UserError.
    """
    try:
        # An open file: by the name of one, torch.load takes it for safetensors.
        with torch.serialization.safe_globals(INERT), warnings.catch_warnings(action="ignore"), path.open("rb") as file:
            loaded = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "Unsupported operand" in str(error):
            raise UserError(
                f"cannot read {path}: it is damaged, or pickled by another protocol than that of torch.save, 2"
            ) from error
        raise UserError(
            f"{path} is refused: it holds {refused(path, error)}, and to make that may run any code.  Save nothing but "
            "state dicts where the file comes from: torch.save({'ema': ema.state_dict()}, FILE)"
        ) from error
    except DAMAGE as error:
        raise UserError(f"cannot read {path} as a PyTorch file: {first_line(error)}") from error
    if not isinstance(loaded, dict):
        raise UserError(f"{path} holds a {type(loaded).__name__}, not a state dict")
    return loaded


def refused(path: pathlib.Path, error: Exception) -> str:
    """Return the names of what PyTorch's unpickler refuses in a file."""
    try:
        with torch.serialization.safe_globals(INERT):
            names = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except (*DAMAGE, struct.error):  # a file of before PyTorch 1.6, or opcodes that it does not know
        names = []
    found = REFUSED.search(ESCAPES.sub("", str(error)))
    names = names or ([next(filter(None, found.groups())).rstrip(".,")] if found else [])
    shown = ", ".join(f"{name!r:.200}" for name in names[:3]) + (f" and {len(names) - 3} more" if names[3:] else "")
    return f"objects of {shown}" if names else "more than tensors"


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
        raise UserError(f"cannot read {path} as a Flax msgpack file: {first_line(error)}") from error
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


def first_line(error: Exception) -> str:
    """Return the first line of a message, without what colours it."""
    return next(iter(ESCAPES.sub("", str(error)).splitlines()), type(error).__name__)
