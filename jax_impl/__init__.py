"""The MeanFlow family in JAX and Flax NNX.  `torch_impl` is its twin, file by file."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jax_impl.model import load

__all__ = ["load"]


def __getattr__(name: str) -> Any:
    """Import `load` when it is first asked for: commands do without."""
    if name != "load":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from jax_impl.model import load

    return load
