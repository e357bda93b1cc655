"""What decoupled MeanFlow's parts promise, beyond what the parity suite compares."""

import math

import make_draws
import numpy as np
import pytest
import torch

from meanflow.config import options
from torch_impl.methods import common, decoupled
from torch_impl.models.tape import under_jvp


def settings(**changes):
    cfg = options.get_config("dmf_dit", "decoupled").method
    cfg.update({"omega": 0.5} | changes)
    return cfg


def draws(cfg, seed=0):
    return make_draws.in_torch(cfg, (8, 1, 2, 2), seed)


def batch():
    return {"image": torch.randn(8, 1, 2, 2, generator=torch.Generator().manual_seed(1)), "label": torch.arange(8)}


def wide(*rows):
    """Return arrays [b] as [b 1 1 1]."""
    return tuple(a.reshape(-1, 1, 1, 1) for a in rows)


class Curved:
    """A nonlinear network of everything it is told, with one parameter; remembers (rows, under a JVP) of its calls."""

    takes_tape = True

    num_classes = 9

    def __init__(self, parameter=1.0):
        self.parameter, self.calls = parameter, []

    def __call__(self, z, t, r, y, tape=None):
        self.calls.append((len(y), under_jvp(tape)))
        t, r, y = wide(t, r, y)
        return self.parameter * torch.sin(z * (1 + y / 10) + t * t - r / 2)

    def log_variance(self, t, r):
        return self.parameter * (t + 2 * r)


def test_a_draw_is_a_function_of_its_key_and_no_two_draws_are_the_same():
    cfg = settings(time_sampler="uniform")
    first, same, other = (draws(cfg, seed) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first, same, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert not torch.equal(first.noise, first.noise_flow)
    columns = [first.times[:, 0], first.times[:, 1], first.times_flow, first.drop]
    assert len({tuple(np.asarray(a).tolist()) for a in columns}) == 4


@pytest.mark.parametrize(
    ("guidance", "calls", "of_teacher"),
    [
        ("default", [(8, False), (8, False), (8, True)], []),
        ("mg", [(8, False), (8, False), (24, False), (8, True)], []),
        ("distill", [(8, False), (8, False), (8, True)], [(32, False)]),
    ],
)
def test_a_step_runs_as_few_forwards_as_the_mathematics_allows(guidance, calls, of_teacher):
    """Both terms, guidance as one batch, then the tangent of the MeanFlow term."""
    cfg, net, teacher = settings(guidance_type=guidance), Curved(), Curved()
    decoupled.loss(net, batch(), draws(cfg), cfg, teacher)
    assert net.calls == calls and teacher.calls == of_teacher


class Label:
    """A velocity that is the label plus the state."""

    num_classes = 9

    def __call__(self, z, t, r, y):
        return z + y[:, None, None, None]


def guided_by_hand(y, kept, times, changes, guide):
    """Return a number a row of both terms' guided velocities, with states 10 and 100 and velocities 1 and 2."""
    cfg = settings(guidance_start=0.2, guidance_end=0.7, **changes)
    states, velocities = ([torch.full((4, 1, 2, 2), a) for a in pair] for pair in ((10.0, 100.0), (1.0, 2.0)))
    given = (tuple(states), tuple(velocities), tuple(torch.tensor(t) for t in times), torch.tensor(y))
    return [a[:, 0, 0, 0].tolist() for a in guide(*given, torch.tensor(kept), cfg)]


# Of one row each: inside the interval, on its edge, outside, and without label; in the other term some the other way.
ROWS = {"kept": [True, True, True, False], "times": ([0.5, 0.2, 0.1, 0.5], [0.8, 0.5, 0.7, 0.5])}


def test_guidance_by_itself_by_hand():
    """The flow term's own predictions are 13 for every row, those of the others z + y or, without class, z + 9."""

    def guide(states, velocities, times, y, kept, cfg):
        u_flow = torch.full((4, 1, 2, 2), 13.0)
        return decoupled.guide_by_itself(Label(), states, velocities, times, y, kept, u_flow, cfg)

    guided = guided_by_hand([2, 3, 4, 9], changes={"omega": 0.5}, guide=guide, **ROWS)
    own, other = 1 + 0.5 * (13 - 19), [2 + 0.5 * (y - 9) for y in (3, 4)]
    assert guided == [[own, own, 1, 1], [2, *other, 2]]
    unguided = guided_by_hand([2, 3, 4, 9], changes={"guidance_type": "default"}, guide=guide, **ROWS)
    assert unguided == [[1] * 4, [2] * 4]


def test_guidance_by_a_teacher_by_hand():
    """Without class a row's velocity is z + 9, guided or not."""

    def guide(states, velocities, times, y, kept, cfg):
        return decoupled.distill(Label(), states, times, y, cfg)

    guided = guided_by_hand([2, 3, 4, 9], changes={"omega": 1.5}, guide=guide, **ROWS)
    inside = {y: 9 + 1.5 * (y - 9) for y in (2, 3, 4)}
    assert guided == [[10 + inside[2], 10 + inside[3], 14, 19], [102, 100 + inside[3], 100 + inside[4], 109]]


def test_the_log_loss_of_a_row_and_of_all_pairs():
    err, log_variance = torch.tensor([1.0, 3.0]), torch.tensor([0.0, math.log(2)])

    def of(e, variance):
        return math.log(e / variance + 0.01) + math.log(variance)

    rows = decoupled.log_loss(err, log_variance, settings(adaptive_eps=0.01))
    np.testing.assert_allclose(rows, [of(1, 1), of(3, 2)], rtol=1e-5)
    pairs = decoupled.log_loss(err, log_variance, settings(adaptive_eps=0.01, log_variance_pairs="all"))
    np.testing.assert_allclose(pairs, [[of(1, 1), of(3, 1)], [of(1, 2), of(3, 2)]], rtol=1e-5)


def test_errors_of_the_log_loss_are_means_over_a_row():
    cfg, net = settings(guidance_type="default"), Curved()
    _, aux = decoupled.loss(net, batch(), draws(cfg), cfg)
    for name, u, target, lv in (
        ("", "u", "target", "log_variance"),
        ("_flow", "u_flow", "v_g_flow", "log_variance_flow"),
    ):
        err = np.square(np.asarray(aux[u] - aux[target])).mean((1, 2, 3))
        log_variance = np.asarray(aux[lv])
        expected = np.log(err / np.exp(log_variance) + cfg.adaptive_eps) + log_variance
        np.testing.assert_allclose(aux["row_loss" + name], expected, rtol=1e-4)


@pytest.mark.parametrize("guidance", ["mg", "distill"])
def test_no_gradient_reaches_targets_or_the_teacher(guidance):
    """That of the loss is that of one with the targets as they are."""
    cfg = settings(guidance_type=guidance)
    drawn = draws(cfg)
    _, fixed = decoupled.loss(Curved(), batch(), drawn, cfg, Curved(0.5))

    def with_fixed_targets(parameter):
        net, total = Curved(parameter), 0.0
        for e, t, r, target in (
            (drawn.noise, fixed["t"], fixed["r"], fixed["target"]),
            (drawn.noise_flow, fixed["t_flow"], fixed["t_flow"], fixed["v_g_flow"]),
        ):
            z, _ = common.path(batch()["image"], e, t, cfg)
            err = (net(z, t, r, fixed["y"]) - target).square().mean((1, 2, 3))
            total += decoupled.log_loss(err, net.log_variance(t, r), cfg).mean() / 2
        return total

    own, fixed_own, of_teacher = (torch.tensor(a, requires_grad=True) for a in (1.0, 1.0, 0.5))
    decoupled.loss(Curved(own), batch(), drawn, cfg, Curved(of_teacher))[0].backward()
    with_fixed_targets(fixed_own).backward()
    assert float(own.grad) == pytest.approx(float(fixed_own.grad), rel=1e-4)
    assert of_teacher.grad is None and abs(float(own.grad)) > 1e-3


class FlowMap:
    """The exact flow map of one image along the cosine path: its noise is the same at all times."""

    num_classes = 9

    def __init__(self, x):
        self.x = x

    def __call__(self, z, t, r, y):
        t, r = wide(t, r)
        e = (z - torch.cos(t * math.pi / 2) * self.x) / torch.sin(t * math.pi / 2)
        v = (torch.cos(t * math.pi / 2) * e - torch.sin(t * math.pi / 2) * self.x) * math.pi / 2
        u = (z - torch.cos(r * math.pi / 2) * self.x - torch.sin(r * math.pi / 2) * e) / torch.where(t > r, t - r, 1)
        return torch.where(t > r, u, v)

    def log_variance(self, t, r):
        return 0 * t


@pytest.mark.parametrize("guidance", ["default", "mg"])
def test_the_exact_flow_map_is_its_own_target(guidance):
    cfg, x = settings(path="cosine", guidance_type=guidance), batch()["image"][:1].double()
    same = {"image": x.tile(8, 1, 1, 1), "label": batch()["label"]}
    drawn = decoupled.Draws(*(a.double() for a in draws(cfg)))
    loss, aux = decoupled.loss(FlowMap(x), same, drawn, cfg)
    assert float(aux["du_dt"].abs().max()) > 0.1
    np.testing.assert_allclose(aux["target"], aux["u"], rtol=1e-6, atol=1e-8)
    assert float(loss) == pytest.approx(math.log(cfg.adaptive_eps))
