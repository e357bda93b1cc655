"""Methods, one file per system: draw, loss, sample."""

from torch_impl.methods import improved, meanflow

METHODS = {"meanflow": meanflow, "improved": improved}
