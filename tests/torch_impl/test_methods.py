"""What MeanFlow's parts promise, beyond what the parity suite compares."""

import make_draws
import numpy as np
import pytest
import torch

from meanflow.config import options
from torch_impl.methods import common, meanflow
from torch_impl.models.tape import under_jvp


def settings(**changes):
    cfg = options.get_config().method
    cfg.update(changes)
    return cfg


def draws(batch_size, cfg, seed=0):
    return make_draws.in_torch(cfg, (batch_size, 1, 4, 4), seed)


@pytest.mark.parametrize("sampler", ["logit_normal", "uniform"])
@pytest.mark.parametrize("flow_rows", ["split", "front", "coin"])
def test_times_are_ordered_and_the_share_of_flow_rows_is_met(sampler, flow_rows):
    cfg = settings(time_sampler=sampler, flow_rows=flow_rows, flow_fraction=0.25)
    t, r = common.sample_times(draws(4000, cfg), cfg)
    assert bool((r <= t).all() and (r >= 0).all() and (t <= 1).all())
    share = float((r == t).double().mean())
    assert share == pytest.approx(0.25, abs=0.03 if flow_rows == "coin" else 0)


@pytest.mark.parametrize(
    ("order", "t", "r"),
    [("sorted", [0.75, 0.75, 0.5, 0.875], [0.25, 0.25, 0.5, 0.875]),
     ("truncated", [0.25, 0.75, 0.5, 0.875], [0.25, 0.25, 0.5, 0.875])],
)  # fmt: skip
def test_sorted_times_change_places_and_truncated_ones_are_cut_off(order, t, r):
    """The last row is a flow row by its coin."""
    cfg = settings(time_order=order, time_sampler="uniform", flow_rows="coin", flow_fraction=0.25)
    times = torch.tensor([[0.25, 0.75], [0.75, 0.25], [0.5, 0.5], [0.875, 0.125]])
    drawn = meanflow.Draws(None, times, torch.tensor([0.9, 0.9, 0.25, 0.1]), None, None)
    assert [a.tolist() for a in common.sample_times(drawn, cfg)] == [t, r]


def test_each_time_has_its_own_mean_and_deviation():
    cfg = settings(time_order="truncated", time_mean=(-0.6, -4.0), time_std=(1.6, 0.5), flow_fraction=0.0)
    drawn = meanflow.Draws(None, torch.tensor([[0.0, 0.0], [1.0, 2.0]]), torch.tensor([0.5, 0.5]), None, None)
    t, r = (np.asarray(a) for a in common.sample_times(drawn, cfg))
    np.testing.assert_allclose(np.log(t / (1 - t)), [-0.6, 1.0], rtol=1e-5)
    np.testing.assert_allclose(np.log(r / (1 - r)), [-4.0, -3.0], rtol=1e-5)


def test_a_draw_is_a_function_of_its_key():
    cfg = settings()
    first, same, other = (draws(8, cfg, seed) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first, same, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("fraction", [0.0, 0.25, 0.75, 1.0])
@pytest.mark.parametrize("shards", [1, 2, 4])
def test_the_rows_of_a_shard_are_the_shard_of_the_rows(fraction, shards):
    cfg = settings(flow_fraction=fraction)
    whole = common.is_flow(draws(32, cfg), cfg)
    part = common.is_flow(draws(32 // shards, cfg), cfg)
    assert torch.equal(whole, part.repeat(shards))


@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.75, 1.0])
def test_join_undoes_take(fraction):
    rows = common.split_rows(20, settings(flow_fraction=fraction))
    a = torch.arange(40).reshape(20, 2)
    assert torch.equal(common.join(common.take(a, rows, "flow"), common.take(a, rows, "jvp"), rows), a)
    assert len(common.take(a, rows, "flow")) == int(20 * fraction)


def test_front_drops_as_many_labels_as_the_coin_but_the_first():
    y, cfg = torch.arange(40) % 5, settings(label_drop="front", label_drop_prob=0.3)
    drawn = draws(40, cfg)
    dropped, kept = common.drop_labels(y, drawn, 5, cfg)
    number = int((drawn.drop < 0.3).sum())
    assert 0 < number < 40
    assert bool((dropped[:number] == 5).all()) and torch.equal(dropped[number:], y[number:])
    assert torch.equal(kept, torch.arange(40) >= number)


class Constant:
    """A network whose velocity is its label, so that guidance can be computed by hand."""

    takes_tape = True

    num_classes, dropout, augment_dim = 9, 0.0, 0

    def __init__(self):
        self.calls = 0

    def __call__(self, z, t, r, y, tape=None):
        self.calls += 0 if under_jvp(tape) else len(y)  # a JVP takes its primal from the forward
        return y.to(z.dtype)[:, None, None, None].expand_as(z)


def test_guidance_by_hand_only_inside_the_interval_and_on_kept_labels():
    cfg = settings(omega=0.5, kappa=0.25, guidance_start=0.4, guidance_end=0.6, flow_fraction=0.5)
    v, y = torch.ones(4, 1, 2, 2), torch.tensor([2, 2, 2, 2])
    t, kept = torch.tensor([0.5, 0.4, 0.5, 0.7]), torch.tensor([True, True, False, True])
    rows, net = common.split_rows(4, cfg), Constant()
    u_flow = common.take(net(v, t, t, y), rows, "flow")
    v_g = meanflow.guide(net, v, v, t, y, {}, kept, u_flow, cfg)
    guided = 0.5 * 1 + 0.25 * 2 + 0.25 * 9
    assert v_g[:, 0, 0, 0].tolist() == [guided, guided, 1, 1]
    assert net.calls == 4 + 4 + 2  # the forward of all, the null one of all, the conditional one of the rest


def test_a_step_runs_as_few_rows_as_it_says():
    for kappa, expected in ((0.0, 2), (0.5, 2.25)):  # in batches; the JVP's tangent is not a call
        cfg, net = settings(kappa=kappa, omega=0.3), Constant()
        batch = {"image": torch.zeros(16, 1, 4, 4), "label": torch.zeros(16, dtype=torch.long)}
        meanflow.loss(net, batch, draws(16, cfg), cfg)
        assert net.calls == expected * 16


class Masked:
    """A network of one nonlinear layer, which masks and labels change; it keeps what it was called with.

    A call under the JVP says so by its tape.
    """

    takes_tape = True

    num_classes, dropout, augment_dim = 9, 0.5, 2

    def __init__(self):
        self.calls = []

    def dropout_masks(self, draws):
        return draws[:, None] * torch.tensor([3, 5, 7, 11]) % 1 > 0.5

    def __call__(self, z, t, r, y, augment=None, dropout=None, tape=None):
        self.calls.append((len(y), augment is not None, dropout is not None, under_jvp(tape)))
        scale = 1 + y[:, None, None, None] + (0 if augment is None else augment.sum(1)[:, None, None, None])
        u = torch.sin(z * scale + (t * t + r)[:, None, None, None])
        return u if dropout is None else torch.where(dropout.reshape(z.shape), 2 * u, 0)


def batch_of(num):
    x, y = torch.randn(num, 1, 2, 2), torch.arange(num) % 9
    return {"image": x, "label": y, "augment": torch.randn(num, 2)}


@pytest.mark.parametrize(
    ("kappa", "guidance"),
    [
        (0.0, [(16, True, False, False)]),
        (0.5, [(32, True, False, False)]),
    ],  # the null forward, and the conditional one, of all rows
)
def test_guidance_sees_no_dropout_and_shares_no_forward_with_it(kappa, guidance):
    cfg, net, batch = settings(kappa=kappa, omega=0.3, flow_fraction=0.75), Masked(), batch_of(16)
    drawn = make_draws.in_torch(cfg, batch["image"].shape, 0)
    _, aux = meanflow.loss(net, batch, drawn, cfg)
    assert net.calls == [(16, True, True, False), *guidance, (4, True, True, True)]
    z, v = common.path(batch["image"], drawn.noise, aux["t"], cfg)
    null = torch.full((16,), 9)
    u_null, u = (net(z, aux["t"], aux["t"], y, augment=batch["augment"]) for y in (null, batch["label"]))
    expected = 0.3 * v + kappa * u + (0.7 - kappa) * u_null
    kept = np.asarray(drawn.drop) >= cfg.label_drop_prob
    np.testing.assert_allclose(aux["v_g"][kept], expected[kept], rtol=1e-4, atol=1e-5)


def test_what_a_network_is_given():
    batch, net = batch_of(3), Masked()
    drawn = meanflow.Draws(*[None] * 4, torch.tensor([0.1, 0.5, 0.9]))
    assert list(meanflow.conditions(net, batch, drawn)) == ["augment", "dropout"]
    assert list(meanflow.conditions(net, {"image": batch["image"]}, drawn)) == ["dropout"]
    net.augment_dim, net.dropout = 0, 0.0
    assert meanflow.conditions(net, batch, drawn) == {}
