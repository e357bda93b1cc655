"""Finds the network in an official EDM2 pickle (NVlabs/edm2) without running the code that it holds.

Source: NVlabs/edm2, torch_utils/persistence.py.  A network in such a pickle is a call of
`_reconstruct_persistent_obj(meta)`: meta holds the source text of its class, which the official code executes and this
one ignores, and the attributes of the object, among them its modules, pickled in the same way.
"""

import pathlib
import pickle
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from meanflow.errors import UserError
from meanflow.weights import entries, pickles

# Entries of a pickle that hold a network; the first one present is the one to sample from.
ENTRIES = ("ema", "net")


def read_network(path: pathlib.Path, ema: int | None = None) -> entries.Network:
    """Return the parameters and persistent buffers of a pickled network by their names in its `state_dict()`.

    The network is the pickle itself, or what a dict has under `ENTRIES`; `ema` chooses as in `entries.choose`.  float16
    and bfloat16 become float32, which is exact.  Raises UserError if the file is damaged, unsafe or has none.
    """
    arrays, used = {}, set()
    network, label = network_of(unpickled(path), path, ema)
    for name, tensor in tensors_of(network, path):
        arrays[name] = to_array(tensor, used, f"{name!r} of {path}")
    if not arrays:
        raise UserError(f"the network of {path} has no parameters")
    return entries.Network(arrays, label)


def unpickled(path: pathlib.Path) -> Any:
    """Return the object of a pickle, made of plain data and records.  Raises UserError."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    try:
        return pickles.load_records(content, pickles.NETWORKS)
    except UserError as error:
        raise UserError(f"{path} {error}, which no EDM2 network needs") from error
    except pickles.DAMAGE as error:
        raise UserError(f"cannot read {path} as the pickle of a network: {error!r:.200}") from error


def network_of(whole: Any, path: pathlib.Path, ema: int | None) -> tuple[pickles.Record, str]:
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
    return isinstance(value, pickles.Record) and "_modules" in attributes(value)


def attributes(record: pickles.Record) -> dict:
    """Return the attributes of a record's object, as far as they are known: those in meta, those that follow, or both.

    See `_reconstruct_persistent_obj`.
    """
    meta = record.args[0] if isinstance(record, pickles.Persistent) and len(record.args) == 1 else None
    state = meta.get("state") if isinstance(meta, dict) and meta.get("type") == "class" else None
    return {key: value for part in (state, record.state) if isinstance(part, dict) for key, value in part.items()}


def tensors_of(network: pickles.Record, path: pathlib.Path) -> Iterator[tuple[str, Any]]:
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
    if isinstance(left_out, pickles.Set):
        left_out = left_out.args[0] if left_out.args else ()
    if not isinstance(left_out, set | list | tuple):
        raise ValueError("_non_persistent_buffers_set is not a set")
    return {key: buffer for key, buffer in named(state, "_buffers").items() if key not in left_out}


def to_array(tensor: Any, used: set[int], name: str) -> np.ndarray:
    """Return the array of a tensor's record.

    used: ids of the storages that other tensors took; this one's is added.  Raises UserError, with the name, if it is
    not a tensor, is not dense, reaches outside its storage or shares it.
    """
    if isinstance(tensor, pickles.Parameter) and tensor.args:
        tensor = tensor.args[0]
    args = tensor.args if isinstance(tensor, pickles.Tensor) else ()
    if len(args) < 4 or not isinstance(args[0], pickles.Storage):
        raise UserError(f"{name} is not a tensor")
    try:
        [content] = args[0].args
        content = content.args[0] if isinstance(content, pickles.Encoded) else content
        if id(content) in used:
            raise ValueError("another tensor has the same storage")
        used.add(id(content))
        view = tensor.view()
        order = sorted(range(view.ndim), key=view.stride, reverse=True)
        if not view.permute(order).is_contiguous():
            raise ValueError(f"size {tuple(view.shape)} and stride {view.stride()} are not dense")
        return (view.float() if view.element_size() == 2 and view.is_floating_point() else view).contiguous().numpy()
    except pickle.UnpicklingError as error:  # torch.load's message tells how to run it
        called = re.search(r"GLOBAL (\S+)", str(error))
        does = f"calls {called[1]!r:.200}" if called else "holds more than numbers"
        raise UserError(f"{name} is refused: its storage {does}") from error
    except pickles.DAMAGE as error:
        raise UserError(f"{name} is damaged: {error!r:.200}") from error
