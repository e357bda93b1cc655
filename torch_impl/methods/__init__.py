"""Methods, one file per system: draw, loss, sample."""

from torch_impl.methods import decoupled, flow, improved, meanflow

METHODS = {"meanflow": meanflow, "improved": improved, "flow": flow, "decoupled": decoupled}
