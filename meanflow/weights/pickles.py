"""Reads pickled arrays and tensors of other people without running anything that the pickles hold.

NumPy's and PyTorch's own reconstruction is not called either, as it trusts what it is given: the few names of `NAMES`
become inert records, of which arrays are made; a pickle with any other name is refused.
"""

import io
import pickle
import pickletools
from typing import Any

import numpy as np

from meanflow.errors import UserError

# Opcodes that refer to what is not in the pickle: the extension registry, objects and buffers of the reader.
OUTSIDE = {"EXT1", "EXT2", "EXT4", "PERSID", "BINPERSID", "NEXT_BUFFER", "READONLY_BUFFER"}
PUTS = {"PUT", "BINPUT", "LONG_BINPUT"}
# What a pickle that is cut off or altered can raise.
DAMAGE = (
    pickle.UnpicklingError, AssertionError, AttributeError, EOFError, ImportError, LookupError, MemoryError, OSError,
    OverflowError, RuntimeError, TypeError, ValueError,
)  # fmt: skip
DEPTH = 3  # of dicts in dicts
KINDS = {"b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8"}  # no objects, which would be unpickled


class Record:
    """An inert object in place of one of a pickle: what was called with these arguments, and its state.

    Opcodes that alter a class, not an object, fail on it.
    """

    __slots__ = ("args", "state")

    def __new__(cls, *args: Any):
        record = super().__new__(cls)
        record.args, record.state = args, None
        return record

    def __setstate__(self, state: Any) -> None:
        self.state = state


class Encoded(Record):
    """A call of `_codecs.encode`: bytes, before protocol 3."""

    __slots__ = ()


class Storage(Record):
    """A call of `torch.storage._load_from_bytes`."""

    __slots__ = ()


class Dtype(Record):
    """A call of `numpy.dtype`."""

    __slots__ = ()


class Array(Record):
    """A call of NumPy's `_reconstruct`, whose content is its state."""

    __slots__ = ()

    def array(self) -> np.ndarray:
        """Return the array.  Raises what `DAMAGE` lists for content that is none."""
        _, shape, dtype, by_columns, content = self.state
        return _filled(content, dtype, shape, "F" if by_columns else "C")


class Scalar(Record):
    """A call of NumPy's `scalar`."""

    __slots__ = ()

    def array(self) -> np.ndarray:
        """Return the array, of no axes.  Raises what `DAMAGE` lists for content that is none."""
        dtype, content = self.args
        return _filled(content, dtype, (), "C")


class Buffer(Record):
    """A call of NumPy's `_frombuffer`."""

    __slots__ = ()

    def array(self) -> np.ndarray:
        """Return the array.  Raises what `DAMAGE` lists for content that is none."""
        content, dtype, shape, order = self.args
        return _filled(content, dtype, shape, order)


class Tensor(Record):
    """A call of `torch._utils._rebuild_tensor_v2`."""

    __slots__ = ()

    def array(self) -> np.ndarray:
        """Return the array, of bfloat16 in float32.  Raises what `DAMAGE` lists for content that is none."""
        import torch  # NumPy's arrays do without

        storage, offset, size, stride = self.args[:4]
        if not isinstance(storage, Storage):
            raise ValueError("a tensor without a storage")
        flat = elements(_bytes(*storage.args))
        view = flat.as_strided(size, stride, offset)
        if view.numel() > flat.numel():
            raise ValueError("a tensor of more elements than its storage")
        return (view.float() if view.dtype == torch.bfloat16 else view).contiguous().numpy()


# By module and name, all that a pickle may call.
NAMES: dict[tuple[str, str], Any] = {
    **{name: dict for name in (("collections", "OrderedDict"), ("dnnlib.util", "EasyDict"))},
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


class InertUnpickler(pickle.Unpickler):
    """Makes plain data and records; imports nothing, calls nothing of the pickle's."""

    def find_class(self, module: str, name: str) -> Any:
        """Return what stands for a name.  Raises UserError, without saying where, if it is not in `NAMES`."""
        if (module, name) not in NAMES:
            called = f"{module}.{name}"
            raise UserError(f"is refused: it calls {called!r:.200}, which no array needs")
        return NAMES[module, name]


def loads(content: bytes, where: str) -> Any:
    """Return what a pickle holds: a number, text, an array, or a dict of these or of such dicts; tensors become arrays.

    where: what the pickle is, for messages.  Raises UserError for one that is damaged, unsafe or holds something else.
    """
    try:
        check_opcodes(content)
        whole = InertUnpickler(io.BytesIO(content)).load()
        return _plain(whole)
    except UserError as error:
        raise UserError(f"{where} {error}.  Have its maker save plain arrays") from error
    except DAMAGE as error:
        raise UserError(f"cannot read {where} as a pickle of arrays: {error!r:.200}.  Copy it again") from error


def check_opcodes(content: bytes) -> None:
    """Raise UserError for opcodes that refer outside of the pickle, ValueError for claims of more than it can hold.

    The C unpickler would take an extension that was used before without asking, and allocates what an opcode claims.
    """
    for count, (opcode, arg, _) in enumerate(pickletools.genops(content)):
        if opcode.name in OUTSIDE:
            raise UserError(f"is refused: its opcode {opcode.name} refers to what is not in the file")
        if opcode.name in PUTS and arg is not None and arg > count:
            raise ValueError(f"memo {arg} after {count} opcodes")


def elements(content: bytes) -> Any:
    """Return the flat tensor of the bytes of a storage.  Raises what `DAMAGE` lists for others."""
    import torch  # NumPy's arrays do without

    loaded = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    if not isinstance(loaded, torch.storage.TypedStorage):
        raise ValueError(f"its storage is a {type(loaded).__name__}")
    flat = torch.empty(0, dtype=loaded.dtype).set_(loaded)
    # Its elements end the bytes of a storage.  One that leaves them out would be memory that nothing was read into.
    if flat.untyped_storage().nbytes() > len(content) or not content.endswith(flat.view(torch.uint8).numpy().tobytes()):
        raise ValueError("its storage lacks elements")
    return flat


def _filled(content: Any, dtype: Any, shape: Any, order: str) -> np.ndarray:
    """Return an array of its bytes.  Raises ValueError for other than plain numbers."""
    kind, byte_order = (dtype.args[0], dtype.state[1]) if isinstance(dtype, Dtype) else ("", "")
    if kind not in KINDS or byte_order not in ("<", ">", "|", "="):
        raise ValueError(f"an array of {kind!r:.40}, not of numbers")
    return np.frombuffer(_bytes(content), np.dtype(kind).newbyteorder(byte_order)).reshape(shape, order=order)


def _bytes(content: Any) -> bytes:
    """Return what was pickled as bytes, a bytearray or `Encoded`.  Raises ValueError for anything else."""
    if isinstance(content, Encoded) and content.args[1:] == ("latin1",):
        return content.args[0].encode("latin1")
    if not isinstance(content, bytes | bytearray):
        raise ValueError(f"a {type(content).__name__} where bytes belong")
    return bytes(content)


def _plain(value: Any, depth: int = 0) -> Any:
    """Return a value without records.  Raises ValueError for a container, and for dicts deeper than `DEPTH`."""
    if isinstance(value, dict) and depth < DEPTH:
        return {key: _plain(entry, depth + 1) for key, entry in value.items()}
    if isinstance(value, Array | Scalar | Buffer | Tensor):
        return value.array()
    if isinstance(value, str | bytes | int | float) or value is None:
        return value
    raise ValueError(f"a {type(value).__name__} among the arrays")
