"""What flow matching's parts promise, beyond what the parity suite compares."""

import math

import make_draws
import numpy as np
import pytest
import torch

from meanflow.config import options
from torch_impl.methods import common, flow


def settings(**changes):
    cfg = options.get_config("dit", "flow").method
    cfg.update(changes)
    return cfg


def draws(batch_size, cfg, seed=0):
    return make_draws.in_torch(cfg, (batch_size, 1, 2, 2), seed)


def batch_of(num):
    return {
        "image": torch.randn(num, 1, 2, 2, generator=torch.Generator().manual_seed(1)),
        "label": torch.arange(num) % 9,
    }


class Perfect:
    """Knows the images, and so the velocity on a path from each; remembers the labels that it was called with."""

    num_classes = 9

    def __init__(self, x, path):
        self.x, self.path = x, path

    def __call__(self, z, t, r, y):
        assert torch.equal(t, r)
        self.labels, t = y, t[:, None, None, None]
        if self.path == "linear":
            return (z - self.x) / t
        angle, rate = t * math.pi / 2, math.pi / 2
        e = (z - torch.cos(angle) * self.x) / torch.sin(angle)
        return rate * (torch.cos(angle) * e - torch.sin(angle) * self.x)


class Features:
    """A network without velocity, and with the features that it is given; counts its calls for either."""

    num_classes = 9

    def __init__(self, *projections):
        self.projections, self.calls = projections, []

    def __call__(self, z, t, r, y, features=False):
        self.calls.append(features)
        return (0 * z, self.projections) if features else 0 * z


def test_a_draw_is_a_function_of_its_key_and_no_two_draws_are_the_same():
    cfg = settings(time_sampler="uniform")
    first, same, other = (draws(8, cfg, seed) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first, same, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert not torch.equal(first.times, first.drop)


@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_a_perfect_network_has_no_loss(path):
    cfg, batch = settings(path=path), batch_of(6)
    drawn = draws(6, cfg)
    loss, aux = flow.loss(Perfect(batch["image"], path), batch, drawn, cfg)
    assert float(loss) == pytest.approx(0, abs=1e-8)
    assert float((aux["u"] - aux["v"]).abs().max()) < 1e-3 < float(aux["v"].abs().max())


def test_the_loss_is_the_mean_squared_error():
    cfg, batch = settings(), batch_of(6)
    drawn = draws(6, cfg)
    loss, aux = flow.loss(Features(), batch, drawn, cfg)
    squares = np.square((drawn.noise - batch["image"]).numpy())
    np.testing.assert_allclose(loss, squares.mean(), rtol=1e-5)
    np.testing.assert_allclose(aux["err"], squares.sum((1, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(aux["row_loss"], squares.mean((1, 2, 3)), rtol=1e-5)
    assert aux.keys() == {"t", "r", "y", "v", "u", "err", "row_loss"}


def test_rows_that_lose_their_label_have_no_class():
    cfg, batch = settings(label_drop_prob=0.4), batch_of(20)
    drawn, net = draws(20, cfg), Perfect(batch["image"], "linear")
    _, aux = flow.loss(net, batch, drawn, cfg)
    dropped = np.asarray(drawn.drop) < 0.4
    assert 0 < dropped.sum() < 20
    assert np.array_equal(net.labels, np.where(dropped, 9, batch["label"]))
    assert np.array_equal(aux["y"], net.labels)


def test_the_alignment_of_equal_directions_is_least():
    a = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    assert float(flow.alignment((a,), 7 * a)) == pytest.approx(-1)
    assert float(flow.alignment((a,), -2 * a)) == pytest.approx(1)
    assert float(flow.alignment((torch.zeros(1, 2, 3),), torch.ones(1, 2, 3))) == 0


def test_alignment_by_hand():
    """Of two tokens and two encoders, of two and of three features side by side."""
    first, second = torch.tensor([[[3.0, 4.0], [1.0, 0.0]]]), torch.tensor([[[1.0, 0.0, 0.0], [2.0, 2.0, 0.0]]])
    features = torch.tensor([[[4.0, 3.0, 0.0, 2.0, 0.0], [-1.0, 0.0, 5.0, 0.0, 0.0]]])
    cosines = [(24 / 25 - 1) / 2, (0 + math.sqrt(0.5)) / 2]
    assert float(flow.alignment((first, second), features)) == pytest.approx(-sum(cosines) / 2)


def test_repa_adds_the_alignment_where_there_are_features():
    cfg, batch = settings(repa_coeff=0.25), batch_of(2)
    drawn, net = draws(2, cfg), Features(torch.ones(2, 4, 3))
    plain, _ = flow.loss(net, batch, drawn, cfg)
    loss, aux = flow.loss(net, batch | {"features": 2 * torch.ones(2, 4, 3)}, drawn, cfg)
    assert float(aux["projection"]) == pytest.approx(-1)
    assert float(loss) == pytest.approx(float(plain) - 0.25)
    assert net.calls == [False, True]


def test_the_gradient_of_repa_turns_the_projections():
    cfg, batch = settings(repa_coeff=1.0), batch_of(1) | {"features": torch.tensor([[[0.0, 1.0]]])}
    drawn, projection = draws(1, cfg), torch.tensor([[[2.0, 0.0]]], requires_grad=True)
    flow.loss(Features(projection), batch, drawn, cfg)[0].backward()
    np.testing.assert_allclose(projection.grad, [[[0.0, -0.5]]], atol=1e-6)


@pytest.mark.parametrize("sampler", ["logit_normal", "uniform", "arctan", "arctan_official"])
def test_times_are_between_0_and_1_but_official_ones(sampler):
    cfg = settings(time_sampler=sampler)
    _, aux = flow.loss(Features(), batch_of(400), draws(400, cfg), cfg)
    t = np.asarray(aux["t"])
    assert (t < 1).all() and t.max() > 0.7 and np.array_equal(t, aux["r"])
    assert ((t > 0).all() and t.min() < 0.2) if sampler != "arctan_official" else (-1 < t.min() < -0.5)


@pytest.mark.parametrize(
    ("sampler", "of_time"),
    [("logit_normal", lambda t: np.log(t / (1 - t))), ("arctan", lambda t: np.log(np.tan(t * math.pi / 2)))],
)
def test_the_flow_time_has_its_own_mean_and_deviation(sampler, of_time):
    """The logarithm of noise over signal is normal, on the linear path for one sampler and the cosine for the other."""
    cfg = settings(time_sampler=sampler, flow_time_mean=0.5, flow_time_std=2.0)
    drawn = draws(3, cfg)._replace(times=torch.tensor([-1.0, 0.0, 1.5]))
    _, aux = flow.loss(Features(), batch_of(3), drawn, cfg)
    np.testing.assert_allclose(of_time(np.asarray(aux["t"])), [-1.5, 0.5, 3.5], rtol=1e-4)


def test_arctan_gives_the_cosine_path_the_noise_that_logit_normal_gives_the_linear_one():
    normal, ratios = torch.linspace(-3, 3, 7), []
    for path, sampler in (("linear", "logit_normal"), ("cosine", "arctan")):
        cfg = settings(path=path, time_sampler=sampler)
        t = common.to_time(normal, 0.3, 1.2, cfg)
        one, zero = torch.ones(7, 1, 1, 1), torch.zeros(7, 1, 1, 1)
        signal, noise = (common.path(x, e, t, cfg)[0] for x, e in ((one, zero), (zero, one)))
        ratios.append(noise / signal)
    np.testing.assert_allclose(ratios[0], ratios[1], rtol=1e-4)


def test_features_of_zero_have_a_derivative():
    a = torch.zeros(2, 3, requires_grad=True)
    flow.unit(a).sum().backward()
    assert torch.isfinite(a.grad).all()
