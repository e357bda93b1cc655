"""Methods, one file per system: draw, loss, sample."""

from torch_impl.methods import meanflow

METHODS = {"meanflow": meanflow}
