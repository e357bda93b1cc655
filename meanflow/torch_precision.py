"""The precision of PyTorch's float32 matmuls: on recent GPUs, TF32 keeps 10 bits of the mantissa."""

import contextlib
from collections.abc import Iterator


def set_precision(precision: str) -> None:
    """Set the precision of float32 matmuls and convolutions in this process.

    precision: `highest` (full float32) or `default` (TF32 where the device has it), as in train.matmul_precision.
    PyTorch itself starts with full float32 for matmuls, but TF32 for convolutions.
    """
    _set("highest" if precision == "highest" else "high", precision != "highest")


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """Compute in full float32 inside, whatever the process has set."""
    import torch

    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    _set("highest", False)
    try:
        yield
    finally:
        _set(*before)


def _set(matmul, convolutions):
    import torch  # here, because the JAX trainer imports this module and may do without

    torch.set_float32_matmul_precision(matmul)
    torch.backends.cudnn.allow_tf32 = convolutions
