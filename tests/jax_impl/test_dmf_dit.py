"""The transformer of decoupled MeanFlow, what flow models add to the DiT, and the kernels of attention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from jax_impl import weights
from jax_impl.methods import common
from jax_impl.models import attention
from jax_impl.models.layers import timestep_features
from jax_impl.step import abstract_net, build_net

pytestmark = pytest.mark.usefixtures("optimize_less")
SIZES = {
    "name": "dmf_dit", "input_size": 8, "channels": 3, "num_classes": 5, "patch_size": 4, "depth": 2, "width": 16,
    "num_heads": 2,
}  # fmt: skip
OWN = {"dmf_dit": {"dmf_depth": 1}, "imf_dit": {"head_depth": 1}}  # options of one network alone
FLOW = {"name": "dit", "interval_embedder": False}
REPA = FLOW | {"repa_dims": (6, 7), "repa_depth": 1, "projector_dim": 8}
ROWS = common.Rows(groups=1, flow=0, jvp=2)


@pytest.fixture(autouse=True)
def float64():
    """Compute in float64 unless told otherwise."""
    with jax.enable_x64(True):
        yield


def graph(**changes):
    """Return the graph definition and the parameters' shapes of a network of the tiny sizes, in float64."""
    config = tiny.of_network(
        SIZES | {"compute_dtype": "float64"} | OWN.get(changes.get("name", "dmf_dit"), {}) | changes
    )
    return abstract_net(config)


def some(shapes):
    """Return parameters of such shapes, zero nowhere: those of a name are the same in every network."""
    found = []
    for path, leaf in nnx.to_flat_state(shapes):
        rng = np.random.RandomState(sum(map(ord, weights.canonical_name(path))))
        found.append((path, leaf.replace(jnp.asarray(0.3 * rng.randn(*leaf.shape), leaf.dtype))))
    return nnx.from_flat_state(found)


def compiled(graphdef, **given):
    """Return a function (params, z, t, r, y) -> output."""
    return jax.jit(lambda params, *args: nnx.merge(graphdef, params)(*args, **given))


def inputs(dtype=jnp.float64):
    z = jnp.asarray(np.random.RandomState(0).randn(2, 8, 8, 3), dtype)
    return z, jnp.array([0.5, 1.0], dtype), jnp.array([0.25, 0.5], dtype), jnp.array([0, 5])


def distance(a, b):
    return float(jnp.abs(a - b).max())


def test_the_log_variance_is_zero_at_first_and_then_a_function_of_both_times():
    config = tiny.of_network(SIZES | {"dmf_depth": 1})
    graphdef, shapes = graph()
    _, t, r, _ = inputs()
    assert not nnx.merge(*build_net(config)).log_variance(t, r).any()
    net = nnx.merge(graphdef, some(shapes))
    features = np.concatenate([timestep_features(time, 128) for time in (t, r)], axis=1)
    weight, bias = net.logvar_linear.kernel[...], net.logvar_linear.bias[...]
    np.testing.assert_allclose(net.log_variance(t, r), (features @ weight + bias)[:, 0], rtol=1e-6)
    assert distance(net.log_variance(t, r), net.log_variance(t + 0.1, r)) > 1e-3
    assert distance(net.log_variance(t, r), net.log_variance(t, r + 0.1)) > 1e-3


def test_a_depth_beyond_the_blocks():
    with pytest.raises(ValueError, match="dmf_depth 3 is more than the 2 blocks"):
        graph(dmf_depth=3)


@pytest.mark.parametrize(
    ("dtype", "expected"), [("float32", "float32"), ("bfloat16", "float32"), ("float64", "float64")]
)
def test_dtypes(dtype, expected):
    with jax.enable_x64(expected == "float64"):
        for changes in ({"qk_norm": True}, REPA):
            graphdef, shapes = graph(**changes, compute_dtype=dtype)
            assert {str(a.dtype) for a in jax.tree.leaves(shapes)} == {expected}
            given = {"features": True} if "repa_dims" in changes else {}
            found = jax.eval_shape(compiled(graphdef, **given), shapes, *inputs(expected))
            assert {str(a.dtype) for a in jax.tree.leaves(found)} == {expected}


def test_fused_attention_is_the_plain_one():
    """And so is its gradient, in float32."""
    q, k, v, weight = (jnp.asarray(a, jnp.float32) for a in np.random.RandomState(0).randn(4, 2, 3, 7, 8))

    def loss(q, k, v, kernel):
        return (attention.attend(q, k, v, kernel) * weight).sum()

    out, grads = zip(
        *((attention.attend(q, k, v, kernel), jax.grad(loss, (0, 1, 2))(q, k, v, kernel))
          for kernel in ("plain", "fused")), strict=True,
    )  # fmt: skip
    np.testing.assert_allclose(out[0], out[1], atol=1e-6)
    for plain, fused in zip(*grads, strict=True):
        np.testing.assert_allclose(plain, fused, atol=1e-6)
    by_hand = jax.nn.softmax(jnp.einsum("bhnd,bhmd->bhnm", q, k) / 8**0.5) @ v
    np.testing.assert_allclose(out[1], by_hand, atol=1e-6)


@pytest.mark.parametrize("name", ["dit", "dmf_dit", "imf_dit"])
def test_a_kernel_is_used_where_no_tangent_passes(name, monkeypatch):
    used = []
    for kernel, attend in attention.KERNELS.items():
        monkeypatch.setitem(attention.KERNELS, kernel, lambda *a, k=kernel, f=attend: used.append(k) or f(*a))
    changes = {"name": name, "attention": "fused", "compute_dtype": "float32"}
    graphdef, shapes = graph(**changes)
    told = jnp.ones(2, jnp.float32)
    given = {"omega": told, "t_min": 0 * told, "t_max": told} if name == "imf_dit" else {}

    def derivative(params, z, t, r, y):
        net = nnx.merge(graphdef, params)
        _, tape = common.average_velocity(net, z, t, r, y, given, ROWS)
        assert set(used) == {"fused"} and len(used) >= 2
        used.clear()
        return common.total_derivative(net, z, z, t, r, y, given, ROWS, tape)

    jax.eval_shape(derivative, shapes, *inputs(jnp.float32))
    assert set(used) == {"plain"} and len(used) >= 2


def test_a_fused_network_has_the_plain_derivative():
    (z, t, r, y), derivatives = inputs(jnp.float32), []

    plain, fused = (
        nnx.merge(graphdef, some(shapes))
        for graphdef, shapes in (graph(attention=kernel, compute_dtype="float32") for kernel in ("plain", "fused"))
    )

    @jax.jit
    def derivative_of(net, z, t, r):
        _, tape = common.average_velocity(plain, z, t, r, y, {}, ROWS)
        return common.total_derivative(net, z, jnp.ones_like(z), t, r, y, {}, ROWS, tape)

    for net in (plain, fused):
        derivatives.append(derivative_of(net, z, t, r))
    np.testing.assert_array_equal(*derivatives)
    assert float(jnp.abs(derivatives[0]).max()) > 1e-3
