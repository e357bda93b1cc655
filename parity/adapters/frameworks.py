"""Both implementations behind one set of functions: numpy and NHWC in, numpy and NHWC out."""

import contextlib
from collections.abc import Iterator
from typing import Any

from parity.adapters import with_jax, with_torch

FRAMEWORKS: dict[str, Any] = {"jax": with_jax.Jax(), "torch": with_torch.Torch()}


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Prepare both for a run and put their settings back after it.

    float64 is on, float32 is full float32, and no network that was compiled before is used.
    """
    with contextlib.ExitStack() as stack:
        for framework in FRAMEWORKS.values():
            stack.enter_context(framework.full_precision())
        yield


def forget() -> None:
    """Drop what has been compiled, so that a run may have any number of cases."""
    for framework in FRAMEWORKS.values():
        framework.forget()
