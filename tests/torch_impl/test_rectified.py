"""What Re-MeanFlow's parts promise, beyond what the parity suite compares."""

import make_draws
import numpy as np
import pytest
import torch

from meanflow.config import options
from meanflow.data.draws import arrange
from torch_impl.methods import common, rectified
from torch_impl.models.tape import under_jvp

TIME_MAX = 80 / 81
SCALES = {"omega_sampler": "uniform", "omega_max": 3.5}


def settings(**changes):
    cfg = options.get_config("dit", "rectified").method
    cfg.update({"flow_fraction": 0.5} | changes)
    return cfg


def draws(cfg, num=8, seed=0):
    """Return draws in float64."""
    drawn = make_draws.in_torch(cfg, (num, 1, 2, 2), seed)
    return rectified.Draws(*(a.double() for a in drawn))


def batch():
    image, noise = torch.from_numpy(np.random.RandomState(1).randn(2, 8, 1, 2, 2))
    return {"image": image, "noise": noise, "label": torch.arange(8)}


def given(**fields):
    """Return draws of these fields, a number a row each, the others zero."""
    num = len(next(iter(fields.values())))
    rows = {name: torch.tensor(fields.get(name, [0] * num), dtype=torch.float64) for name in rectified.Draws._fields}
    return rectified.Draws(**rows)


def wide(*rows):
    """Return arrays [b] as [b 1 1 1]."""
    return tuple(a.reshape(-1, 1, 1, 1) for a in rows)


class Curved:
    """A nonlinear network of everything it is told, with one parameter a class; remembers (rows, under a JVP)."""

    takes_tape = True

    num_classes = 9

    def __init__(self, parameter=1.0):
        self.parameter, self.calls = parameter * torch.ones(10, dtype=torch.float64), []

    def __call__(self, z, t, r, y, tape=None):
        self.calls.append((len(y), under_jvp(tape)))
        parameter, t, r, y = wide(self.parameter[y], t, r, y)
        return parameter * torch.sin(z * (1 + y / 10) + t * t - r / 2)


class Label:
    """A velocity that is the label plus the state."""

    num_classes = 9

    def __call__(self, z, t, r, y):
        return z + y[:, None, None, None]


def test_a_draw_is_a_function_of_its_key_and_no_two_draws_are_the_same():
    first, same, other = (draws(settings(), seed=seed) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first, same, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert len({tuple(a.tolist()) for a in first}) == len(first._fields) == 6


def test_draws_are_uniforms_but_for_the_normal_of_the_interval():
    """Bounds of five standard deviations."""
    num = 20_000
    for name, a in draws(settings(), num)._asdict().items():
        mean, std = (0, 1) if name == "interval" else (0.5, 12**-0.5)
        assert a.shape == (num,)
        assert float(a.mean()) == pytest.approx(mean, abs=5 * std * num**-0.5)
        assert float(a.std()) == pytest.approx(std, rel=0.03)
        assert (float(a.min()) >= 0 and float(a.max()) < 1) == (name != "interval")


def test_times_have_the_density_of_a_u():
    """Of exp(4t) + exp(4(1-t)), with all that is beyond 80/81 at that time; bounds of five standard deviations."""
    num, edges = 200_000, np.linspace(0, TIME_MAX, 25)
    cfg = settings(flow_fraction=0.0)
    t = rectified.sample_times(draws(cfg, num), cfg)[0].numpy()
    assert t.min() >= 1e-5 and t.max() == TIME_MAX
    share = (np.exp(4 * edges) - np.exp(4 * (1 - edges))) / (2 * (np.exp(4) - 1)) + 0.5  # below each edge
    counts = [*np.histogram(t[t < TIME_MAX], edges)[0], (t == TIME_MAX).sum()]
    for count, p in zip(counts, [*np.diff(share), 1 - share[-1]], strict=True):
        assert count / num == pytest.approx(p, abs=5 * (p * (1 - p) / num) ** 0.5 + 1e-4)


def u_shaped(t):
    """Return the uniforms of which these times come."""
    return np.expm1(4 * (np.asarray(t) - 1e-5) / (1 - 2e-5)) / np.expm1(4)


def test_times_by_hand():
    """Mirrored; of a long way r = 0; and the long way from above 0.8 goes to 0, but from 0.8 itself it does not."""
    t = [0.5, 0.3, 0.2, 0.95, 0.95, 0.79, 0.81, 1.0]
    drawn = given(times=u_shaped(t), second=[0.2, 0.5] + [0.1] * 6, interval=[0, 0, 0, 0, 1.5, 0.8, 0.8, 0])
    found = rectified.sample_times(drawn, settings(flow_fraction=0.0, interval_mean=-0.8))
    far, further, furthest = (1 / (1 + np.exp(0.8 - a)) for a in (0, 0.8, 1.5))
    assert furthest > 0.95 - 0.4 and further > 0.81 - 0.4
    expected = [0.5, 0.7, 0.2, 0.95, 0.95, 0.79, 0.81, TIME_MAX]
    np.testing.assert_allclose(found[0], expected)
    ends = [0.5 - far, 0.7 - far, 0, 0.95 - far, 0, 0.79 - further, 0, TIME_MAX - far]
    np.testing.assert_allclose(found[1], ends, atol=1e-12)


def test_intervals_are_logit_normal():
    drawn = given(times=u_shaped([0.7, 0.7]), interval=[-2.0, -1.0])
    t, r = rectified.sample_times(drawn, settings(flow_fraction=0.0, interval_mean=0.3, interval_std=0.5))
    np.testing.assert_allclose(torch.log((t - r) / (1 - (t - r))), [-0.7, -0.2])


def test_uniform_times():
    drawn = given(times=[0.2, 0.6, 0.99], second=[0.5, 0.9, 0.25], interval=[5.0, 5.0, 5.0])
    t, r = rectified.sample_times(drawn, settings(time_sampler="uniform", flow_fraction=0.0))
    np.testing.assert_allclose(t, [0.2, 0.6, 0.99])  # not clamped at 80/81, unlike re2_truncate
    np.testing.assert_allclose(r, [0.1, 0.54, 0.99 / 4])


@pytest.mark.parametrize(
    ("rows", "expected"), [("split", [1, 0, 1, 0, 1, 0, 1, 0]), ("front", [1, 1, 1, 1, 0, 0, 0, 0]),
                           ("coin", [0, 1, 0, 0, 0, 0, 1, 1])]
)  # fmt: skip
@pytest.mark.parametrize("sampler", ["re2_truncate", "uniform"])
def test_flow_rows(rows, expected, sampler):
    cfg = settings(flow_rows=rows, time_sampler=sampler)
    coin = torch.tensor([0.5, 0.4, 0.9, 0.6, 0.7, 0.8, 0.1, 0.49])
    drawn = draws(cfg)._replace(coin=torch.from_numpy(arrange({"coin": coin.numpy()}, cfg)["coin"]))
    t, r = rectified.sample_times(drawn, cfg)
    assert (t == r).tolist() == [bool(flow) for flow in expected]
    assert torch.equal(t, rectified.sample_times(drawn, settings(time_sampler=sampler))[0])


def guided(y, cfg, flow=13.0, omega=(0.0, 0.2, 0.4, 1.0), v=1.0):
    """Return a number a row of the guided velocity at state 10, where flow rows predict `flow`."""
    rows = common.split_rows(4, cfg)
    z = torch.full((4, 1, 2, 2), 10.0, dtype=torch.float64)
    t, u_flow, drawn = z[:, 0, 0, 0] / 20, flow * torch.ones_like(z[: rows.groups * rows.flow]), given(omega=omega)
    v_g = rectified.guide(Label(), z, v * torch.ones_like(z), t, torch.tensor(y), u_flow, rows, drawn, cfg)
    return v_g[:, 0, 0, 0].tolist()


def test_every_row_has_a_guidance_scale_of_its_own():
    """Scales 1, 1.5, 2 and 3.5; the first and the third row are flow rows, and the last has no label."""
    w, k = [1, 1, 1, 2.5], [0, 1 - 1 / 1.5, 1 - 1 / 2, 1 - 2.5 / 3.5]
    own = [13, 12, 13, 19]
    expected = [w[i] * 1 + k[i] * own[i] + (1 - w[i] - k[i]) * 19 for i in range(4)]
    assert guided([1, 2, 3, 9], settings(**SCALES)) == pytest.approx(expected)
    assert expected[3] == pytest.approx(2.5 * 1 - 1.5 * 19)  # guided, though without label


def test_a_drawn_scale_is_the_effective_one():
    """A model whose own velocity is guided by it is its own target."""
    for omega in (0.0, 0.3, 0.5, 1.0):
        scale = 1 + omega * 2.5
        own = 19 + scale * (5 - 19)
        found = guided([1] * 4, settings(**SCALES, flow_fraction=1.0), flow=own, omega=[omega] * 4, v=5.0)
        assert found == pytest.approx([own] * 4)


def test_a_constant_scale():
    expected = [1.4 + 0.3 * own - 0.7 * 19 for own in (13, 12, 13, 19)]
    assert guided([1, 2, 3, 9], settings(omega=1.4, kappa=0.3)) == pytest.approx(expected)
    assert guided([1, 2, 3, 9], settings(guidance=False, omega=1.4, kappa=0.3)) == [1] * 4


@pytest.mark.parametrize(
    ("changes", "calls"),
    [
        ({}, [(8, False), (12, False), (4, True)]),
        ({"guidance": False}, [(8, False), (4, True)]),
        ({"flow_rows": "coin"}, [(8, False), (16, False), (8, True)]),
        ({"flow_fraction": 1.0}, [(8, False), (8, False)]),
    ],
)
def test_a_step_runs_as_few_forwards_as_the_mathematics_allows(changes, calls):
    """All rows, guidance as one batch, then the tangent of the rest."""
    cfg, net = settings(**changes), Curved()
    rectified.loss(net, batch(), draws(cfg), cfg)
    assert net.calls == calls


def test_the_noise_is_the_one_that_its_image_was_made_from():
    cfg, given = settings(guidance=False), batch()
    assert "noise" not in rectified.Draws._fields
    _, aux = rectified.loss(Curved(), given, draws(cfg), cfg)
    torch.testing.assert_close(aux["v"], given["noise"] - given["image"])
    assert torch.equal(aux["v_g"], aux["v"])
    (t,) = wide(aux["t"])
    z = (1 - t) * given["image"] + t * given["noise"]
    torch.testing.assert_close(aux["u"], Curved()(z, aux["t"], aux["r"], aux["y"]))


def test_far_pairs_have_no_weight_and_no_gradient():
    """The mean is that of all rows; a parameter a label shows whose gradient it is."""
    cfg, free = (settings(distance_clip=clip, label_drop_prob=0.0, guidance=False) for clip in (2.0, 0.0))
    near = (batch()["noise"] - batch()["image"]).square().mean((1, 2, 3)) < 2
    assert 0 < near.sum() < 8

    (clipped, aux), (_, whole) = (rectified.loss(Curved(), batch(), draws(cfg), c) for c in (cfg, free))
    for name in ("weight", "row_loss"):
        assert torch.equal(aux[name], torch.where(near, whole[name], 0))
    assert float(clipped) == pytest.approx(float(torch.where(near, whole["row_loss"], 0).mean()))
    assert bool((whole["weight"] > 0).all())
    parameter = torch.ones(10, dtype=torch.float64, requires_grad=True)
    rectified.loss(Curved(parameter), batch(), draws(cfg), cfg)[0].backward()
    assert torch.equal(parameter.grad[:8].abs() > 0, near)


def test_no_sampler_tells_a_time_beyond_the_largest():
    """From 1, so that one step is n - u(n, 80/81, 0), as in the official code."""
    c = options.get_config().sample
    for sampler, tos in (("euler", [0.0]), ("velocity", [80 / 81])):
        c.update(sampler=sampler, steps=1)
        [step] = rectified.sampling_steps(c)
        assert (step.t, [step.to], step.end, step.keep, step.move) == (80 / 81, tos, 0.0, 1.0, 1.0)
    c.update(sampler="euler", times=(1.0, 0.99, 0.5, 0.0))
    assert [(step.t, step.to) for step in rectified.sampling_steps(c)] == [
        (80 / 81, 80 / 81),
        (80 / 81, 0.5),
        (0.5, 0.0),
    ]
