"""The transformer of improved MeanFlow: initial state, dtypes and errors.  What it computes is parity's."""

import jax
import jax.numpy as jnp
import pytest
import tiny
from flax import nnx

from jax_impl.step import abstract_net, build_net

pytestmark = pytest.mark.usefixtures("optimize_less")
SIZES = {
    "name": "imf_dit", "input_size": 8, "channels": 3, "num_classes": 5, "patch_size": 2, "depth": 2, "head_depth": 1,
    "width": 16, "num_heads": 2, "num_class_tokens": 3, "num_omega_tokens": 1, "num_interval_tokens": 2,
    "num_time_tokens": 2,
}  # fmt: skip


def inputs(dtype=jnp.float32):
    z, t, y = jax.random.normal(jax.random.key(0), (2, 8, 8, 3), dtype), jnp.array([0.5, 1.0], dtype), jnp.array([0, 5])
    return z, t, t / 2, y, 1 + 3 * t, t / 4, 1 - t / 4


def build(make=build_net, **changes):
    """Return the graph definition and fresh parameters of a network of the tiny sizes, or what `make` returns."""
    return make(tiny.of_network(SIZES | changes))


@pytest.mark.parametrize(
    ("dtype", "expected"), [("float32", "float32"), ("bfloat16", "float32"), ("float64", "float64")]
)
def test_dtypes(dtype, expected):
    with jax.enable_x64(expected == "float64"):
        graphdef, params = build(abstract_net, compute_dtype=dtype)
        assert {str(a.dtype) for a in jax.tree.leaves(params)} == {expected}
        u = jax.eval_shape(lambda params, *args: nnx.merge(graphdef, params)(*args), params, *inputs(expected))
        assert u.dtype == expected and u.shape == (2, 8, 8, 3)


def test_both_outputs_are_zero_at_initialisation():
    graphdef, params = build()
    u, v = jax.jit(lambda *args: nnx.merge(graphdef, params)(*args, heads="uv"))(*inputs())
    assert not u.any() and not v.any()


@pytest.mark.parametrize("change", [{"patch_size": 3}, {"num_heads": 3}, {"num_heads": 16}, {"head_depth": 3}])
def test_sizes_that_do_not_fit(change):
    with pytest.raises(ValueError, match="multiple"):
        build(**change)
