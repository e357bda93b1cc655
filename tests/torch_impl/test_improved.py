"""What improved MeanFlow's parts promise, beyond what the parity suite compares."""

import math

import make_draws
import numpy as np
import pytest
import torch

from meanflow.config import options
from torch_impl.methods import common, improved
from torch_impl.models.tape import under_jvp


def settings(**changes):
    cfg = options.get_config("imf_dit", "improved").method
    cfg.update({"flow_fraction": 0.5} | changes)
    return cfg


def draws(batch_size, cfg, seed=0):
    return make_draws.in_torch(cfg, (batch_size, 1, 2, 2), seed)


def test_a_draw_is_a_function_of_its_key_and_no_two_draws_are_the_same():
    cfg = settings(time_sampler="uniform")
    first, same, other = (draws(8, cfg, seed) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first, same, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    columns = [first.times[:, 0], first.times[:, 1], *first[2:]]
    assert len({tuple(np.asarray(a).tolist()) for a in columns}) == len(columns) == 7


@pytest.mark.parametrize(
    ("power", "median"),
    [(1.0, math.sqrt(8)), (0.0, 4.5), (2.0, 16 / 9), (0.5, ((1 + math.sqrt(8)) / 2) ** 2)],
)
def test_guidance_scales_follow_a_power_law(power, median):
    """Between their least and their largest, half of them below the median."""
    cfg = settings(omega_power=power, flow_fraction=0.0)
    drawn = draws(3, cfg)._replace(omega=torch.tensor([0.0, 0.5, 1.0]))
    omega = improved.sample_guidance(drawn, cfg)["omega"]
    np.testing.assert_allclose(omega, [1, median, 8], rtol=1e-5)


def test_without_guidance_the_scale_is_1():
    cfg = settings(guidance=False)
    assert improved.sample_guidance(draws(8, cfg), cfg)["omega"].tolist() == [1.0] * 8


@pytest.mark.parametrize("flow_rows", ["split", "front", "coin"])
def test_intervals_are_whole_on_flow_rows_and_hold_a_half_elsewhere(flow_rows):
    cfg = settings(flow_rows=flow_rows, flow_fraction=0.25)
    drawn = draws(400, cfg)
    told, flow = improved.sample_guidance(drawn, cfg), np.asarray(common.is_flow(drawn, cfg))
    t_min, t_max = np.asarray(told["t_min"]), np.asarray(told["t_max"])
    assert 0 < flow.sum() < 400
    assert (t_min[flow] == 0).all() and (t_max[flow] == 1).all()
    assert (t_min[~flow] > 0).all() and (t_min[~flow] < 0.5).all() and t_min.max() > 0.45
    assert (t_max[~flow] < 1).all() and (t_max[~flow] > 0.5).all() and t_max.min() < 0.55


class Told:
    """A network whose velocities say what it was told, so that guidance can be computed by hand."""

    takes_tape = True

    num_classes = 9

    def __init__(self):
        self.calls = []

    def __call__(self, z, t, r, y, omega, t_min, t_max, heads="u", tape=None):
        self.calls.append((len(z), heads, under_jvp(tape)))
        v = (y + omega / 10 + 100 * t_min + 1000 * (1 - t_max))[:, None, None, None] + z
        u = (t - r)[:, None, None, None] * z
        velocities = tuple({"u": u, "v": v}[head] for head in heads)
        return velocities if len(velocities) > 1 else velocities[0]


def batch_of(num):
    return {
        "image": torch.randn(num, 1, 2, 2, generator=torch.Generator().manual_seed(1)),
        "label": torch.arange(num) % 9,
    }


@pytest.mark.parametrize(
    ("changes", "calls"),
    [
        ({}, [(16, "uv", False), (16 + 8, "v", False), (8, "u", True)]),
        ({"flow_fraction": 0.75}, [(16, "uv", False), (16 + 4, "v", False), (4, "u", True)]),
        ({"flow_fraction": 1.0}, [(16, "uv", False), (16, "v", False)]),
        ({"flow_fraction": 0.0}, [(16, "uv", False), (32, "v", False), (16, "u", True)]),
        ({"flow_rows": "front"}, [(16, "uv", False), (32, "v", False), (16, "u", True)]),
        ({"guidance": False}, [(16, "uv", False), (8, "v", False), (8, "u", True)]),
        ({"guidance": False, "flow_fraction": 1.0}, [(16, "uv", False)]),
    ],
)
def test_a_step_runs_as_few_forwards_as_the_mathematics_allows(changes, calls):
    """All rows, all without a class and the rest with theirs, then the tangent of the rest."""
    cfg, net = settings(**changes), Told()
    improved.loss(net, batch_of(16), draws(16, cfg), cfg)
    assert net.calls == calls


def test_guidance_by_hand():
    """Of one row each: inside its interval, outside, without its label, and a flow row, guided at any time."""
    cfg = settings(flow_rows="coin", label_drop_prob=0.5)
    y, v, z = torch.tensor([2, 3, 4, 5]), torch.zeros(4, 1, 2, 2), torch.zeros(4, 1, 2, 2)
    t, kept = torch.tensor([0.5, 0.9, 0.5, 0.95]), torch.tensor([True, True, False, True])
    given = {
        "omega": torch.full((4,), 4.0), "t_min": torch.tensor([0.2, 0.2, 0.2, 0.0]),
        "t_max": torch.tensor([0.8, 0.8, 0.8, 1.0]),
    }  # fmt: skip
    v_c, v_g = improved.guide(Told(), z, v, t, y, given, kept, z[:0], cfg)
    np.testing.assert_allclose(v_c[:, 0, 0, 0], [2.4, 3.1, 4.4, 5.4], rtol=1e-6)
    guided = [0.75 * (2.4 - 9.1), 0.0, 0.0, 0.75 * (5.4 - 9.1)]
    np.testing.assert_allclose(v_g[:, 0, 0, 0], guided, rtol=1e-5, atol=1e-6)


def test_the_network_is_told_the_drawn_interval_but_guidance_the_whole_one():
    cfg, net, batch = settings(flow_fraction=0.0, label_drop_prob=0.0), Told(), batch_of(6)
    drawn = draws(6, cfg)
    _, aux = improved.loss(net, batch, drawn, cfg)
    z, _ = improved.path(batch["image"], drawn.noise, aux["t"], cfg)
    told = batch["label"] + aux["omega"] / 10 + 100 * aux["t_min"] + 1000 * (1 - aux["t_max"])
    np.testing.assert_allclose(aux["v_head"] - z, told[:, None, None, None] + 0 * z, rtol=1e-4)
    inside = (aux["t"] >= aux["t_min"]) & (aux["t"] <= aux["t_max"])
    told = batch["label"] + torch.where(inside, aux["omega"], 1) / 10
    np.testing.assert_allclose(aux["v_c"] - z, told[:, None, None, None] + 0 * z, rtol=1e-4)
    derivative = z + (aux["t"] - aux["r"])[:, None, None, None] * aux["v_c"]
    np.testing.assert_allclose(aux["du_dt"], derivative, rtol=1e-4)


def test_sampling_tells_the_network_its_guidance():
    c, seen = options.get_config("imf_dit", "improved").sample, []
    c.update(steps=2, omega=3.5, interval=(0.25, 0.75))

    def net(z, t, r, y, omega, t_min, t_max):
        seen.append((omega.shape, t_min.shape))
        return (y + omega + t_min / t_max)[:, None, None, None] * torch.ones_like(z)

    given = improved.sampling_conditions(c)
    assert given == {"omega": 3.5, "t_min": 0.25, "t_max": 0.75}
    images = improved.sample(net, torch.zeros(3, 1, 2, 2), torch.tensor([0, 1, 2]), given, c)
    np.testing.assert_allclose(images[:, 0, 0, 0], [-3.5 - 1 / 3, -4.5 - 1 / 3, -5.5 - 1 / 3], rtol=1e-5)
    assert seen[0] == ((3,), (3,))
