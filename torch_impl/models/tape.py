"""A forward of all rows that keeps what its affine layers return, and a tangent of some of them that reads it.

u is wanted on every row, with its gradient, and du/dt, without, on a share p of the rows.  A JVP of those rows alone
computes their u too, so that the batch, and its gradient, run in two parts.  Here the forward is one batch; the JVP
takes what affine layers return from it, and computes only their tangents: p forwards more.
"""

import contextlib
import functools

import torch.autograd.forward_ad as forward_ad
from torch.utils.checkpoint import checkpoint

_tape = None  # that of the pass that is running, if it has one


class Tape:
    """What the affine layers of one forward return on the selected rows, in the order of the calls."""

    def __init__(self, select):
        """select: [b ...] -> [k ...], the rows whose tangents will be wanted."""
        self.select, self.outputs, self.replays = select, [], False

    def record(self, y):
        """Keep the selected rows of y [b ...], without their gradient."""
        self.outputs.append(self.select(y.detach()))


@contextlib.contextmanager
def recording(tape):
    """Let affine layers write to the tape."""
    global _tape
    outer, _tape = _tape, tape
    try:
        yield
    finally:
        _tape = outer


@contextlib.contextmanager
def replaying(tape):
    """Let affine layers read from the tape, inside the JVP of the network that wrote it; once."""
    tape.replays = True
    with recording(tape):
        yield


def active():
    """Return the tape of the pass that is running, or None."""
    return _tape


def affine(function, x, weight):
    """Return function(x, weight), which is linear in x [b ...]."""
    if _tape is None:
        return function(x, weight)
    if not _tape.replays:
        y = function(x, weight)
        _tape.record(y)
        return y
    y, tangent = _tape.outputs.pop(0), forward_ad.unpack_dual(x).tangent
    return y if tangent is None else forward_ad.make_dual(y, function(tangent, weight))


def rematerialised(forward):
    """Decorate the forward of a block: where its `remat` is set, nothing in it is kept for the backward pass.

    It is computed again there, and memory is what the blocks hand on to each other.
    """

    @functools.wraps(forward)
    def run(self, *args):
        if not self.remat or (_tape and _tape.replays):
            return forward(self, *args)
        return checkpoint(functools.partial(forward, self), *args, use_reentrant=False)

    return run
