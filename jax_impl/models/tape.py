"""Reuses the forward pass in the JVP: affine layers record their outputs, and the JVP computes only their tangents.

u is wanted on every row, with its gradient; du/dt, without gradient, on the share p of rows with r < t.  A plain JVP
of those rows would compute their u a second time: 2p forwards.  With the record it costs p.

A tape serves one forward and one JVP of one network.  It is passed down as an argument, so no other pass sees it.
"""

import functools
import itertools
from typing import Any

import jax
from flax import nnx
from jax.lax import stop_gradient

from jax_impl.devices import gathered, in_parts, sharded


class Tape:
    """The outputs of a forward's affine layers on the selected rows: by layer name, a list with one entry per call."""

    def __init__(self, select, inputs=()):
        """select: [b ...] -> [k ...], the rows whose tangents are wanted.  inputs: those of the forward."""
        self.select, self.inputs, self.outputs, self.state = select, inputs, {}, "recording"

    def record(self, name, y):
        """Keep the selected rows of y [b ...], without gradient."""
        if name is None:
            raise RuntimeError("an affine layer has no name: end the network's __init__ with name_layers(self)")
        self.outputs.setdefault(name, []).append(self.select(stop_gradient(y)))

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
    for path, module in nnx.iter_modules(net):
        if hasattr(module, "name"):
            module.name = ".".join(map(str, path))  # pyright: ignore


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
    y, shape = tape.read(name), jax.eval_shape(function, x, weight).shape
    if y.shape != shape:
        raise RuntimeError(f"{name} returned {y.shape} on these rows in the forward, but {shape} in the JVP")
    return remembered(function, y, x, weight)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def remembered(function, y, x, weight):
    """Return y = function(x, weight), which is known; its tangent is computed."""
    return y


@remembered.defjvp
def _(function, primals, tangents):
    (y, _, weight), (_, tangent, _) = primals, tangents
    return y, function(tangent, weight)


def in_turn(blocks, tape=None):
    """Yield (block, enter) for the blocks of a network, in the order in which they run; x = enter(x) enters a block.

    In the backward pass, the gradient of a block's parameters is then complete, and reduced over devices, before the
    gradient leaves the block that runs before it.  Otherwise XLA computes the gradients of all parameters last, keeps
    what they need of every block until then, and reduces them when there is nothing left to do meanwhile.
    """
    blocks = list(blocks)
    for i in range(len(blocks)):

        def enter(x, i=i):
            if i + 1 == len(blocks) or under_jvp(tape):
                return x
            graphdef, params = nnx.split(blocks[i + 1])
            x, params = jax.lax.optimization_barrier((x, params))  # the barrier of gradients is what it is for
            blocks[i + 1] = nnx.merge(graphdef, in_parts(params))
            return x

        yield blocks[i], enter


# What a block keeps of its forward for its gradient: the results of what is expensive.  Norms, activations, softmax and
# casts are computed again, which costs less than to write them to memory and read them back.
KEPT = ("dot_general", "conv_general_dilated", "dot_product_attention_fwd_wrapper", "dot_product_attention_fwd")


def rematerialised(forward):
    """Decorate the forward of a block: the backward pass recomputes what the block does not keep.

    It keeps the results of `KEPT`; if its `remat` is set, nothing, so memory holds only what blocks pass to each other.
    Sharded parameters are whole only while the block runs.
    """

    @functools.wraps(forward)
    def whole(self, x, *args, tape=None):
        if not sharded():
            return forward(self, x, *args, tape=tape)
        graphdef, params = nnx.split(self)
        if under_jvp(tape):  # without the barrier, XLA would keep what was gathered for the forward until then
            x, params = jax.lax.optimization_barrier((x, params))
            params = stop_gradient(params)
        return forward(nnx.merge(graphdef, gathered(in_parts(params))), x, *args, tape=tape)

    @functools.wraps(forward)
    def run(self, *args, tape: Any = None):
        if under_jvp(tape):
            return whole(self, *args, tape=tape)
        checkpoint = functools.partial(jax.checkpoint, policy=None if self.remat else keeps)
        if getattr(tape, "state", "closed") == "closed":
            return checkpoint(functools.partial(whole, self))(*args)

        def recorded(*args):
            inner = Tape(tape.select)
            return whole(self, *args, tape=inner), inner.outputs

        y, outputs = checkpoint(recorded)(*args)  # what is traced inside must come out as a result
        for name, calls in outputs.items():
            tape.outputs.setdefault(name, []).extend(calls)
        return y

    return run


def gather_outside_blocks(net):
    """Return the network with whole parameters, see `gathered`, but for those of rematerialised blocks."""
    graphdef, params = nnx.split(net)
    blocks = [path for path, module in nnx.iter_modules(net) if hasattr(module, "remat")]

    def of_block(path, _):
        return any(path[: len(block)] == block for block in blocks)

    inside, outside = nnx.split_state(params, of_block, ...)
    return nnx.merge(graphdef, nnx.merge_state(inside, gathered(outside)))


def keeps(primitive, *_, **__):
    """Return whether a block keeps the result of this primitive; a policy of `jax.checkpoint`."""
    return primitive.name in KEPT
