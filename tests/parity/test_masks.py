"""Dropout masks are the same in both frameworks, to the bit, however the draws were made."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jax_impl.models import pixels as jax_pixels
from torch_impl.models import pixels as torch_pixels


@pytest.mark.parametrize("prob", [1e-9, 0.2, 0.5, 0.999])
def test_masks_of_the_same_draws(prob):
    draws = np.random.RandomState(0).uniform(size=50).astype(np.float32)
    draws[:2] = 0.0, 1 - 2**-24
    ours = jax_pixels.keep_masks(jnp.asarray(draws), 3000, prob)
    assert np.array_equal(ours, torch_pixels.keep_masks(torch.from_numpy(draws), 3000, prob))


def test_hashes_of_all_bits():
    x = np.random.RandomState(0).randint(2**32, size=10_000, dtype=np.uint32)
    x[:3] = 0, 2**31, 2**32 - 1
    assert np.array_equal(jax_pixels.hash32(jnp.asarray(x)), torch_pixels.hash32(torch.from_numpy(x.astype(np.int64))))
