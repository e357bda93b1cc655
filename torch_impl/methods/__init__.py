"""Methods, one file per system: loss, loss_reference and sample; see docs/methods.md."""

from torch_impl.methods import decoupled, flow, improved, meanflow, rectified

METHODS = {"meanflow": meanflow, "improved": improved, "flow": flow, "decoupled": decoupled,
           "rectified": rectified}  # fmt: skip
