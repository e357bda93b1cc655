"""Reads and writes canonical weights in safetensors, and recognises other files of weights by their first bytes.

Source: the format of safetensors, https://github.com/huggingface/safetensors#format.
"""

import json
import os
import pathlib
import shlex
import zipfile
from typing import Any

import numpy as np
import safetensors
from safetensors.numpy import save_file

from meanflow.errors import UserError
from meanflow.files import replacing

TYPES = {  # of safetensors, as they are stored
    "F32": "<f4", "F64": "<f8", "F16": "<f2", "BF16": "<u2", "BOOL": "?", "I64": "<i8", "U64": "<u8", "I32": "<i4",
    "U32": "<u4", "I16": "<i2", "U16": "<u2", "I8": "i1", "U8": "u1",
}  # fmt: skip
LONGEST_HEADER = 100_000_000  # of safetensors, in bytes
LEGACY_TORCH = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the magic number that torch.save wrote before 1.6
MAGIC = {  # files that cannot be read as weights, and what to do about them
    b"\x1f\x8b": "compressed by gzip: unpack it first (gunzip)",
    b"\x28\xb5\x2f\xfd": "compressed by zstd: unpack it first (unzstd)",
    b"BZh": "compressed by bzip2: unpack it first (bunzip2)",
    b"\xfd7zXZ\0": "compressed by xz: unpack it first (unxz)",
    b"\x89HDF": "an HDF5 file, which is not read here",
    b"GGUF": "a GGUF file, which is not read here",
    b"version https://git-lfs": "the pointer of a file in Git LFS: fetch the file itself (git lfs pull)",
    b"<": "a web page or XML, not weights: download the file itself",
}
ARCHIVE = "a zip archive that torch.save did not write"
CONVERTED = {  # kinds that python -m parity.convert turns into safetensors
    "torch": "a PyTorch file", "pickle": "a pickle", "msgpack": "a Flax msgpack file",
}  # fmt: skip


def kind_of(path: str | os.PathLike) -> str:
    """Return the kind of a file by its content: safetensors | torch | pickle | msgpack.

    Raises UserError for anything else, saying what it is if known.
    """
    try:
        return _recognised(pathlib.Path(path))
    except ValueError as error:
        raise UserError(f"{path} is {error}") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


def is_archive(path: str | os.PathLike) -> bool:
    """Return whether a file is a .zip that is not itself a file of weights."""
    if not zipfile.is_zipfile(path):
        return False
    try:
        return not _recognised(pathlib.Path(path))
    except ValueError as error:
        return ARCHIVE in str(error)


def _recognised(path: pathlib.Path) -> str:
    """Return the kind of a file.  Raises ValueError that says what else it is, and OSError."""
    with path.open("rb") as file:
        head = file.read(512)
    if not head:
        raise ValueError("empty: copy it again")
    if head[8:9] == b"{" and 2 <= int.from_bytes(head[:8], "little") <= LONGEST_HEADER:
        return "safetensors"
    if head.startswith(b"PK"):
        return _kind_of_zip(path)
    if head.startswith(LEGACY_TORCH):
        return "torch"
    if head[0] == 0x80 and head[1:2] in (b"\2", b"\3", b"\4", b"\5"):  # a protocol
        return "pickle"
    for magic, what in MAGIC.items():
        if head.lstrip().startswith(magic):
            raise ValueError(what)
    if head[257:262] == b"ustar":
        raise ValueError("a tar archive: unpack it first (tar -xf), and name the file in it")
    if 0x81 <= head[0] <= 0x8F or head[0] in (0xDE, 0xDF):  # a non-empty map
        return "msgpack"
    if path.suffix == ".pkl":  # protocols 0 and 1 begin with any opcode
        return "pickle"
    raise ValueError("neither safetensors, a PyTorch file, a pickle nor a Flax msgpack file")


def _kind_of_zip(path: pathlib.Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile:  # truncated; torch.load will say so
        return "torch"
    if any(name.endswith("/constants.pkl") for name in names):
        raise ValueError("a TorchScript archive, a program: save the state dict of the network alone")
    if any(name.endswith("data.pkl") for name in names):
        return "torch"
    raise ValueError(f"{ARCHIVE}; unpack it, and name the file of weights")


def save(path: str | os.PathLike, weights: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    """Atomically write canonical weights and text metadata as safetensors.  Raises UserError if it cannot."""
    # In C order: safetensors writes the memory of an array as it is, whatever its order, without an error.
    arrays = {name: np.asarray(a, order="C") for name, a in weights.items()}
    try:
        with replacing(path) as unfinished:
            save_file(arrays, unfinished, metadata=metadata)
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"cannot write {path}: {error}") from error


def load(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Return the arrays of a safetensors file by name, float16 and bfloat16 as float32.

    They are mapped: the file is read when they are used, and changes to them stay in memory.
    Raises UserError if it is not complete safetensors, or has a type that is not supported, such as float8.
    """
    header, start = _header(path)
    content = np.asarray(np.memmap(path, np.uint8, "c"))
    return {name: _array(path, content[start:], name, entry) for name, entry in header.items()}


def metadata(path: str | os.PathLike) -> dict[str, str]:
    """Return the text metadata of a safetensors file.  Raises UserError if it is not complete safetensors."""
    with _opened(path) as file:
        return file.metadata() or {}


def _opened(path: str | os.PathLike) -> Any:
    """Return the open file, with header and length verified.  Raises UserError."""
    if os.path.isdir(path):
        raise UserError(
            f"cannot read {path} as safetensors: it is a directory.  Name a .safetensors file; python -m "
            "parity.convert writes one from a work directory or another checkpoint"
        )
    try:
        kind = _recognised(pathlib.Path(path))
    except (OSError, ValueError) as error:
        what = error.strerror if isinstance(error, OSError) else f"it is {error}"
        raise UserError(f"cannot read {path} as safetensors: {what}") from error
    if kind in CONVERTED:
        dest = pathlib.Path(path).with_suffix(".safetensors")
        dest = dest if not dest.exists() else dest.with_name(f"{dest.stem}_canonical.safetensors")
        raise UserError(
            f"cannot read {path} as safetensors: it is {CONVERTED[kind]}.  Convert it first:  "
            f"{shlex.join(['python', '-m', 'parity.convert', str(path), str(dest)])}"
        )
    try:
        return safetensors.safe_open(path, "numpy")
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"cannot read {path} as safetensors: {error}") from error


def _header(path: str | os.PathLike) -> tuple[dict[str, Any], int]:
    """Return {name: its dtype, shape and data_offsets} and the position in the file where the data begin."""
    with _opened(path), open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return header, 8 + length


def _array(path: str | os.PathLike, data: np.ndarray, name: str, entry: dict[str, Any]) -> np.ndarray:
    """Return one array of a file whose `data` follow its header.  Raises UserError if its type is not supported."""
    if entry["dtype"] not in TYPES:
        raise UserError(
            f"cannot read {path}: {name} is of type {entry['dtype']}, whose scales only the code that wrote it "
            "knows.  Save it in float32, bfloat16 or float16"
        )
    first, last = entry["data_offsets"]
    array = data[first:last].view(TYPES[entry["dtype"]]).reshape(entry["shape"])
    if entry["dtype"] == "BF16":  # the upper half of a float32
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32) if entry["dtype"] == "F16" else array
