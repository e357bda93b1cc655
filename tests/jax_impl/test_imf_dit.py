"""The transformer of improved MeanFlow: layouts, initial state, rotary positions and errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jax_impl.models import imf_dit
from jax_impl.step import build_net
from meanflow.config import options

pytestmark = pytest.mark.usefixtures("optimize_less")
SIZES = {
    "name": "imf_dit", "input_size": 8, "channels": 3, "num_classes": 5, "patch_size": 2, "depth": 2, "head_depth": 1,
    "width": 16, "num_heads": 2, "num_class_tokens": 3, "num_omega_tokens": 1, "num_interval_tokens": 2,
    "num_time_tokens": 2,
}  # fmt: skip


def inputs(dtype=jnp.float32):
    z, t, y = jax.random.normal(jax.random.key(0), (2, 8, 8, 3), dtype), jnp.array([0.5, 1.0], dtype), jnp.array([0, 5])
    return z, t, t / 2, y, 1 + 3 * t, t / 4, 1 - t / 4


def build(**changes):
    """Return the graph definition and fresh parameters of a network of the tiny sizes."""
    config = options.get_config()
    config.model.update(SIZES | changes)
    graphdef, _ = jax.eval_shape(lambda: build_net(config))
    return graphdef, jax.jit(lambda: build_net(config)[1])()


@pytest.fixture(scope="module")
def whole():
    """Return a compiled network in float64 as a function of its inputs, and its parameters, which are zero nowhere."""
    with jax.enable_x64(True):
        graphdef, params = build(compute_dtype="float64")
        leaves, tree = jax.tree.flatten(params)
        keys = jax.random.split(jax.random.key(1), len(leaves))
        normal = [0.3 * jax.random.normal(key, a.shape, a.dtype) for key, a in zip(keys, leaves, strict=True)]
        params = jax.tree.unflatten(tree, normal)
        apply = jax.jit(lambda *args: nnx.merge(graphdef, params)(*args, heads="uv"))

        def net(*args):
            with jax.enable_x64(True):
                return [np.asarray(a) for a in apply(*args)]

        yield net, params


@pytest.fixture
def given():
    """Return inputs in float64."""
    with jax.enable_x64(True):
        yield list(inputs(jnp.float64))


@pytest.mark.parametrize(
    ("dtype", "expected"), [("float32", "float32"), ("bfloat16", "float32"), ("float64", "float64")]
)
def test_dtypes(dtype, expected):
    with jax.enable_x64(expected == "float64"):
        graphdef, params = jax.eval_shape(lambda: build(compute_dtype=dtype))
        assert {str(a.dtype) for a in jax.tree.leaves(params)} == {expected}
        u = jax.eval_shape(lambda params, *args: nnx.merge(graphdef, params)(*args), params, *inputs(expected))
        assert u.dtype == expected and u.shape == (2, 8, 8, 3)


def test_both_outputs_are_zero_at_initialisation():
    graphdef, params = build()
    u, v = jax.jit(lambda *args: nnx.merge(graphdef, params)(*args, heads="uv"))(*inputs())
    assert not u.any() and not v.any()


def test_only_the_length_of_the_interval_is_seen(whole, given):
    net, (z, t, r, *rest) = whole[0], given
    u, _ = net(z, t, r, *rest)
    np.testing.assert_allclose(net(z, t - 0.125, r - 0.125, *rest)[0], u, rtol=1e-10)
    assert np.abs(net(z, t, r - 0.125, *rest)[0] - u).max() > 1e-6


@pytest.mark.parametrize("which", range(3, 7))
def test_every_condition_is_seen_by_both_heads(whole, given, which):
    """Label, scale, start and end of the interval."""
    before = whole[0](*given)
    given[which] = (given[which] + 1) % 6 if which == 3 else given[which] + 0.2
    for a, b in zip(whole[0](*given), before, strict=True):
        assert np.abs(a - b).max() > 1e-6


def test_u_does_not_need_the_head_of_v(whole, given):
    net, params = whole
    graphdef, _ = jax.eval_shape(lambda: build(compute_dtype="float64", v_heads=False))
    flat = nnx.to_flat_state(params)
    trunk = nnx.from_flat_state([(path, a) for path, a in flat if path[0] != "v_heads"])
    u = jax.jit(lambda *args: nnx.merge(graphdef, trunk)(*args))(*given)
    np.testing.assert_allclose(u, net(*given)[0], rtol=1e-10)


def test_rotation_is_the_product_of_complex_numbers():
    with jax.enable_x64(True):
        x = jax.random.normal(jax.random.key(0), (2, 3, 7, 8), jnp.float64)
        cos, sin = imf_dit.rotary_table(7, 8)
        turned = np.asarray(imf_dit.rotate(x, jnp.asarray(cos), jnp.asarray(sin)))
        pairs = np.asarray(x[..., 0::2] + 1j * x[..., 1::2]) * (cos + 1j * sin)
        np.testing.assert_allclose(turned[..., 0::2] + 1j * turned[..., 1::2], pairs, rtol=1e-12)


def test_rotated_products_depend_on_the_distance_of_tokens_alone():
    with jax.enable_x64(True):
        q, k = jax.random.normal(jax.random.key(0), (2, 8), jnp.float64)
        cos, sin = (jnp.asarray(a) for a in imf_dit.rotary_table(9, 8))
        q, k = (imf_dit.rotate(jnp.broadcast_to(a, (1, 1, 9, 8)), cos, sin)[0, 0] for a in (q, k))
        products = np.asarray(q @ k.T)
        for distance in range(-3, 4):
            diagonal = np.diagonal(products, distance)
            np.testing.assert_allclose(diagonal, diagonal[0], rtol=1e-10)


def test_derivatives_pass_queries_and_keys():
    """The official PyTorch code loses them where it rotates."""
    with jax.enable_x64(True):
        graphdef, params = nnx.split(imf_dit.RotaryAttention(8, 2, dtype=jnp.float64, rngs=nnx.Rngs(0)))
        params = jax.tree.map(lambda a: 5 * a.astype(jnp.float64), params)
        cos, sin = (jnp.asarray(a) for a in imf_dit.rotary_table(5, 4))
        x, tangent = jax.random.normal(jax.random.key(0), (2, 1, 5, 8), jnp.float64)
        attend = jax.jit(lambda params, x: nnx.merge(graphdef, params)(x, cos, sin))
        grads = jax.grad(lambda params: jnp.square(attend(params, x)).sum())(params)
        for path, grad in nnx.to_flat_state(grads):
            assert np.abs(grad.get_value()).max() > 1e-6, path
        _, derivative = jax.jvp(lambda x: attend(params, x), (x,), (tangent,))
        ahead, behind = (attend(params, x + h * tangent) for h in (1e-5, -1e-5))
        np.testing.assert_allclose(derivative, (ahead - behind) / 2e-5, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("change", [{"patch_size": 3}, {"num_heads": 3}, {"num_heads": 16}, {"head_depth": 3}])
def test_sizes_that_do_not_fit(change):
    with pytest.raises(ValueError, match="multiple"):
        build(**change)
