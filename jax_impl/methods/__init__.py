"""Methods, one file per system: draw, loss, sample."""

from jax_impl.methods import meanflow

METHODS = {"meanflow": meanflow}
