"""Both implementations behind one set of functions: numpy and NHWC in, numpy and NHWC out.

`with_jax` and `with_torch` mirror each other function by function; nothing here is used by the trainers.
"""

import contextlib
from collections.abc import Iterator

from parity.adapters import with_jax, with_torch

FRAMEWORKS = {"jax": with_jax, "torch": with_torch}


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
