"""A method's draws for a whole batch, as each framework has them."""

import jax
import jax.numpy as jnp
import torch

from jax_impl import methods as jax_methods
from meanflow.data import draws
from torch_impl import methods as torch_methods


def in_jax(cfg, shape, seed=0):
    """Return the `Draws` of images of shape (b h w c), floats in JAX's default dtype."""
    drawn = {
        name: jnp.asarray(a, jax.dtypes.canonicalize_dtype(float)) for name, a in draws.draw(cfg, shape, seed).items()
    }
    return jax_methods.METHODS[cfg.name].Draws(**drawn)


def in_torch(cfg, shape, seed=0):
    """Return the `Draws` of images of shape (b c h w)."""
    b, c, h, w = shape
    drawn = {name: torch.from_numpy(a) for name, a in draws.draw(cfg, (b, h, w, c), seed).items()}
    drawn = {name: a.permute(0, 3, 1, 2) if a.ndim == 4 else a for name, a in drawn.items()}
    return torch_methods.METHODS[cfg.name].Draws(**drawn)
