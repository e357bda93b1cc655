"""The DiT: initial state, dtypes and errors.  What it computes is the parity suite's matter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs import digits
from jax_impl.models.dit import DiT
from jax_impl.step import abstract_net, build_net

pytestmark = pytest.mark.usefixtures("optimize_less")
SIZES = {"input_size": 8, "channels": 3, "num_classes": 5, "patch_size": 2, "depth": 1, "width": 16, "num_heads": 2}


def inputs(dtype=jnp.float32):
    return jnp.ones((2, 8, 8, 3), dtype), jnp.array([0.5, 1.0], dtype), jnp.zeros(2, dtype), jnp.array([0, 5])


def build(make=build_net, **changes):
    """Return a merged network of the tiny sizes; make: the function that builds it from its config."""
    config = digits.get_config()
    seed = changes.pop("seed", 0)
    config.model.update(SIZES | changes)
    config.seed = seed
    return nnx.merge(*make(config))


def test_the_output_is_zero_at_initialisation():
    net = build()
    assert not jax.jit(lambda *args: net(*args))(*inputs()).any()


@pytest.mark.parametrize(
    ("dtype", "expected"), [("float32", "float32"), ("bfloat16", "float32"), ("float64", "float64")]
)
def test_dtypes(dtype, expected):
    with jax.enable_x64(expected == "float64"):
        net = build(abstract_net, compute_dtype=dtype)
        assert {str(a.dtype) for a in jax.tree.leaves(nnx.state(net))} == {expected}
        graphdef, params = nnx.split(net)
        output = jax.eval_shape(lambda params, *args: nnx.merge(graphdef, params)(*args), params, *inputs(expected))
        assert output.dtype == expected


def test_a_fresh_network_is_a_function_of_the_seed():
    first, same, other = (jax.tree.leaves(nnx.state(build(seed=seed))) for seed in (0, 0, 1))
    assert all(np.array_equal(a, b) for a, b in zip(first, same, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("change", [{"patch_size": 3}, {"num_heads": 3}, {"width": 18, "num_heads": 2}])
def test_sizes_that_do_not_divide(change):
    with pytest.raises(ValueError, match="multiple"):
        DiT(**SIZES | change)
