"""Couplings of a flow model: the data its ODE maps given noise to, by EDM's deterministic second-order sampler.

The sampler steps in sigma, the noise level of EDM's x = data + sigma noise.  A flow model on the linear path has
z = (1 - t) data + t noise: sigma = t / (1 - t) and x = z / (1 - t).
Source: arXiv:2206.00364, algorithm 1 (without churn) and eq. 5; arXiv:2406.02507 (autoguidance);
Xinxi-Zhang/Re-MeanFlow, reflow.py, edm_forward.
"""

import jax
import jax.numpy as jnp

from jax_impl.methods.common import expand, interleave, separate


def denoise(net, x, sigma, y):
    """Return a flow model's estimate of the data, [b h w c] in data units, from x = data + sigma noise, of that shape.

    net: (z, t, r, y) -> v.  sigma: [b], positive.  y: [b] labels.
    """
    t = sigma / (1 + sigma)
    z = x / expand(1 + sigma, x)
    return z - expand(t, x) * net(z, t, t, y)


def couple(net, noise, y, sigmas, guidance=1.0, guide=None):
    """Return the data [b h w c] that the flow model `net` makes from unit normal noise [b h w c] and labels y [b].

    sigmas: noise levels, decreasing to 0, see `meanflow.sampling.edm`.  guidance: 1 for none, otherwise the estimates
    are D_guide + guidance (D - D_guide), where D_guide is that of the flow model `guide` for the same labels
    (autoguidance) or, without one, that of `net` without class.
    """

    def estimate(x, sigma):
        sigma = jnp.full(len(x), sigma, x.dtype)
        if guide is not None:
            d, d_guide = denoise(net, x, sigma, y), denoise(guide, x, sigma, y)
        elif guidance != 1:
            labels = interleave(y, jnp.full_like(y, net.num_classes))
            d, d_guide = separate(denoise(net, interleave(x, x), interleave(sigma, sigma), labels), 2)
        else:
            return denoise(net, x, sigma, y)
        return d_guide + guidance * (d - d_guide)

    def slope(x, sigma):
        return (x - estimate(x, sigma)) / sigma

    def heun(x, levels):
        sigma, to = levels
        d = slope(x, sigma)
        corrected = (d + slope(x + (to - sigma) * d, to)) / 2
        return x + (to - sigma) * corrected, None

    *levels, end = sigmas
    levels = jnp.asarray(levels, noise.dtype)
    x, _ = jax.lax.scan(heun, levels[0] * noise, (levels[:-1], levels[1:]))
    return x + (end - levels[-1]) * slope(x, levels[-1])  # Euler: at sigma 0 there is no slope to correct with
