"""Reads PyTorch files of other people: tensors and plain data, nothing that a file holds is ever executed."""

import argparse
import pathlib
import pickle
import re
import struct
import warnings
from typing import Any

from meanflow.errors import UserError
from meanflow.weights.pickles import DAMAGE, Array, Dtype, Record, Scalar

# What a file may hold in addition to what PyTorch's restricted unpickler takes: the arguments that trainers keep, and
# NumPy's numbers and arrays and paths as inert records.
INERT: list[Any] = [
    argparse.Namespace,
    (Dtype, "numpy.dtype"), (Record, "numpy.ndarray"),
    *((record, f"numpy.{core}.multiarray.{name}") for core in ("core", "_core")
      for name, record in (("scalar", Scalar), ("_reconstruct", Array))),
    *((Record, f"{module}.{name}") for module in ("pathlib", "pathlib._local")
      for name in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")),
]  # fmt: skip
ESCAPES = re.compile(r"\x1b\[[0-9;]*m")  # that colour a terminal
REFUSED = re.compile(r"GLOBAL (\S+)|unrecognized function (\S+)")


def load(path: pathlib.Path) -> Any:
    """Return what a PyTorch file holds, tensors on the CPU.  Raises UserError for a damaged or an unsafe one."""
    import torch  # JAX does without

    try:
        # An open file: by a name that ends in .safetensors, torch.load takes it for one.
        with torch.serialization.safe_globals(INERT), warnings.catch_warnings(action="ignore"), path.open("rb") as file:
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "Unsupported operand" in str(error):
            raise UserError(
                f"cannot read {path}: it is damaged, or pickled by another protocol than that of torch.save, 2"
            ) from error
        raise UserError(
            f"{path} is refused: it holds {_refused(path, error)}, and to make that may run any code.  Save nothing "
            "but state dicts where the file comes from: torch.save({'ema': ema.state_dict()}, FILE)"
        ) from error
    except DAMAGE as error:
        advises = "weights_only" in str(error)  # to read it unsafely
        reason = "it is of an old format; save it again" if advises else first_line(error).split(". ")[0]
        raise UserError(f"cannot read {path} as a PyTorch file: {reason}") from error


def first_line(error: Exception) -> str:
    """Return the first line of a message, without what colours it."""
    return next(iter(ESCAPES.sub("", str(error)).splitlines()), type(error).__name__)


def _refused(path: pathlib.Path, error: Exception) -> str:
    """Return the names of what PyTorch's unpickler refuses in a file."""
    import torch

    try:
        with torch.serialization.safe_globals(INERT):
            names = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except (*DAMAGE, struct.error):  # a file of before PyTorch 1.6, or opcodes that it does not know
        names = []
    found = REFUSED.search(ESCAPES.sub("", str(error)))
    names = names or ([next(filter(None, found.groups())).rstrip(".,")] if found else [])
    shown = ", ".join(f"{name!r:.200}" for name in names[:3]) + (f" and {len(names) - 3} more" if names[3:] else "")
    return f"objects of {shown}" if names else "more than tensors"
