"""Reads the networks of official EDM2 pickles (NVlabs/edm2) without running anything that these hold.

Source: NVlabs/edm2, torch_utils/persistence.py.  A network in such a pickle is a call of
`_reconstruct_persistent_obj(meta)`: meta holds the source text of its class, which the official code executes, and the
attributes of the object, in which its modules lie in the same way.  Here the text is passed over.  The pickle becomes
plain data and records of what it calls, for the few names of `RECORDS`; one with any other is refused.  Arrays are then
made from the records, their elements read by PyTorch's loader for weights only.
"""

import io
import pathlib
import pickle
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from meanflow.errors import UserError
from meanflow.weights import entries
from meanflow.weights.pickles import DAMAGE, Encoded, Record, Storage, check_opcodes, elements

# Entries of a pickle that hold a network, the one to sample from first.
ENTRIES = ("ema", "net")


class Persistent(Record):
    """A call of `_reconstruct_persistent_obj`: a network or a part of one."""

    __slots__ = ()


class Tensor(Record):
    """A call of `_rebuild_tensor_v2`."""

    __slots__ = ()


class Parameter(Record):
    """A call of `_rebuild_parameter`."""

    __slots__ = ()


class Set(Record):
    """A call of `set`, before protocol 4."""

    __slots__ = ()


class Mapping(dict):
    """A dict in place of a class derived from it; made empty, as pickles make them."""

    __slots__ = ()

    def __new__(cls):
        return super().__new__(cls)

    def __setstate__(self, state):
        raise pickle.UnpicklingError("a dict with a state")


# By module and name, all that a pickle may call.  Where only a `Record` comes of it, the network does without.
RECORDS = {
    ("torch_utils.persistence", "_reconstruct_persistent_obj"): Persistent,
    ("torch._utils", "_rebuild_tensor_v2"): Tensor,
    ("torch._utils", "_rebuild_parameter"): Parameter,
    ("torch.storage", "_load_from_bytes"): Storage,
    ("dnnlib.util", "EasyDict"): Mapping,
    ("collections", "OrderedDict"): Mapping,
    ("_codecs", "encode"): Encoded,
    **{(module, "set"): Set for module in ("builtins", "__builtin__")},
    **{(module, "bytes"): Record for module in ("builtins", "__builtin__")},
    **{("torch.nn.modules.container", name): Record for name in ("ModuleDict", "ModuleList", "Sequential")},
    **{("torch", name): Record for name in ("device", "Size", "float16", "bfloat16", "float32", "float64", "int64")},
    **{("numpy", name): Record for name in ("dtype", "ndarray")},
    **{
        (f"numpy.{core}.{module}", name): Record
        for core in ("core", "_core")
        for module, name in (("multiarray", "_reconstruct"), ("multiarray", "scalar"), ("numeric", "_frombuffer"))
    },
}


class InertUnpickler(pickle.Unpickler):
    """Makes plain data and records; imports nothing, calls nothing of the pickle's."""

    def __init__(self, content: bytes):
        super().__init__(io.BytesIO(content))

    def find_class(self, module: str, name: str) -> type:
        """Return the class of records for a name.  Raises UserError, without the path, if it is not in `RECORDS`."""
        if (module, name) not in RECORDS:
            called = f"{module}.{name}"
            raise UserError(f"is refused: it calls {called!r:.200}")
        return RECORDS[module, name]


def read_network(path: pathlib.Path, ema: int | None = None) -> entries.Network:
    """Return the parameters and persistent buffers of a pickle's network by their names in its `state_dict()`.

    The network is the pickle itself, or what a dict has under `ENTRIES`; `ema` chooses as in `entries.choose`.  Arrays
    of half precision become float32, which holds them exactly.  Raises UserError for a file that is damaged, unsafe or
    holds no such network.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    arrays, used = {}, set()
    network, label = network_of(unpickle(path, content), path, ema)
    for name, tensor in tensors_of(network, path):
        arrays[name] = to_array(tensor, used, f"{name!r} of {path}")
    if not arrays:
        raise UserError(f"the network of {path} has no parameters")
    return entries.Network(arrays, label)


def unpickle(path: pathlib.Path, content: bytes) -> Any:
    """Return the object of a pickle, made of plain data and records.  Raises UserError."""
    try:
        check_opcodes(content)
        return InertUnpickler(content).load()
    except UserError as error:
        raise UserError(f"{path} {error}, which no EDM2 network needs") from error
    except DAMAGE as error:
        raise UserError(f"cannot read {path} as the pickle of a network: {error!r:.200}") from error


def network_of(whole: Any, path: pathlib.Path, ema: int | None) -> tuple[Record, str]:
    """Return the record of the network and its entry.  Raises UserError if there is none where `ENTRIES` say."""
    if is_module(whole):
        entries.pick([()], ema, path)
        return whole, ""
    items = whole.items() if isinstance(whole, dict) else ()
    networks = {key: value for key, value in items if isinstance(key, str) and is_module(value)}
    known = [(key,) for key in networks if key in ENTRIES or entries.is_average((key,))]
    if known:
        [key] = entries.pick(known, ema, path)
        return networks[key], key
    others = ", ".join(repr(key) for key in networks)
    raise UserError(
        f"{path} holds no network, nor one under {' or '.join(map(repr, ENTRIES))}"
        + (f"; there are others under {others}" if others else "")
    )


def is_module(value: Any) -> bool:
    """Return whether this is the record of a torch.nn.Module."""
    return isinstance(value, Record) and "_modules" in attributes(value)


def attributes(record: Record) -> dict:
    """Return the attributes of a record's object, as far as they are known: those in meta, those that follow, or both.

    See `_reconstruct_persistent_obj`.
    """
    meta = record.args[0] if isinstance(record, Persistent) and len(record.args) == 1 else None
    state = meta.get("state") if isinstance(meta, dict) and meta.get("type") == "class" else None
    return {key: value for part in (state, record.state) if isinstance(part, dict) for key, value in part.items()}


def tensors_of(network: Record, path: pathlib.Path) -> Iterator[tuple[str, Any]]:
    """Yield all parameters and persistent buffers of a network, each with its name.

    Raises UserError for parts that are no modules or that the network has twice, such as one within itself.
    """
    pending, seen = [("", network)], set()
    while pending:
        prefix, module = pending.pop()
        if not is_module(module):
            raise UserError(f"{path} is damaged: {prefix[:-1]!r} of its network is not a module")
        if id(module) in seen:
            raise UserError(f"{path} is damaged: {prefix[:-1]!r} of its network is in it twice")
        seen.add(id(module))
        state = attributes(module)
        try:
            tensors, parts = named(state, "_parameters") | persistent(state), named(state, "_modules")
        except ValueError as error:
            raise UserError(f"{path} is damaged: of {prefix[:-1]!r} of its network, {error}") from error
        yield from ((f"{prefix}{key}", tensor) for key, tensor in tensors.items())
        pending += [(f"{prefix}{key}.", part) for key, part in reversed(parts.items())]


def named(state: dict, kind: str) -> dict[str, Any]:
    """Return a module's parameters, buffers or parts by name, without those that are None.  Raises ValueError."""
    entries = state.get(kind)
    if not isinstance(entries, dict) or any(not isinstance(key, str) or "." in key for key in entries):
        raise ValueError(f"{kind} is not a dict of names")
    return {key: entry for key, entry in entries.items() if entry is not None}


def persistent(state: dict) -> dict[str, Any]:
    """Return a module's buffers but those that its `state_dict()` leaves out.  Raises ValueError."""
    left_out = state.get("_non_persistent_buffers_set", ())  # which PyTorch before 1.6 lacks
    if isinstance(left_out, Set):
        left_out = left_out.args[0] if left_out.args else ()
    if not isinstance(left_out, set | list | tuple):
        raise ValueError("_non_persistent_buffers_set is not a set")
    return {key: buffer for key, buffer in named(state, "_buffers").items() if key not in left_out}


def to_array(tensor: Any, used: set[int], name: str) -> np.ndarray:
    """Return the array of a tensor's record; `used` has the ids of the storages that others took, and gets its own.

    Raises UserError, with the name, for what is no tensor, is not dense, reaches out of its storage or shares it.
    """
    if isinstance(tensor, Parameter) and tensor.args:
        tensor = tensor.args[0]
    if not isinstance(tensor, Tensor) or len(tensor.args) < 4 or not isinstance(tensor.args[0], Storage):
        raise UserError(f"{name} is not a tensor")
    storage, offset, size, stride = tensor.args[:4]
    try:
        view = stored(storage, used).as_strided(size, stride, offset)
        order = sorted(range(view.ndim), key=view.stride, reverse=True)
        if not view.permute(order).is_contiguous():
            raise ValueError(f"size {tuple(size)} and stride {tuple(stride)} are not dense")
        half = view.dtype in (torch.float16, torch.bfloat16)
        return (view.float() if half else view).contiguous().numpy()
    except pickle.UnpicklingError as error:  # of torch.load, whose message tells how to run it
        called = re.search(r"GLOBAL (\S+)", str(error))
        does = f"calls {called[1]!r:.200}" if called else "holds more than numbers"
        raise UserError(f"{name} is refused: its storage {does}") from error
    except DAMAGE as error:
        raise UserError(f"{name} is damaged: {error!r:.200}") from error


def stored(storage: Storage, used: set[int]) -> torch.Tensor:
    """Return the elements of a storage, flat."""
    [content] = storage.args
    encoded = isinstance(content, Encoded)
    if encoded:
        [content, _] = content.args
    if id(content) in used:
        raise ValueError("another tensor has the same storage")
    used.add(id(content))
    content = content.encode("latin1") if encoded else content
    return elements(content)
