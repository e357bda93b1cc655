"""Methods, one file per system: draw, loss, sample."""

from jax_impl.methods import decoupled, flow, improved, meanflow

METHODS = {"meanflow": meanflow, "improved": improved, "flow": flow, "decoupled": decoupled}
