"""What flow matching's parts promise, beyond what the parity suite compares."""

import jax
import jax.numpy as jnp
import make_draws
import numpy as np
import pytest

from jax_impl.methods import flow
from meanflow.config import options

pytestmark = pytest.mark.usefixtures("optimize_less")


def settings(**changes):
    cfg = options.get_config("dit", "flow").method
    cfg.update(changes)
    return cfg


def draws(batch_size, cfg, seed=0):
    return make_draws.in_jax(cfg, (batch_size, 2, 2, 1), seed)


def test_a_draw_is_a_function_of_its_key_and_no_two_draws_are_the_same():
    cfg = settings(time_sampler="uniform")
    first, same, other = (draws(8, cfg, seed) for seed in (1, 1, 2))
    assert all(np.array_equal(a, b) for a, b in zip(first, same, strict=True))
    assert not any(np.array_equal(a, b) for a, b in zip(first, other, strict=True))
    assert not np.array_equal(first.times, first.drop)


def test_features_of_zero_have_a_derivative():
    grad = jax.grad(lambda a: (flow.unit(a) * jnp.ones_like(a)).sum())(jnp.zeros((2, 3)))
    assert np.isfinite(grad).all()
