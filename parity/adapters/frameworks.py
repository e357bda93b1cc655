"""Both implementations behind one set of functions: numpy and NHWC in, numpy and NHWC out."""

import contextlib
from collections.abc import Iterator
from typing import Any

from meanflow.errors import UserError
from parity.adapters import with_jax, with_torch

FRAMEWORKS: dict[str, Any] = {"jax": with_jax.Jax(), "torch": with_torch.Torch()}


def check_gpu() -> None:
    """Raise UserError unless both frameworks see a GPU."""
    blind = [name for name, framework in FRAMEWORKS.items() if not framework.sees_gpu()]
    if blind:
        raise UserError(f"--gpu: no GPU for {' and '.join(blind)}")


@contextlib.contextmanager
def full_precision(platform: str = "cpu") -> Iterator[None]:
    """Prepare both frameworks for a run on a platform, `cpu` or `gpu`, and restore their settings afterwards.

    Enables float64 and full-precision float32; networks compiled before are not reused.
    """
    with contextlib.ExitStack() as stack:
        for framework in FRAMEWORKS.values():
            stack.enter_context(framework.full_precision(platform))
        yield


def forget() -> None:
    """Drop all compiled programs, so that a run can have any number of cases."""
    for framework in FRAMEWORKS.values():
        framework.forget()
