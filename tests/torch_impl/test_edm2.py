"""EDM2's network: what keeps magnitudes, its preconditioning, and the ends of time.  What it computes is parity's."""

import functools

import numpy as np
import pytest
import tiny
import torch

from meanflow.errors import UserError
from torch_impl.models import edm2
from torch_impl.step import build_net

SIZES = {
    "name": "edm2", "input_size": 4, "channels": 2, "num_classes": 3, "width": 4, "channel_mult": (1, 2),
    "channel_mult_emb": 2, "channel_mult_noise": 2, "num_blocks": 1, "attn_resolutions": (4,), "head_width": 4,
    "sigma_data": 0.7, "compute_dtype": "float64",
}  # fmt: skip
ONE_TIME = {"interval_embedder": False, "logvar_channels": 6}
TIMES = pytest.mark.parametrize("times", ["two", "one"])
TIME_MAX = 80 / 81


def fresh(**changes):
    """Return a network of the tiny sizes."""
    config = tiny.of_network(SIZES | changes)
    return build_net(config)


def build(**changes):
    """Return a network whose parameters are zero nowhere, gains and frequencies too."""
    net, rng = fresh(**changes), np.random.RandomState(0)
    for p in net.parameters():
        p.data.copy_(torch.from_numpy(np.asarray(rng.randn(*p.shape))))
    return net


@pytest.fixture
def networks():
    """Return the network of two times, of two levels, and the one of one time, of one level."""
    return {
        "two": build().requires_grad_(False), "one": build(**ONE_TIME, channel_mult=(2,)).requires_grad_(False),
    }  # fmt: skip


@pytest.fixture
def net(networks):
    return networks["two"]


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def randn(*shape, seed=0):
    return torch.from_numpy(np.random.RandomState(seed).randn(*shape))


def direction():
    """Return tangents of z, t and r."""
    return randn(3, 2, 4, 4, seed=1), tensor(1, 1, 1), tensor(0, 0, 0)


def inputs(t=(0.3, 0.6, 0.9), r=(0.1, 0.6, 0.0)):
    return randn(3, 2, 4, 4), tensor(*t), tensor(*r), torch.tensor([0, 2, 3])


def derivative(net, z, t, r, y):
    """Return du/dt along `direction`."""
    return torch.func.jvp(functools.partial(net, y=y), (z, t, r), direction())[1]


def weights_of(net):
    """Return {name: weight [out ...]} of all convolutions and linear layers."""
    return {name: p for name, p in net.named_parameters() if name.endswith(".weight")}


def root_mean_square(a, axis=None):
    return np.sqrt(np.mean(np.square(np.asarray(a)), axis=axis))


def distance(a, b):
    return float((a - b).abs().max())


def test_sums_joins_and_activations_keep_the_magnitude_of_unit_normals():
    a, b = (randn(8, num, 32, 32, seed=num) for num in (8, 24))
    x = np.linspace(-10, 10, 20_001)
    squares, density = edm2.mp_silu(torch.from_numpy(x)).square().numpy(), np.exp(-(x**2) / 2) / (2 * np.pi) ** 0.5
    assert float((squares * density).sum() * 1e-3) == pytest.approx(1, abs=3e-3)
    for t in (0.3, 0.5):
        assert root_mean_square(edm2.mp_sum(a, b[:, :8], t)) == pytest.approx(1, abs=0.01)
        joined = edm2.mp_cat(a, b, t)
        assert root_mean_square(joined) == pytest.approx(1, abs=0.01)
        powers = [float(part.square().sum()) for part in (joined[:, :8], joined[:, 8:])]
        assert powers[1] / powers[0] == pytest.approx((t / (1 - t)) ** 2, rel=0.02)
    only_b = edm2.mp_sum(0 * b, b, 0.3)
    torch.testing.assert_close(only_b, 0.3 * b / 0.58**0.5)


@pytest.mark.parametrize("kernel_size", [0, 1, 3])
def test_a_convolution_keeps_the_magnitude_of_unit_normals_whatever_its_weights_are(kernel_size):
    layer = edm2.MPConv(16, 8, kernel_size).double().requires_grad_(False)
    window = (kernel_size,) * 2 if kernel_size else ()
    weight = np.random.RandomState(1).randn(8, 16, *window) * np.arange(1.0, 9.0).reshape(8, *[1] * (1 + len(window)))
    layer.weight.copy_(torch.from_numpy(weight))
    x = layer(randn(4000, 16) if not kernel_size else randn(4, 16, 34, 34))
    x = x[:, :, 1:-1, 1:-1] if kernel_size else x  # beyond the border are zeros
    assert root_mean_square(x) == pytest.approx(1, abs=0.02)
    np.testing.assert_allclose(root_mean_square(x, (0, *range(2, x.ndim))), 1, atol=0.06)


def test_normalize_divides_by_the_root_mean_square_but_for_eps():
    x = np.random.RandomState(0).randn(3, 2, 5) * 1e-3
    for axes in ((2,), (0, 1)):
        expected = x / (1e-4 + np.sqrt((x**2).mean(axes, keepdims=True)))
        np.testing.assert_allclose(edm2.normalize(torch.from_numpy(x), axes), expected)
    assert not edm2.normalize(torch.zeros(2, 3), (1,)).any()
    assert edm2.normalize(torch.ones(2, 3, dtype=torch.bfloat16), (1,)).dtype == torch.float32


def test_resampling():
    x = randn(2, 3, 4, 6)
    down, up = edm2.resample(x, "down"), edm2.resample(x, "up")
    assert down.shape == (2, 3, 2, 3) and up.shape == (2, 3, 8, 12) and edm2.resample(x, None) is x
    torch.testing.assert_close(down[:, :, 1, 2], x[:, :, 2:4, 4:6].mean((2, 3)))
    assert torch.equal(up, x[:, :, torch.arange(8) // 2][:, :, :, torch.arange(12) // 2])
    torch.testing.assert_close(edm2.resample(up, "down"), x)


def test_attention_by_hand():
    """Of two heads of two channels, whose queries, keys and values are one channel after another."""
    qkv = np.random.RandomState(0).randn(2, 12, 3, 3)
    found = edm2.attend(torch.from_numpy(qkv), 2).reshape(2, 2, 2, 9)
    q, k, v = np.moveaxis(qkv.reshape(2, 2, 2, 3, 9), 3, 0)
    q, k, v = (a / (1e-4 + root_mean_square(a, 2)[:, :, None]) for a in (q, k, v))
    scores = np.exp(np.einsum("bhcq,bhck->bhqk", q, k) / 2**0.5)
    expected = np.einsum("bhqk,bhck->bhcq", scores / scores.sum(3, keepdims=True), v)
    np.testing.assert_allclose(found, expected, rtol=1e-10)


def test_activations_are_bounded():
    block = edm2.Block(4, 4, 8, "dec", dtype=torch.float32).requires_grad_(False)
    block.conv_res1.weight.zero_()
    x = block(torch.tensor([1e4, -1e4, 1.0])[:, None, None, None] * torch.ones(3, 4, 2, 2), torch.ones(3, 8))
    assert x[0].min() == 256 and x[1].max() == -256 and x[2].abs().max() < 10


def test_normalized_weights_stay_as_they_are(net):
    """The first time the epsilon counts as the weights come, then it is the same for all."""
    before, history = {name: p.clone() for name, p in net.named_parameters()}, []
    for _ in range(3):
        assert edm2.normalize_weights(dict(net.named_parameters())) is None
        history.append({name: p.clone() for name, p in weights_of(net).items()})
    assert len(history[0]) > 20
    for name, once in history[0].items():
        twice, thrice = (weights[name] for weights in history[1:])
        np.testing.assert_allclose(root_mean_square(once, tuple(range(1, once.ndim))), 1, atol=1e-3, err_msg=name)
        torch.testing.assert_close(once, twice, rtol=1e-3, atol=0)
        torch.testing.assert_close(twice, thrice, rtol=0, atol=1e-7)
    others = {name: p for name, p in net.named_parameters() if not name.endswith(".weight")}
    assert "unet.out_gain" in others and all(torch.equal(p, before[name]) for name, p in others.items())


def test_weights_are_normalized_in_place_though_they_are_trained():
    net = build(channel_mult=(2,))
    pointers = [p.data_ptr() for p in net.parameters()]
    edm2.normalize_weights(dict(net.named_parameters()))
    assert pointers == [p.data_ptr() for p in net.parameters()] and all(p.is_leaf for p in net.parameters())
    assert root_mean_square(net.unet.out_conv.weight.detach()) == pytest.approx(1, abs=1e-3)


def test_only_the_direction_of_a_weight_counts(net):
    u = net(*inputs())
    for name, weight in weights_of(net).items():
        moved = []
        for factor in (3.0, -1.0):
            weight.mul_(factor)
            moved.append(distance(net(*inputs()), u))
            weight.div_(factor)
        assert moved[0] < min(1e-3, moved[1] / 3), name


def test_gradients_are_tangential_to_the_weights():
    """And random frequencies are never trained."""
    net = build(**ONE_TIME, channel_mult=(2,))
    (net(*inputs()) * direction()[0]).sum().backward()
    for name, w in weights_of(net).items():
        if name != "logvar_linear.weight":
            g, w = (a.detach().flatten(1) for a in (w.grad, w))
            lengths = g.norm(dim=1) * w.norm(dim=1)
            assert lengths.max() > 1e-5 and (g * w).sum(1).abs().max() < 1e-3 * lengths.max(), name
    assert {name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()} == {
        "unet.emb_fourier.freqs", "unet.emb_fourier.phases",
        "logvar_fourier.freqs", "logvar_fourier.phases", "logvar_linear.weight",
    }  # fmt: skip


@TIMES
@pytest.mark.parametrize("end", [0.9, TIME_MAX, 0.999])
def test_it_is_the_velocity_of_edm_s_denoiser(networks, times, end):
    """D = c_skip x + c_out F of the state x = z / (1-t) at sigma = t / (1-t), and v = (z - D) / t; beyond 80/81 too."""
    net, s, (z, t, r, y) = networks[times], SIZES["sigma_data"], inputs((0.3, 0.6, end))
    sigma = (t / (1 - t))[:, None, None, None]
    x = z * (1 + sigma)
    c_skip, c_out = s**2 / (sigma**2 + s**2), sigma * s / (sigma**2 + s**2) ** 0.5
    c_in, c_noise = 1 / (s**2 + sigma**2) ** 0.5, torch.log(sigma[:, 0, 0, 0]) / 4
    raw = net.unet(c_in * x, net.unet.embed(t if times == "two" else c_noise, r, y))
    v = (z - (c_skip * x + c_out * raw)) / t[:, None, None, None]
    torch.testing.assert_close(net(z, t, r, y), v, rtol=0, atol=1e-10)
    assert float(raw.abs().max()) > 0.1


def test_one_time_is_all_that_a_flow_model_is_told(networks):
    z, t, r, y = inputs()
    for times, sees in (("two", True), ("one", False)):
        net = networks[times]
        assert (distance(net(z, t, r, y), net(z, t, r + 0.05, y)) > 1e-4) == sees
        assert distance(net(z, t, r, y), net(z, t + 0.05, r, y)) > 1e-3


@TIMES
def test_the_ends_of_time_are_finite(networks, times):
    net, ends = networks[times], inputs((0.0, 1.0, 1.0), (0.0, 0.0, 1.0))
    for a in (net(*ends), derivative(net, *ends)):
        assert a.isfinite().all() and float(a.abs().max()) < 100


@TIMES
def test_full_noise_has_a_finite_sigma_in_a_network_of_one_time_alone(networks, times):
    net, (end, last, near) = networks[times], ((t,) * 3 for t in (1.0, TIME_MAX, 0.995))
    assert torch.equal(net(*inputs(end, end)), net(*inputs(last, last))) == (times == "one")
    assert distance(net(*inputs(near, near)), net(*inputs(last, last))) > 1e-4


@TIMES
def test_the_derivative_at_the_largest_time_is_that_from_below(networks, times):
    net, h = networks[times], 1e-5
    z, t, r, y = inputs((TIME_MAX,) * 3, (0.2, 0.5, 0.0))
    dz = direction()[0]
    steps = [net(z - i * h * dz, t - i * h, r, y) for i in range(3)]
    from_below = (3 * steps[0] - 4 * steps[1] + steps[2]) / (2 * h)
    scale = float(from_below.abs().max())
    torch.testing.assert_close(derivative(net, z, t, r, y), from_below, rtol=0, atol=1e-4 * scale)
    of_z_alone = (net(z + h * dz, t + h, r, y) - net(z - h * dz, t + h, r, y)) / (2 * h)
    assert distance(from_below, of_z_alone) > 1e-2 * scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_all_times_but_full_noise_are_told_with_their_derivative(dtype):
    times = torch.tensor([0.5, TIME_MAX, 0.99, 1.0], dtype=dtype)
    finite, slope = torch.func.jvp(edm2.finite_time, (times,), (torch.ones_like(times),))
    assert finite.tolist() == [*times[:3].tolist(), times[1].item()] and slope.tolist() == [1, 1, 1, 0]
    assert finite.dtype == slope.dtype == dtype


def test_log_sigma():
    t = tensor(0.1, 0.5, 0.9, TIME_MAX, 1.0, 0.0)
    np.testing.assert_allclose(edm2.log_sigma(t), np.log([1 / 9, 1, 9, 80, 80, 1e-8]) / 4, atol=1e-8)


def test_the_null_label_adds_nothing(net):
    """The last row has it."""
    u, (_, t, r, y) = net(*inputs()), inputs()
    torch.testing.assert_close(net.unet.embed(t, r, y)[2], edm2.mp_silu(net.unet.embed_times(t, r) / 2**0.5)[2])
    net.unet.emb_label.weight.copy_(net.unet.emb_label.weight.flip(1))
    v = net(*inputs())
    assert torch.equal(u[2], v[2])
    assert distance(u[0], v[0]) > 1e-3 and distance(u[1], v[1]) > 1e-3


def test_the_log_variance_is_a_function_of_sigma_alone(networks):
    net, (_, t, r, _) = networks["one"], inputs()
    freqs, phases = net.logvar_fourier.freqs, net.logvar_fourier.phases
    features = 2**0.5 * torch.cos(torch.log(t / (1 - t))[:, None] / 4 * freqs + phases)
    weight = net.logvar_linear.weight[0]
    expected = features @ weight / (1e-4 + root_mean_square(weight)) / 6**0.5
    torch.testing.assert_close(net.log_variance(t, r), expected, rtol=1e-10, atol=0)


def test_what_the_networks_of_one_and_of_two_times_do_not_share():
    names = [set(fresh(**changes).state_dict()) for changes in ({}, ONE_TIME)]
    assert names[0] - names[1] == {"unet.emb_noise_t.weight", "unet.emb_noise_r.weight"}
    assert names[1] - names[0] == {
        "unet.emb_noise.weight", "logvar_fourier.freqs", "logvar_fourier.phases", "logvar_linear.weight",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("dtype", "expected"), [("float32", torch.float32), ("bfloat16", torch.float32), ("float64", torch.float64)]
)
def test_dtypes(dtype, expected):
    net, (z, t, r, y) = fresh(compute_dtype=dtype), inputs()
    assert {p.dtype for p in net.parameters()} == {expected}
    assert net(*(a.to(expected) for a in (z, t, r)), y).dtype == expected


def test_a_head_width_that_does_not_divide():
    with pytest.raises(UserError, match="model.head_width 3 does not divide the 8 channels of a block"):
        fresh(head_width=3, attn_resolutions=())
    fresh(head_width=64)  # all of a block that has fewer


def test_normalisation_has_a_derivative_at_zero():
    x = torch.zeros(2, 3, requires_grad=True)
    edm2.normalize(x, (1,)).sum().backward()
    assert x.grad is not None and torch.isfinite(x.grad).all()
