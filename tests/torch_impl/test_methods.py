"""What MeanFlow's parts promise, beyond what the parity suite compares."""

import pytest
import torch

from configs import base
from configs.errors import UserError
from torch_impl.methods import meanflow


def settings(**changes):
    cfg = base.get_config().method
    cfg.update(changes)
    return cfg


def draws(batch_size, cfg, seed=0):
    return meanflow.draw(torch.Generator().manual_seed(seed), (batch_size, 1, 4, 4), cfg)


@pytest.mark.parametrize("sampler", ["logit_normal", "uniform"])
@pytest.mark.parametrize("flow_rows", ["split", "front", "coin"])
def test_times_are_ordered_and_the_share_of_flow_rows_is_met(sampler, flow_rows):
    cfg = settings(time_sampler=sampler, flow_rows=flow_rows, flow_fraction=0.25)
    t, r = meanflow.sample_times(draws(4000, cfg), cfg)
    assert bool((r <= t).all() and (r >= 0).all() and (t <= 1).all())
    share = float((r == t).double().mean())
    assert share == pytest.approx(0.25, abs=0.03 if flow_rows == "coin" else 0)


def test_a_draw_is_a_function_of_its_key():
    cfg = settings()
    first, same, other = (draws(8, cfg, seed) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first, same, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("fraction", [0.0, 0.25, 0.75, 1.0])
@pytest.mark.parametrize("shards", [1, 2, 4])
def test_the_rows_of_a_shard_are_the_shard_of_the_rows(fraction, shards):
    cfg = settings(flow_fraction=fraction)
    whole = meanflow.is_flow(draws(32, cfg), cfg)
    part = meanflow.is_flow(draws(32 // shards, cfg), cfg)
    assert torch.equal(whole, part.repeat(shards))


@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.75, 1.0])
def test_join_undoes_take(fraction):
    rows = meanflow.split_rows(20, settings(flow_fraction=fraction))
    a = torch.arange(40).reshape(20, 2)
    assert torch.equal(meanflow.join(meanflow.take(a, rows, "flow"), meanflow.take(a, rows, "rest"), rows), a)
    assert len(meanflow.take(a, rows, "flow")) == int(20 * fraction)


def test_front_drops_as_many_labels_as_the_coin_but_the_first():
    y, cfg = torch.arange(40) % 5, settings(label_drop="front", label_drop_prob=0.3)
    drawn = draws(40, cfg)
    dropped, kept = meanflow.drop_labels(y, drawn, 5, cfg)
    number = int((drawn.drop < 0.3).sum())
    assert 0 < number < 40
    assert bool((dropped[:number] == 5).all()) and torch.equal(dropped[number:], y[number:])
    assert torch.equal(kept, torch.arange(40) >= number)


class Constant:
    """A network whose velocity is its label, so that guidance can be computed by hand."""

    num_classes = 9

    def __init__(self):
        self.calls = 0

    def __call__(self, z, t, r, y):
        self.calls += len(y)
        return y.to(z.dtype)[:, None, None, None].expand_as(z)


def test_guidance_by_hand_only_inside_the_interval_and_on_kept_labels():
    cfg = settings(omega=0.5, kappa=0.25, guidance_start=0.4, guidance_end=0.6, flow_fraction=0.5)
    v, y = torch.ones(4, 1, 2, 2), torch.tensor([2, 2, 2, 2])
    t, kept = torch.tensor([0.5, 0.4, 0.5, 0.7]), torch.tensor([True, True, False, True])
    rows, net = meanflow.split_rows(4, cfg), Constant()
    u_flow = meanflow.flow_velocity(net, v, t, y, rows)
    v_g = meanflow.guide(net, v, v, t, y, kept, u_flow, cfg)
    guided = 0.5 * 1 + 0.25 * 2 + 0.25 * 9
    assert v_g[:, 0, 0, 0].tolist() == [guided, guided, 1, 1]
    assert net.calls == 2 + 4 + 2  # the flow rows, the null forward of all, the conditional one of the rest


def test_a_step_runs_as_few_rows_as_it_says():
    for kappa, expected in ((0.0, 2), (0.5, 2.25)):  # in batches; the JVP's tangent is not a call
        cfg, net = settings(kappa=kappa, omega=0.3), Constant()
        x, y = torch.zeros(16, 1, 4, 4), torch.zeros(16, dtype=torch.long)
        meanflow.loss(net, (x, y), draws(16, cfg), cfg)
        assert net.calls == expected * 16


@pytest.mark.parametrize("times", [(0.5,), (0.2, 0.5), (1.0, 1.0), (1.5, 0.0), (1.0, -0.1)])
def test_sampling_times_that_do_not_fall_are_refused(times):
    cfg = base.get_config().sample
    cfg.times = times
    with pytest.raises(UserError, match="must fall"):
        meanflow.sampling_times(cfg)


def test_sampling_times():
    cfg = base.get_config().sample
    cfg.steps = 4
    assert meanflow.sampling_times(cfg) == (1.0, 0.75, 0.5, 0.25, 0.0)
    cfg.times = (0.9, 0.1)
    assert meanflow.sampling_times(cfg) == (0.9, 0.1)
