"""Reads pickles made by others without running anything they hold: arrays and EDM2's networks.

A pickle may only name what `ARRAYS` or `NETWORKS` lists, and each of these names becomes an inert record.  Nothing is
imported or called, NumPy's and PyTorch's own reconstruction included, since that trusts its arguments.  A pickle with
any other name is refused.
"""

import io
import pickle
import pickletools
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from meanflow.errors import UserError

# Opcodes that refer to something outside the pickle: the extension registry, objects and buffers of the reader.
OUTSIDE = {"EXT1", "EXT2", "EXT4", "PERSID", "BINPERSID", "NEXT_BUFFER", "READONLY_BUFFER"}
PUTS = {"PUT", "BINPUT", "LONG_BINPUT"}
# What reading a truncated or altered pickle can raise.
DAMAGE = (
    pickle.UnpicklingError, AssertionError, AttributeError, EOFError, ImportError, LookupError, MemoryError, OSError,
    OverflowError, RuntimeError, TypeError, ValueError,
)  # fmt: skip
DEPTH = 3  # of nested dicts
KINDS = {"b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8"}  # not objects: those are unpickled


class Record:
    """An inert stand-in for an object of a pickle: the arguments it was called with, and its state.

    Opcodes that would alter a class instead of an object fail on it.
    """

    __slots__ = ("args", "state")

    def __new__(cls, *args: Any):
        record = super().__new__(cls)
        record.args, record.state = args, None
        return record

    def __setstate__(self, state: Any) -> None:
        self.state = state


class Dict(dict):
    """A plain dict, in place of a class derived from it."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("a dict with a state")


class Encoded(Record):
    """A call of `_codecs.encode`: bytes, before protocol 3."""

    __slots__ = ()


class Set(Record):
    """A call of `set`, before protocol 4."""

    __slots__ = ()


class Storage(Record):
    """A call of `torch.storage._load_from_bytes`."""

    __slots__ = ()


class Parameter(Record):
    """A call of `torch._utils._rebuild_parameter`."""

    __slots__ = ()


class Persistent(Record):
    """A call of `torch_utils.persistence._reconstruct_persistent_obj`: a network of EDM2, or a part of one."""

    __slots__ = ()


class Dtype(Record):
    """A call of `numpy.dtype`."""

    __slots__ = ()


class Array(Record):
    """A call of NumPy's `_reconstruct`, with the content in its state."""

    __slots__ = ()

    def array(self) -> np.ndarray:
        """Return the array.  Raises one of `DAMAGE` if the content is not one."""
        _, shape, dtype, by_columns, content = self.state
        return _filled(content, dtype, shape, "F" if by_columns else "C")


class Scalar(Record):
    """A call of NumPy's `scalar`."""

    __slots__ = ()

    def array(self) -> np.ndarray:
        """Return a 0-d array.  Raises one of `DAMAGE` if the content is not one."""
        dtype, content = self.args
        return _filled(content, dtype, (), "C")


class Buffer(Record):
    """A call of NumPy's `_frombuffer`."""

    __slots__ = ()

    def array(self) -> np.ndarray:
        """Return the array.  Raises one of `DAMAGE` if the content is not one."""
        content, dtype, shape, order = self.args
        return _filled(content, dtype, shape, order)


class Tensor(Record):
    """A call of `torch._utils._rebuild_tensor_v2`."""

    __slots__ = ()

    def view(self) -> Any:
        """Return the tensor, a view of its storage.  Raises one of `DAMAGE` if it is not one."""
        storage, offset, size, stride = self.args[:4]
        if not isinstance(storage, Storage):
            raise ValueError("a tensor without a storage")
        return _elements(_bytes(*storage.args)).as_strided(size, stride, offset)

    def array(self) -> np.ndarray:
        """Return the array, bfloat16 as float32.  Raises one of `DAMAGE` if it is not one."""
        view = self.view()
        if view.nbytes > view.untyped_storage().nbytes():
            raise ValueError("a tensor of more elements than its storage")
        return (view.float() if str(view.dtype) == "torch.bfloat16" else view).contiguous().numpy()


# All that a pickle of arrays may call, by module and name.
ARRAYS: dict[tuple[str, str], type] = {
    **dict.fromkeys((("collections", "OrderedDict"), ("dnnlib.util", "EasyDict")), Dict),
    ("_codecs", "encode"): Encoded,
    ("numpy", "dtype"): Dtype,
    ("numpy", "ndarray"): Record,
    ("torch._utils", "_rebuild_tensor_v2"): Tensor,
    ("torch.storage", "_load_from_bytes"): Storage,
    **{
        (f"numpy.{core}.{module}", name): record
        for core in ("core", "_core")
        for module, name, record in (
            ("multiarray", "_reconstruct", Array),
            ("multiarray", "scalar", Scalar),
            ("numeric", "_frombuffer", Buffer),
        )
    },
}
# All that a pickled network of EDM2 may call.  A plain `Record` is something the network's weights do not need.
NETWORKS: dict[tuple[str, str], type] = ARRAYS | {
    ("torch_utils.persistence", "_reconstruct_persistent_obj"): Persistent,
    ("torch._utils", "_rebuild_parameter"): Parameter,
    **{(module, "set"): Set for module in ("builtins", "__builtin__")},
    **{(module, "bytes"): Record for module in ("builtins", "__builtin__")},
    **{("torch.nn.modules.container", name): Record for name in ("ModuleDict", "ModuleList", "Sequential")},
    **{("torch", name): Record for name in ("device", "Size", "float16", "bfloat16", "float32", "float64", "int64")},
}


GETATTR = (("builtins", "getattr"), ("__builtin__", "getattr"))


class Enum(Record):
    """A member of an enumeration, by its value."""


class Member(Record):
    """The same by its name, getattr(enumeration, name), as Python 3.11.0 to 3.11.3 write it."""

    def __new__(cls, *args: Any):
        if len(args) != 2 or args[0] is not Enum or not re.fullmatch("[A-Z][A-Z_]*", str(args[1])):
            raise UserError("is refused: it calls 'builtins.getattr'")
        return super().__new__(cls, *args)


class Matching(dict):
    """Stands for a plain `Record` under every name, MODULE.NAME, that a pattern matches."""

    def __init__(self, pattern: re.Pattern, enums: re.Pattern):
        """enums: matches those that are enumerations, whose members a pickle may get by name."""
        super().__init__()
        self.pattern, self.enums = pattern, enums

    def __contains__(self, name: object) -> bool:
        return isinstance(name, tuple) and (name in GETATTR or bool(self.pattern.fullmatch(".".join(name))))

    def __missing__(self, name: tuple[str, str]) -> type:
        if name in GETATTR:
            return Member
        return Enum if self.enums.fullmatch(".".join(name)) else Record


class InertUnpickler(pickle.Unpickler):
    """Makes plain data and records; imports nothing and calls nothing that the pickle names."""

    def __init__(self, content: bytes, names: Mapping[tuple[str, str], type]):
        super().__init__(io.BytesIO(content))
        self.names = names

    def find_class(self, module: str, name: str) -> type:
        """Return the record that stands for a name.  Raises UserError, without the file's name, if none does."""
        if (module, name) not in self.names:
            called = f"{module}.{name}"
            raise UserError(f"is refused: it calls {called!r:.200}")
        return self.names[module, name]


def loads(content: bytes, where: str) -> Any:
    """Return what a pickle holds: a number, text, an array, or a dict of these or of such dicts; tensors as arrays.

    where: names the pickle in messages.  Raises UserError if it is damaged, unsafe or holds anything else.
    """
    try:
        return _plain(load_records(content, ARRAYS))
    except UserError as error:
        raise UserError(f"{where} {error}, which no array needs.  Have its maker save plain arrays") from error
    except DAMAGE as error:
        raise UserError(f"cannot read {where} as a pickle of arrays: {error!r:.200}.  Copy it again") from error


def load_records(content: bytes, names: Mapping[tuple[str, str], type]) -> Any:
    """Return the object of a pickle, made of plain data and records.

    Raises UserError, without the file's name, if the pickle is unsafe, and one of `DAMAGE` if it is damaged.
    """
    # The C unpickler takes extensions that were used before without asking, and allocates what an opcode claims.
    for count, (opcode, arg, _) in enumerate(pickletools.genops(content)):
        if opcode.name in OUTSIDE:
            raise UserError(f"is refused: its opcode {opcode.name} refers to what is not in the file")
        if opcode.name in PUTS and arg is not None and arg > count:
            raise ValueError(f"memo {arg} after {count} opcodes")
    return InertUnpickler(content, names).load()


def _elements(content: bytes) -> Any:
    """Return the elements of a pickled storage as a flat tensor.  Raises one of `DAMAGE` if it is not one."""
    import torch  # NumPy's arrays do without

    loaded = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    if not isinstance(loaded, torch.storage.TypedStorage):
        raise ValueError(f"its storage is a {type(loaded).__name__}")
    flat = torch.empty(0, dtype=loaded.dtype).set_(loaded)
    # The bytes of a storage end with its elements; if they are missing, the tensor would show uninitialised memory.
    if flat.untyped_storage().nbytes() > len(content) or not content.endswith(flat.view(torch.uint8).numpy().tobytes()):
        raise ValueError("its storage lacks elements")
    return flat


def _filled(content: Any, dtype: Any, shape: Any, order: str) -> np.ndarray:
    """Return an array made of its bytes.  Raises ValueError if its elements are not plain numbers."""
    kind, byte_order = (dtype.args[0], dtype.state[1]) if isinstance(dtype, Dtype) else ("", "")
    if kind not in KINDS or byte_order not in ("<", ">", "|", "="):
        raise ValueError(f"an array of {kind!r:.40}, not of numbers")
    return np.frombuffer(_bytes(content), np.dtype(kind).newbyteorder(byte_order)).reshape(shape, order=order)


def _bytes(content: Any) -> bytes:
    """Return the bytes that were pickled as bytes, a bytearray or `Encoded`.  Raises ValueError for anything else."""
    if isinstance(content, Encoded) and content.args[1:] == ("latin1",):
        return content.args[0].encode("latin1")
    if not isinstance(content, bytes | bytearray):
        raise ValueError(f"a {type(content).__name__} where bytes belong")
    return bytes(content)


def _plain(value: Any, depth: int = 0) -> Any:
    """Return a value without records.  Raises ValueError for other containers and for dicts deeper than `DEPTH`."""
    if isinstance(value, dict) and depth < DEPTH:
        return {key: _plain(entry, depth + 1) for key, entry in value.items()}
    if isinstance(value, Array | Scalar | Buffer | Tensor):
        return value.array()
    if isinstance(value, str | bytes | int | float) or value is None:
        return value
    raise ValueError(f"a {type(value).__name__} among the arrays")
