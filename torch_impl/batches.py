"""Runs a frozen network over any number of images, in batches, on the device of this process."""

from collections.abc import Callable

import numpy as np
import torch

from torch_impl import weights
from torch_impl.devices import choose_device


def in_batches(build: Callable, canonical: dict, function: Callable, batch_size: int) -> Callable:
    """Return run(rows) -> tuple of numpy arrays: the results of function(network, rows) for all rows [n ...].

    build: () -> network.  canonical: its weights.  function: (network, rows) -> tuple of tensors [n ...].
    At most `batch_size` rows are computed at once.  Raises UserError for weights that do not fit.
    """
    with torch.device("meta"):  # names and shapes only: all parameters are loaded
        net = build()
    net.load_state_dict(weights.from_canonical(net, canonical), assign=True)
    device = choose_device()
    net = net.to(device).eval().requires_grad_(False)

    @torch.no_grad()
    def run(rows):
        parts = []
        for first in range(0, len(rows), batch_size):
            part = torch.tensor(rows[first : first + batch_size], device=device)
            parts.append([a.cpu().numpy() for a in function(net, part)])
        return tuple(np.concatenate(arrays) for arrays in zip(*parts, strict=True))

    return run
