"""EDM2's network: what keeps magnitudes, its preconditioning, and the ends of time.  What it computes is parity's."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jax_impl import weights
from jax_impl.models import edm2
from jax_impl.step import abstract_net
from meanflow.config import options
from meanflow.errors import UserError

pytestmark = pytest.mark.usefixtures("optimize_less")
SIZES = {
    "name": "edm2", "input_size": 4, "channels": 2, "num_classes": 3, "width": 4, "channel_mult": (1, 2),
    "channel_mult_emb": 2, "channel_mult_noise": 2, "num_blocks": 1, "attn_resolutions": (4,), "head_width": 4,
    "sigma_data": 0.7, "compute_dtype": "float64",
}  # fmt: skip
ONE_TIME = {"interval_embedder": False, "logvar_channels": 6}
TIME_MAX = 80 / 81


@pytest.fixture(autouse=True)
def float64():
    """Compute in float64 unless told otherwise."""
    with jax.enable_x64(True):
        yield


def graph(**changes):
    """Return the graph definition and the parameters' shapes of a network of the tiny sizes."""
    config = options.get_config()
    config.model.update(SIZES | changes)
    return abstract_net(config)


def some(shapes):
    """Return parameters of such shapes, zero nowhere, gains and frequencies too."""
    rng = np.random.RandomState(0)
    flat = nnx.to_flat_state(shapes)
    return nnx.from_flat_state([(path, leaf.replace(np.asarray(rng.randn(*leaf.shape)))) for path, leaf in flat])


class Heard:
    """A U-Net that keeps what it is given and what it returns."""

    def __init__(self, unet):
        self.unet = unet

    def embed(self, t, r, y):
        self.time = t
        return self.unet.embed(t, r, y)

    def __call__(self, x, emb):
        self.x, self.raw = x, self.unet(x, emb)
        return self.raw


class Network:
    """A tiny network, and compiled what the tests ask of it: to compile little is what makes them fast."""

    def __init__(self, **changes):
        self.graphdef, shapes = graph(**changes)
        self.params = some(shapes)

        def forward(params, tangents, *inputs):
            net = nnx.merge(self.graphdef, params)
            unet = Heard(net.unet)

            def velocity(z, t, r):
                told = SimpleNamespace(unet=unet, interval_embedder=net.interval_embedder, sigma_data=net.sigma_data)
                return edm2.EDM2.__call__(told, z, t, r, inputs[-1]), (unet.time, unet.x, unet.raw)

            return jax.jvp(velocity, inputs[:-1], tangents, has_aux=True)

        self.forward = jax.jit(forward)

    def __call__(self, *inputs, params=None):
        """Return u of z, t, r, y."""
        return np.asarray(self.forward(params or self.params, direction(), *inputs)[0])

    def derivative(self, *inputs):
        """Return du/dt along `direction`."""
        return np.asarray(self.forward(self.params, direction(), *inputs)[1])

    def heard(self, *inputs):
        """Return what the U-Net is given, time and image, and what it returns."""
        return [np.asarray(a) for a in self.forward(self.params, direction(), *inputs)[2]]

    def gradient(self, *inputs):
        """Return the gradient of a sum of its outputs by its parameters."""

        def loss(params):
            return (nnx.merge(self.graphdef, params)(*inputs) * direction()[0]).sum()

        return jax.jit(jax.grad(loss))(self.params)


@pytest.fixture(scope="module")
def networks(optimize_less):
    """Return the network of two times, of two levels, and the one of one time, of one level."""
    with jax.enable_x64(True):
        return {"two": Network(), "one": Network(**ONE_TIME, channel_mult=(2,))}


@pytest.fixture
def net(networks):
    return networks["two"]


def direction():
    """Return tangents of z, t and r."""
    return np.random.RandomState(1).randn(3, 4, 4, 2), np.ones(3), np.zeros(3)


def inputs(t=(0.3, 0.6, 0.9), r=(0.1, 0.6, 0.0)):
    return np.random.RandomState(0).randn(3, 4, 4, 2), np.array(t), np.array(r), np.array([0, 2, 3])


def changed(params, change):
    """Return params with those changed of which change(canonical name, array) is not None."""
    found = []
    for path, leaf in nnx.to_flat_state(params):
        new = change(weights.canonical_name(path), np.asarray(leaf[...]))
        found.append((path, leaf if new is None else leaf.replace(new)))
    return nnx.from_flat_state(found)


def kernels(params):
    """Return {canonical name: weight [... out]} of all convolutions and linear layers."""
    flat = nnx.to_flat_state(params)
    return {weights.canonical_name(path): np.asarray(leaf[...]) for path, leaf in flat if path[-1] == "kernel"}


def root_mean_square(a, axis=None):
    return np.sqrt(np.mean(np.square(a), axis=axis))


def distance(a, b):
    return np.abs(a - b).max()


def test_sums_joins_and_activations_keep_the_magnitude_of_unit_normals():
    rng = np.random.RandomState(0)
    a, b = (rng.randn(8, 32, 32, num) for num in (8, 24))
    x = np.linspace(-10, 10, 20_001)
    squares, density = np.square(edm2.mp_silu(x)), np.exp(-(x**2) / 2) / (2 * np.pi) ** 0.5
    assert float((squares * density).sum() * 1e-3) == pytest.approx(1, abs=3e-3)
    for t in (0.3, 0.5):
        assert root_mean_square(edm2.mp_sum(a, b[..., :8], t)) == pytest.approx(1, abs=0.01)
        joined = edm2.mp_cat(a, b, t)
        assert root_mean_square(joined) == pytest.approx(1, abs=0.01)
        powers = [np.square(part).sum() for part in (joined[..., :8], joined[..., 8:])]
        assert powers[1] / powers[0] == pytest.approx((t / (1 - t)) ** 2, rel=0.02)
    only_b = edm2.mp_sum(0 * b, b, 0.3)
    np.testing.assert_allclose(only_b, 0.3 * b / 0.58**0.5)


@pytest.mark.parametrize("kernel_size", [0, 1, 3])
def test_a_convolution_keeps_the_magnitude_of_unit_normals_whatever_its_weights_are(kernel_size):
    @jax.jit
    def convolve(x):
        layer = edm2.MPConv(16, 8, kernel_size, rngs=nnx.Rngs(0))
        layer.kernel.set_value(layer.kernel[...] * np.arange(1.0, 9.0))
        return layer(x)

    shape = (4000, 16) if not kernel_size else (4, 34, 34, 16)
    x = np.asarray(convolve(np.random.RandomState(0).randn(*shape)))
    x = x[:, 1:-1, 1:-1] if kernel_size else x  # beyond the border are zeros
    assert root_mean_square(x) == pytest.approx(1, abs=0.02)
    np.testing.assert_allclose(root_mean_square(x, tuple(range(x.ndim - 1))), 1, atol=0.06)


def test_normalize_divides_by_the_root_mean_square_but_for_eps():
    x = np.random.RandomState(0).randn(3, 2, 5) * 1e-3
    normalize = jax.jit(edm2.normalize, static_argnums=1)
    for axes in ((2,), (0, 1)):
        np.testing.assert_allclose(normalize(x, axes), x / (1e-4 + np.sqrt((x**2).mean(axes, keepdims=True))))
    assert not np.any(normalize(0 * x, (2,)))
    assert jax.eval_shape(lambda: edm2.normalize(jnp.ones((2, 3), jnp.bfloat16), (1,))).dtype == jnp.float32


def test_resampling():
    x = np.random.RandomState(0).randn(2, 4, 6, 3)
    down, up = edm2.resample(x, "down"), edm2.resample(x, "up")
    assert down.shape == (2, 2, 3, 3) and up.shape == (2, 8, 12, 3) and edm2.resample(x, None) is x
    np.testing.assert_allclose(down[:, 1, 2], x[:, 2:4, 4:6].mean((1, 2)))
    np.testing.assert_array_equal(up, x[:, np.arange(8) // 2][:, :, np.arange(12) // 2])
    np.testing.assert_allclose(edm2.resample(up, "down"), x)


def test_attention_by_hand():
    """Of two heads of two channels, whose queries, keys and values are one channel after another."""
    qkv = np.random.RandomState(0).randn(2, 3, 3, 12)
    found = np.asarray(jax.jit(edm2.attend, static_argnums=1)(qkv, 2)).reshape(2, 9, 2, 2)
    q, k, v = np.moveaxis(qkv.reshape(2, 9, 2, 2, 3), 4, 0)
    q, k, v = (a / (1e-4 + root_mean_square(a, 3)[..., None]) for a in (q, k, v))
    scores = np.exp(np.einsum("bqhc,bkhc->bhqk", q, k) / 2**0.5)
    expected = np.einsum("bhqk,bkhc->bqhc", scores / scores.sum(3, keepdims=True), v)
    np.testing.assert_allclose(found, expected, rtol=1e-10)


def test_activations_are_bounded():
    @jax.jit
    def bounded(x, emb):
        block = edm2.Block(4, 4, 8, "dec", dtype=jnp.float32, rngs=nnx.Rngs(0))
        block.conv_res1.kernel.set_value(jnp.zeros((3, 3, 4, 4)))
        return block(x, emb)

    x = bounded(np.array([1e4, -1e4, 1.0])[:, None, None, None] * np.ones((3, 2, 2, 4)), np.ones((3, 8)))
    assert x[0].min() == 256 and x[1].max() == -256 and abs(x[2]).max() < 10


def test_normalized_weights_stay_as_they_are(net):
    """The first time the epsilon counts as the weights come, then it is the same for all."""
    normalize = jax.jit(edm2.normalize_weights)
    once = normalize(net.params)
    twice = normalize(once)
    thrice = normalize(twice)
    assert len(kernels(once)) > 20
    for (name, a), b, c in zip(kernels(once).items(), kernels(twice).values(), kernels(thrice).values(), strict=True):
        np.testing.assert_allclose(root_mean_square(a, tuple(range(a.ndim - 1))), 1, atol=1e-3, err_msg=name)
        np.testing.assert_allclose(a, b, rtol=1e-3, err_msg=name)
        np.testing.assert_allclose(b, c, rtol=0, atol=1e-7, err_msg=name)
    others = [
        {path: leaf[...] for path, leaf in nnx.to_flat_state(params) if path[-1] != "kernel"}
        for params in (net.params, once)
    ]
    assert others[0].keys() == others[1].keys() and ("unet", "out_gain") in others[0]
    assert all(np.array_equal(a, others[1][path]) for path, a in others[0].items())


def test_only_the_direction_of_a_weight_counts(net):
    u = net(*inputs())
    for name in kernels(net.params):
        scaled, flipped = (
            net(*inputs(), params=changed(net.params, lambda n, a, f=f: a * f if n == name else None))  # noqa: B023
            for f in (3.0, -1.0)
        )
        assert distance(scaled, u) < min(1e-3, distance(flipped, u) / 3), name


def test_gradients_are_tangential_to_the_weights(networks):
    """And random frequencies are never trained."""
    net = networks["one"]
    grads = net.gradient(*inputs())
    of_kernels = kernels(grads)
    for name, w in kernels(net.params).items():
        g, w = (a.reshape(-1, a.shape[-1]) for a in (of_kernels[name], w))
        lengths = np.linalg.norm(g, axis=0) * np.linalg.norm(w, axis=0)
        if name != "logvar_linear.weight":
            assert lengths.max() > 1e-5 and abs((g * w).sum(0)).max() < 1e-3 * lengths.max(), name
    still = {weights.canonical_name(path) for path, leaf in nnx.to_flat_state(grads) if not np.asarray(leaf[...]).any()}
    assert still == {
        "unet.emb_fourier.freqs", "unet.emb_fourier.phases",
        "logvar_fourier.freqs", "logvar_fourier.phases", "logvar_linear.weight",
    }  # fmt: skip


@pytest.mark.parametrize("times", ["two", "one"])
@pytest.mark.parametrize("end", [0.9, TIME_MAX, 0.999])
def test_it_is_the_velocity_of_edm_s_denoiser(networks, times, end):
    """D = c_skip x + c_out F of the state x = z / (1-t) at sigma = t / (1-t), and v = (z - D) / t; beyond 80/81 too."""
    s, (z, t, r, y) = SIZES["sigma_data"], inputs((0.3, 0.6, end))
    sigma = (t / (1 - t))[:, None, None, None]
    x = z * (1 + sigma)
    c_skip, c_out = s**2 / (sigma**2 + s**2), sigma * s / (sigma**2 + s**2) ** 0.5
    c_in, c_noise = 1 / (s**2 + sigma**2) ** 0.5, np.log(sigma[:, 0, 0, 0]) / 4
    time, scaled, raw = networks[times].heard(z, t, r, y)
    np.testing.assert_allclose(time, t if times == "two" else c_noise, rtol=0, atol=1e-12)
    np.testing.assert_allclose(scaled, c_in * x, rtol=0, atol=1e-12)
    v = (z - (c_skip * x + c_out * raw)) / t[:, None, None, None]
    np.testing.assert_allclose(networks[times](z, t, r, y), v, rtol=0, atol=1e-10)
    assert np.abs(raw).max() > 0.1


def test_one_time_is_all_that_a_flow_model_is_told(networks):
    z, t, r, y = inputs()
    for times, sees in (("two", True), ("one", False)):
        net = networks[times]
        assert (distance(net(z, t, r, y), net(z, t, r + 0.05, y)) > 1e-4) == sees
        assert distance(net(z, t, r, y), net(z, t + 0.05, r, y)) > 1e-3


@pytest.mark.parametrize("times", ["two", "one"])
def test_the_ends_of_time_are_finite(networks, times):
    net, ends = networks[times], inputs((0.0, 1.0, 1.0), (0.0, 0.0, 1.0))
    for a in (net(*ends), net.derivative(*ends)):
        assert np.isfinite(a).all() and np.abs(a).max() < 100


@pytest.mark.parametrize("times", ["two", "one"])
def test_full_noise_has_a_finite_sigma_in_a_network_of_one_time_alone(networks, times):
    net, (end, last, near) = networks[times], (net_time(t) for t in (1.0, TIME_MAX, 0.995))
    assert np.array_equal(net(*inputs(end, end)), net(*inputs(last, last))) == (times == "one")
    assert distance(net(*inputs(near, near)), net(*inputs(last, last))) > 1e-4


def net_time(t):
    return (t, t, t)


@pytest.mark.parametrize("times", ["two", "one"])
def test_the_derivative_at_the_largest_time_is_that_from_below(networks, times):
    net, last, h = networks[times], net_time(TIME_MAX), 1e-5
    z, t, r, y = inputs(last, (0.2, 0.5, 0.0))
    dz = direction()[0]
    steps = [net(z - i * h * dz, t - i * h, r, y) for i in range(3)]
    from_below = (3 * steps[0] - 4 * steps[1] + steps[2]) / (2 * h)
    scale = np.abs(from_below).max()
    np.testing.assert_allclose(net.derivative(z, t, r, y), from_below, atol=1e-4 * scale)
    of_z_alone = (net(z + h * dz, t + h, r, y) - net(z - h * dz, t + h, r, y)) / (2 * h)
    assert distance(from_below, of_z_alone) > 1e-2 * scale


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_all_times_but_full_noise_are_told_with_their_derivative(dtype):
    times = jnp.asarray([0.5, TIME_MAX, 0.99, 1.0], dtype)
    told, rate = jax.jvp(edm2.told, (times,), (jnp.ones_like(times),))
    assert told.tolist() == [*times[:3].tolist(), times[1].item()] and rate.tolist() == [1, 1, 1, 0]
    assert told.dtype == rate.dtype == dtype


def test_log_sigma():
    t = np.array([0.1, 0.5, 0.9, TIME_MAX, 1.0, 0.0])
    np.testing.assert_allclose(jax.jit(edm2.log_sigma)(t), np.log([1 / 9, 1, 9, 80, 80, 1e-8]) / 4, atol=1e-8)


def test_the_derivative_is_that_of_a_central_difference(networks):
    z, t, r, y = inputs()
    dz, h = direction()[0], 1e-5
    for net in networks.values():
        difference = (net(z + h * dz, t + h, r, y) - net(z - h * dz, t - h, r, y)) / (2 * h)
        np.testing.assert_allclose(net.derivative(z, t, r, y), difference, rtol=1e-5, atol=1e-5)
        assert np.abs(difference).max() > 0.1


def test_the_null_label_adds_nothing(net):
    """The last row has it."""
    of_labels = changed(net.params, lambda name, a: a[:, ::-1] if name == "unet.emb_label.weight" else None)
    u, v = net(*inputs()), net(*inputs(), params=of_labels)
    np.testing.assert_array_equal(u[2], v[2])
    assert distance(u[0], v[0]) > 1e-3 and distance(u[1], v[1]) > 1e-3


def test_the_log_variance_is_a_function_of_sigma_alone(networks):
    net = nnx.merge(networks["one"].graphdef, networks["one"].params)
    _, t, r, _ = inputs()
    freqs, phases = np.asarray(net.logvar_fourier.freqs[...]), np.asarray(net.logvar_fourier.phases[...])
    features = 2**0.5 * np.cos(np.log(t / (1 - t))[:, None] / 4 * freqs + phases)
    weight = np.asarray(net.logvar_linear.kernel[...])[:, 0]
    expected = features @ weight / (1e-4 + root_mean_square(weight)) / 6**0.5
    np.testing.assert_allclose(jax.jit(net.log_variance)(t, r), expected, rtol=1e-10)


def test_what_the_networks_of_one_and_of_two_times_do_not_share():
    names = [
        {weights.canonical_name(path) for path, _ in nnx.to_flat_state(graph(**changes)[1])}
        for changes in ({}, ONE_TIME)
    ]
    assert names[0] - names[1] == {"unet.emb_noise_t.weight", "unet.emb_noise_r.weight"}
    assert names[1] - names[0] == {
        "unet.emb_noise.weight", "logvar_fourier.freqs", "logvar_fourier.phases", "logvar_linear.weight",
    }  # fmt: skip


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
