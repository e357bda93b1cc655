"""FLOPs of one forward of a network, counted without running it."""

import contextlib
import copy
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from torch_impl.methods import METHODS
from torch_impl.step import build_net


def count_forward(config):
    """Return the FLOPs of matmuls and convolutions in a forward of one row: 2 per multiply-add.

    Traces the network with plain attention and computes nothing.
    """
    config = copy.deepcopy(config)
    config.model.compute_dtype = "float32"
    if "attention" in config.model:
        config.model.attention = "plain"
    with torch.device("meta"):
        net = build_net(config).to("meta")
    c, given = config.model, METHODS[config.method.name].sampling_conditions(config.sample)
    counter: Any = FlopCounterMode(display=False)
    tracker: Any = contextlib.nullcontext()  # the default's hooks fail on modules whose parameters need no gradient
    tracker.parents, counter.mod_tracker = ("Global",), tracker
    with counter, torch.no_grad(), torch.device("meta"):
        one = torch.ones(1)
        given = {name: one for name in given} | ({"features": True} if c.get("repa_dims") else {})
        net(torch.ones(1, c.channels, c.input_size, c.input_size), one, one, one.long(), **given)
    return counter.get_total_flops()
