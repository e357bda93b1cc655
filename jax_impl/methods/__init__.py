"""Methods, one file per system: draw, loss, sample."""

from jax_impl.methods import improved, meanflow

METHODS = {"meanflow": meanflow, "improved": improved}
