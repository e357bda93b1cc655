"""EDM2's network: bounds, dtypes, derivatives at the ends and errors.  What it computes is parity's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from jax_impl.models import edm2
from jax_impl.step import abstract_net
from meanflow.errors import UserError

pytestmark = pytest.mark.usefixtures("optimize_less")
SIZES = {
    "name": "edm2", "input_size": 4, "channels": 2, "num_classes": 3, "width": 4, "channel_mult": (1, 2),
    "channel_mult_emb": 2, "channel_mult_noise": 2, "num_blocks": 1, "attn_resolutions": (4,), "head_width": 4,
    "sigma_data": 0.7, "compute_dtype": "float64",
}  # fmt: skip
TIME_MAX = 80 / 81


@pytest.fixture(autouse=True)
def float64():
    """Compute in float64 unless told otherwise."""
    with jax.enable_x64(True):
        yield


def graph(**changes):
    """Return the graph definition and the parameters' shapes of a network of the tiny sizes."""
    config = tiny.of_network(SIZES | changes)
    return abstract_net(config)


def test_activations_are_bounded():
    @jax.jit
    def bounded(x, emb):
        block = edm2.Block(4, 4, 8, "dec", dtype=jnp.float32)
        block.conv_res1.kernel.set_value(jnp.zeros((3, 3, 4, 4)))
        return block(x, emb)

    x = bounded(np.array([1e4, -1e4, 1.0])[:, None, None, None] * np.ones((3, 2, 2, 4)), np.ones((3, 8)))
    assert x[0].min() == 256 and x[1].max() == -256 and abs(x[2]).max() < 10


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_all_times_but_full_noise_are_told_with_their_derivative(dtype):
    times = jnp.asarray([0.5, TIME_MAX, 0.99, 1.0], dtype)
    finite, slope = jax.jvp(edm2.finite_time, (times,), (jnp.ones_like(times),))
    assert finite.tolist() == [*times[:3].tolist(), times[1].item()] and slope.tolist() == [1, 1, 1, 0]
    assert finite.dtype == slope.dtype == dtype


@pytest.mark.parametrize(
    ("dtype", "expected"), [("float32", "float32"), ("bfloat16", "float32"), ("float64", "float64")]
)
def test_dtypes(dtype, expected):
    with jax.enable_x64(expected == "float64"):
        graphdef, shapes = graph(compute_dtype=dtype)
        assert {str(a.dtype) for a in jax.tree.leaves(shapes)} == {expected}
        given = [jax.ShapeDtypeStruct(shape, expected) for shape in ((3, 4, 4, 2), (3,), (3,))]
        net = jax.eval_shape(lambda p, *a: nnx.merge(graphdef, p)(*a), shapes, *given, jax.ShapeDtypeStruct((3,), int))
        assert net.dtype == expected


def test_a_head_width_that_does_not_divide():
    with pytest.raises(UserError, match="model.head_width 3 does not divide the 8 channels of a block"):
        graph(head_width=3, attn_resolutions=())
    graph(head_width=64)  # all of a block that has fewer


def test_normalisation_has_a_derivative_at_zero():
    grad = jax.grad(lambda x: edm2.normalize(x, (1,)).sum())(jnp.zeros((2, 3)))
    assert jnp.isfinite(grad).all()


@pytest.mark.parametrize("changes", [{}, {"interval_embedder": False, "logvar_channels": 6}])
def test_the_ends_of_time_are_finite(changes):
    rng, (graphdef, shapes) = np.random.RandomState(0), graph(channel_mult=(1,), attn_resolutions=(), **changes)
    net = nnx.merge(graphdef, jax.tree.map(lambda a: jnp.asarray(rng.randn(*a.shape)), shapes))
    (z, dz), t, r, y = (
        rng.randn(2, 3, 4, 4, 2),
        np.array([0.0, 1.0, 1.0]),
        np.array([0.0, 0.0, 1.0]),
        np.array([0, 2, 3]),
    )
    push = jax.jit(lambda *given: jax.jvp(lambda *a: net(*a, y), given, (dz, np.ones(3), np.zeros(3))))
    for a in push(z, t, r):
        assert np.isfinite(a).all() and np.abs(a).max() < 100
