"""Couplings of a flow model: the data that its ODE makes of given noise, by EDM's deterministic second-order sampler.

The sampler steps in sigma, the noise level of EDM's x = data + sigma noise.  A flow model on the linear path has
z = (1 - t) data + t noise: sigma = t / (1 - t) and x = z / (1 - t).
Source: arXiv:2206.00364, algorithm 1 (without churn) and eq. 5; arXiv:2406.02507 (autoguidance);
Xinxi-Zhang/Re-MeanFlow, reflow.py, edm_forward.
"""

import itertools
from typing import NamedTuple

import torch

from meanflow.errors import UserError
from torch_impl.methods.common import expand, interleave, separate


class Grid(NamedTuple):
    """The noise levels of the sampler, see `sigmas`."""

    steps: int = 32
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0


def sigmas(grid):
    """Return the grid.steps + 1 noise levels: from sigma_max to sigma_min, uniform in sigma^(1/rho), and then 0.

    One step: sigma_max and 0, where the official code divides by zero.  Raises UserError for a grid that does not fall.
    """
    if grid.steps < 1 or not 0 < grid.sigma_min < grid.sigma_max or grid.rho <= 0:
        raise UserError(
            f"{grid}: the sampler needs --steps of at least 1, 0 < --sigma_min < --sigma_max and a --rho above 0"
        )
    first, last = grid.sigma_max ** (1 / grid.rho), grid.sigma_min ** (1 / grid.rho)
    shares = (i / max(grid.steps - 1, 1) for i in range(grid.steps))
    return *((first + share * (last - first)) ** grid.rho for share in shares), 0.0


def denoise(net, x, sigma, y):
    """Return a flow model's estimate of the data, [b c h w] in data units, from x = data + sigma noise, of that shape.

    net: (z, t, r, y) -> v.  sigma: [b], positive.  y: [b] labels.
    """
    t = sigma / (1 + sigma)
    z = x / expand(1 + sigma, x)
    return z - expand(t, x) * net(z, t, t, y)


def couple(net, noise, y, grid, guidance=1.0, guide=None):
    """Return the data [b c h w] that the flow model `net` makes of unit normal noise [b c h w] and labels y [b].

    grid: `Grid`.  guidance: 1 for none.  Guided estimates are D_guide + guidance (D - D_guide), with D_guide that of
    the flow model `guide` for the same labels (autoguidance), or without it that of `net` for no class.
    """

    def estimate(x, sigma):
        sigma = x.new_full((len(x),), sigma)
        if guide is not None:
            d, d_guide = denoise(net, x, sigma, y), denoise(guide, x, sigma, y)
        elif guidance != 1:
            labels = interleave(y, torch.full_like(y, net.num_classes))
            d, d_guide = separate(denoise(net, interleave(x, x), interleave(sigma, sigma), labels), 2)
        else:
            return denoise(net, x, sigma, y)
        return d_guide + guidance * (d - d_guide)

    def slope(x, sigma):
        return (x - estimate(x, sigma)) / sigma

    def heun(x, sigma, to):
        d = slope(x, sigma)
        corrected = (d + slope(x + (to - sigma) * d, to)) / 2
        return x + (to - sigma) * corrected

    *levels, end = sigmas(grid)
    x = levels[0] * noise
    for sigma, to in itertools.pairwise(levels):
        x = heun(x, sigma, to)
    return x + (end - levels[-1]) * slope(x, levels[-1])  # Euler: at sigma 0 there is no slope to correct with
