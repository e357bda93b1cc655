"""Reads files of weights, ours and other people's, into canonical weights.  Nothing a file holds is ever executed.

A new format needs a kind in `files.kind_of` and an entry in `READERS`.
"""

import argparse
import mmap
import pathlib
import pickle
import re
import struct
import warnings
import zipfile
from typing import Any, NamedTuple

import ml_collections
import numpy as np

from meanflow.config import store
from meanflow.errors import UserError, naming
from meanflow.weights import edm2, entries, files
from meanflow.weights.canonical import SCALARS
from meanflow.weights.names import flax_tree_to_canonical
from meanflow.weights.pickles import ARRAYS, DAMAGE, Array, Record, Scalar

ESCAPES = re.compile(r"\x1b\[[0-9;]*m")  # terminal colours
REFUSED = re.compile(r"GLOBAL (\S+)|unrecognized function (\S+)")  # in messages of PyTorch's unpickler
# What a PyTorch file may hold besides what PyTorch's restricted unpickler accepts: the arguments that trainers keep,
# and NumPy's numbers and arrays and paths as inert records.
TORCH_FILES: list[Any] = [
    argparse.Namespace,
    *((record, ".".join(name)) for name, record in ARRAYS.items() if "numpy" in name[0] and name[1] != "_frombuffer"),
    *((Record, f"{module}.{name}") for module in ("pathlib", "pathlib._local")
      for name in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")),
]  # fmt: skip


class Source(NamedTuple):
    """Canonical weights and where they come from."""

    weights: dict[str, np.ndarray]
    kind: str  # with the entry that was read, for messages
    config: ml_collections.ConfigDict | None = None  # of the run that made them
    latents: str | None = None  # the convention of a model of latents, JSON in the metadata of a safetensors file
    arguments: Any = None  # the options that a trainer kept: a Namespace or a dict
    ours: bool = False  # whether this project wrote them


def read(path: pathlib.Path, ema: int | None = None, prefix: str = "") -> Source:
    """Read a file of weights, its format judged by its content.  Raises UserError if it is damaged or unsafe.

    ema: which EMA, -1 for the raw parameters; if None, the first EMA, or the raw parameters if there is none.  prefix:
    keep only the names that begin with it, without it; if '', the network is found by the names of its parameters.
    """
    return READERS[files.kind_of(path)](path, ema, prefix)


def read_safetensors(path: pathlib.Path, ema: int | None, prefix: str) -> Source:
    """Read canonical weights, which were checked when they were converted, or those of another code."""
    metadata = files.metadata(path)
    canonical = "source" in metadata
    source = from_torch(files.load(path), ema, prefix, path, "canonical safetensors" if canonical else "safetensors")
    config = (
        store.from_json(metadata["config"], f"the config in {path}") if canonical and "config" in metadata else None
    )
    return source._replace(config=config, latents=metadata.get("latents"), ours=canonical)


def read_torch(path: pathlib.Path, ema: int | None, prefix: str) -> Source:
    """Read an official state dict, bare or in a training checkpoint."""
    tree = load_torch(path)
    if not isinstance(tree, dict):
        raise UserError(f"{path} holds a {type(tree).__name__}, not a state dict")
    source = from_torch(tree, ema, prefix, path, "PyTorch state dict")
    return source._replace(arguments=tree.get("args", tree.get("hyper_parameters")))


def read_pickle(path: pathlib.Path, ema: int | None, prefix: str) -> Source:
    """Read an official network of EDM2."""
    weights, label = edm2.read_network(path, ema)
    return Source(below(weights, prefix), named("EDM2 pickle", label))


def read_msgpack(path: pathlib.Path, ema: int | None, prefix: str) -> Source:
    """Read an official Flax tree of parameters, or a train state that holds one."""
    tree = load_msgpack(path)
    if not isinstance(tree, dict):
        raise UserError(f"{path} is a msgpack file, but its content is not a tree of parameters")
    return from_flax_network(choose_flax(tree, ema, prefix, path), path, "Flax msgpack")


def load_msgpack(path: pathlib.Path) -> Any:
    """Return the tree in a Flax msgpack file.  Raises UserError if it is damaged."""
    import flax.serialization
    import msgpack

    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return flax.serialization.msgpack_restore(content)  # pyright: ignore  # which takes any buffer
    except (OSError, ValueError, TypeError, msgpack.UnpackException) as error:
        raise UserError(f"cannot read {path} as a Flax msgpack file: {first_line(error)}") from error


READERS = {"safetensors": read_safetensors, "torch": read_torch, "pickle": read_pickle, "msgpack": read_msgpack}


def from_torch(tree: dict, ema: int | None, prefix: str, path: pathlib.Path, kind: str) -> Source:
    """Return the weights of a state dict, or of a training checkpoint that holds one."""
    network = entries.choose(below(flatten(tree, "."), prefix) if prefix else tree, ema, ".", path)
    return Source(to_arrays(network.leaves, path), named(kind, network.label))


def choose_flax(tree: dict, ema: int | None, prefix: str, path: pathlib.Path) -> entries.Network:
    """Return the network of an official Flax tree, or of a train state that holds one.  Raises UserError."""
    network = entries.choose(below(flatten(tree, "/"), prefix) if prefix else tree, ema, "/", path)
    if not network.leaves:
        raise UserError(f"{path} holds no parameters")
    return network


def from_flax_network(network: entries.Network, path: pathlib.Path, kind: str) -> Source:
    """Return the canonical weights of an official Flax tree, whose leaves are let go one by one."""
    arrays = to_arrays(network.leaves, path)
    network.leaves.clear()
    with naming(path):
        weights = flax_tree_to_canonical(arrays, consume=True)
    return Source(weights, named(kind, network.label.removesuffix(".net")))


def named(kind: str, label: str) -> str:
    """Return the kind of a source and the entry that was read, as messages show them."""
    return f"{kind}, its {label}" if label else kind


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


def to_arrays(leaves: dict[str, Any], path: pathlib.Path) -> dict[str, np.ndarray]:
    """Return tensors, parameters and arrays as arrays, `SCALARS` without axes.  Raises UserError for anything else."""
    arrays = {name: to_numpy(value, f"{path}: {name!r}") for name, value in leaves.items()}
    return {n: a.reshape(()) if n.endswith(SCALARS) and a.size == 1 else a for n, a in arrays.items()}


def to_numpy(value: Any, where: str) -> np.ndarray:
    """Return a tensor as an array, float16 and bfloat16 as float32, which is exact.  Raises UserError."""
    value = value.array() if isinstance(value, Array | Scalar) else value
    if isinstance(value, np.ndarray | np.generic):
        if value.dtype.name.startswith("float8"):
            raise UserError(f"{where} is of {value.dtype}, which needs scales; save float32, bfloat16 or float16")
        return np.asarray(value, np.float32 if value.dtype.name in ("float16", "bfloat16") else None)
    import torch  # NumPy's arrays do without

    if not isinstance(value, torch.Tensor):
        raise UserError(f"{where} is a {type(value).__name__}, not a tensor; choose the entry by --prefix")
    if type(value) not in (torch.Tensor, torch.nn.Parameter):
        raise UserError(f"{where} is a {type(value).__name__}, one part of a tensor: gather it before saving")
    if value.layout != torch.strided or value.is_quantized or value.is_meta:
        what = "without values" if value.is_meta else "quantised" if value.is_quantized else f"of {value.layout}"
        raise UserError(f"{where} is {what}; save dense tensors of float32, bfloat16 or float16")
    if value.is_floating_point() and value.dtype not in (torch.float32, torch.float64):
        if value.element_size() != 2:
            raise UserError(f"{where} is of {value.dtype}, which needs scales; save float32, bfloat16 or float16")
        value = value.float()
    return value.detach().resolve_conj().resolve_neg().numpy()


def load_torch(path: pathlib.Path) -> Any:
    """Return what a PyTorch file holds, tensors on the CPU.  Raises UserError if it is damaged or unsafe."""
    import torch  # JAX does without

    try:
        allowed, unwarned = torch.serialization.safe_globals(TORCH_FILES), warnings.catch_warnings(action="ignore")
        with allowed, unwarned:
            # Of a large training checkpoint only the weights that are used are then read.  torch.load takes a name
            # that ends in .safetensors for that format.
            if zipfile.is_zipfile(path) and path.suffix != ".safetensors":
                return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            with path.open("rb") as file:
                return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "Unsupported operand" in str(error):
            raise UserError(
                f"cannot read {path}: it is damaged, or pickled by another protocol than torch.save's, 2"
            ) from error
        raise UserError(
            f"{path} is refused: it holds {_refused(path, error)}, and building those may run any code.  Save only "
            "state dicts where the file comes from: torch.save({'ema': ema.state_dict()}, FILE)"
        ) from error
    except DAMAGE as error:
        advises = "weights_only" in str(error)  # to read it unsafely
        reason = "it is of an old format; save it again" if advises else first_line(error).split(". ")[0]
        reason += "; it is cut short or damaged: copy it again" if "zip archive" in reason else ""
        raise UserError(f"cannot read {path} as a PyTorch file: {reason}") from error


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, without terminal colours."""
    return next(iter(ESCAPES.sub("", str(error)).splitlines()), type(error).__name__)


def _refused(path: pathlib.Path, error: Exception) -> str:
    """Return the names in a file that PyTorch's unpickler refuses."""
    import torch

    try:
        with torch.serialization.safe_globals(TORCH_FILES):
            names = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except (*DAMAGE, struct.error):  # a file from before PyTorch 1.6, or opcodes that it does not know
        names = []
    found = REFUSED.search(ESCAPES.sub("", str(error)))
    names = names or ([next(filter(None, found.groups())).rstrip(".,")] if found else [])
    shown = ", ".join(f"{name!r:.200}" for name in names[:3]) + (f" and {len(names) - 3} more" if names[3:] else "")
    return f"objects of {shown}" if names else "more than tensors"
