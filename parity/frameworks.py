"""Both implementations behind one set of functions: numpy and NHWC in, numpy and NHWC out.

`with_jax` and `with_torch` mirror each other function by function; nothing here is used by the trainers.
"""

from parity import with_jax, with_torch

FRAMEWORKS = {"jax": with_jax, "torch": with_torch}


def start() -> None:
    """Prepare both for a run: full precision everywhere, and nothing remembered of networks built before."""
    for framework in FRAMEWORKS.values():
        framework.start()
