"""Reuses the forward pass in the JVP: affine layers record their outputs, and the JVP computes only their tangents.

u is wanted on every row, with its gradient; du/dt, without gradient, on the share p of rows with r < t.  A plain JVP
of those rows would compute their u a second time: 2p forwards.  With the record it costs p.

A tape serves one forward and one JVP of one network.  It is passed down as an argument, so no other pass sees it.
"""

import functools
import itertools
import logging
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts


class Tape:
    """The outputs of a forward's affine layers on the selected rows: by layer name, a list with one entry per call."""

    def __init__(self, select, inputs=()):
        """select: [b ...] -> [k ...], the rows whose tangents are wanted.  inputs: those of the forward."""
        self.select, self.inputs, self.outputs, self.state = select, inputs, {}, "recording"

    def record(self, name, y):
        """Keep the selected rows of y [b ...], without gradient."""
        if name is None:
            raise RuntimeError("an affine layer has no name: end the network's __init__ with name_layers(self)")
        self.outputs.setdefault(name, []).append(self.select(y.detach()))

    def close(self):
        """Stop recording."""
        self.state = "closed"

    def replay(self, inputs):
        """Let the layers read, in the JVP at the selected rows of `inputs`.  Raises RuntimeError for another pass's."""
        if not all(a is b for a, b in itertools.zip_longest(self.inputs, inputs)):
            raise RuntimeError("this tape was recorded at other inputs: pass the one of the same average_velocity")
        self.state = "replaying"

    def read(self, name):
        """Remove and return the output of the layer's next call.  Raises RuntimeError if there is none."""
        if not self.outputs.get(name):
            raise RuntimeError(f"{name} runs in the JVP more often than in the forward that the tape recorded")
        return self.outputs[name].pop(0)

    def finish(self):
        """Stop replaying.  Raises RuntimeError if the JVP left something unread."""
        self.close()
        unread = [name for name, outputs in self.outputs.items() if outputs]
        if unread:
            raise RuntimeError(f"the JVP skipped layers that the tape recorded in the forward: {', '.join(unread)}")


def name_layers(net):
    """Give each affine layer its path in the network as `name`, under which it records."""
    for name, module in net.named_modules():
        if hasattr(module, "name"):
            module.name = name


def under_jvp(tape):
    """Return whether the pass is a JVP that reads the tape, which may be None."""
    return tape is not None and tape.state == "replaying"


def affine(function, x, weight, name, tape):
    """Return function(x, weight), which is linear in x [b ...]; `name` is the layer's on the tape, which may be None.

    Raises RuntimeError if the shape is not that of the forward.
    """
    if tape is None or tape.state == "closed":
        return function(x, weight)
    if tape.state == "recording":
        y = function(x, weight)
        tape.record(name, y)
        return y
    y, tangent = tape.read(name), forward_ad.unpack_dual(x).tangent
    tangent = None if tangent is None else function(tangent, weight)
    shape = (len(x), *y.shape[1:]) if tangent is None else tuple(tangent.shape)
    if tuple(y.shape) != shape:
        raise RuntimeError(f"{name} returned {tuple(y.shape)} on these rows in the forward, but {shape} in the JVP")
    return y if tangent is None else forward_ad.make_dual(y, tangent)


# What a block keeps of its forward for its gradient when it is compiled: the results of what is expensive.  Norms,
# activations, softmax and casts are computed again, which costs less than to write them to memory and read them back.
KEPT = [
    getattr(torch.ops.aten, name).default
    for name in (
        "mm", "addmm", "bmm", "convolution", "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_fused_attention_overrideable",
    )
]  # fmt: skip
# A compiled selection warns of in-place operations, of which blocks have none.
logging.getLogger("torch._higher_order_ops.wrap").addFilter(lambda record: "context_fn" not in record.getMessage())


def rematerialised(forward):
    """Decorate the forward of a block: the backward pass recomputes what the block does not keep.

    Compiled, it keeps the results of `KEPT`, and otherwise what autograd keeps; if its `remat` is set, nothing, so
    memory holds only what blocks pass to each other.
    """

    @functools.wraps(forward)
    def run(self, *args, tape: Any = None):
        if under_jvp(tape) or not (self.remat or torch.compiler.is_compiling()):
            return forward(self, *args, tape=tape)
        again = functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=False)  # nothing in it is random
        if not self.remat:
            again = functools.partial(again, context_fn=functools.partial(create_selective_checkpoint_contexts, KEPT))
        if getattr(tape, "state", "closed") == "closed":
            return again(functools.partial(forward, self), *args)

        def recorded(*args):
            inner = Tape(tape.select)
            return forward(self, *args, tape=inner), inner.outputs

        y, outputs = again(recorded, *args)  # what is recorded inside must come out as a result
        for name, calls in outputs.items():
            tape.outputs.setdefault(name, []).extend(calls)
        return y

    return run
