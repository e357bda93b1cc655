"""The steps of the samplers, on flows in closed form: what is exact is exact, the rest errs in its order."""

import itertools
import math

import numpy as np
import pytest

from meanflow.config import options
from meanflow.errors import UserError
from meanflow.sampling import steps as sampling

MEAN, STD = 2.0, 0.5  # of the data
PATHS = pytest.mark.parametrize("path", ["linear", "cosine"])


def settings(**changes):
    flow = changes.get("sampler") in ("heun", "sde") or "diffusion_scale" in changes
    cfg = options.get_config(method="flow" if flow else "meanflow").sample
    cfg.update(changes)
    return cfg


def factors(t, path):
    """Return the factors of data and noise at times t, and their derivatives."""
    if path == "linear":
        return 1 - t, t, -np.ones_like(t), np.ones_like(t)
    cos, sin, rate = np.cos(t * math.pi / 2), np.sin(t * math.pi / 2), math.pi / 2
    return cos, sin, -rate * sin, rate * cos


class Gaussian:
    """Normal data in closed form: the velocity, or the average velocity, along a path."""

    def __init__(self, path, average=False):
        self.path, self.average = path, average

    def __call__(self, z, t, r):
        (a, s, da, ds), (a_r, s_r, _, _) = factors(t, self.path), factors(r, self.path)
        variance, variance_r = (a * STD) ** 2 + s**2, (a_r * STD) ** 2 + s_r**2
        if not self.average:
            return da * MEAN + (a * da * STD**2 + s * ds) / variance * (z - a * MEAN)
        there = a_r * MEAN + (variance_r / variance) ** 0.5 * (z - a * MEAN)
        return (z - there) / (t - r)


def carry(net, z, cfg, listed, fresh):
    """Return what the steps make of the noise z [b] and the fresh noise [steps b], without guidance."""
    for s, e in zip(listed, fresh, strict=True):
        u = net(z, s.t, s.to)
        if cfg.sampler == "heun" and s is not listed[-1]:
            z = z - s.move / 2 * (u + net(z - s.move * u, s.end, s.end))
        else:
            z = s.keep * z - s.move * u + s.add * e
    return z


def moments(net, cfg, listed):
    """Return mean and deviation of the samples of a linear network: from no noise, and from one unit of each."""
    num = len(listed)
    units = np.eye(num + 1, num + 2, 1)  # the noise, then that of each step; in the first column there is none
    mean, *each = carry(net, units[0], cfg, listed, units[1:])
    return mean, math.sqrt(sum((a - mean) ** 2 for a in each))


@pytest.mark.parametrize("times", [(0.5,), (0.2, 0.5), (1.0, 1.0), (1.5, 0.0), (1.0, -0.1)])
def test_sampling_times_that_do_not_fall_are_refused(times):
    with pytest.raises(UserError, match="must fall"):
        sampling.sampling_times(settings(times=times))


def test_sampling_times():
    assert sampling.sampling_times(settings(steps=4)) == (1.0, 0.75, 0.5, 0.25, 0.0)
    assert sampling.sampling_times(settings(steps=4, times=(0.9, 0.1), shift=3.0)) == (0.9, 0.1)
    assert sampling.sampling_times(settings(steps=3, sampler="sde")) == pytest.approx((1.0, 0.50005, 1e-4, 0.0))
    assert sampling.sampling_times(settings(steps=1, sampler="sde")) == (1.0, 0.0)


@pytest.mark.parametrize("sampler", ["euler", "sde"])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_shifted_times_fall_from_1_to_0_and_a_shift_above_1_stays_longer_at_noise(sampler, steps):
    times = sampling.sampling_times(settings(sampler=sampler, steps=steps, shift=1.5))
    assert times[0] == 1 and times[-1] == 0 and len(times) == steps + 1
    assert all(a > b for a, b in itertools.pairwise(times))
    for shifted, t in zip(times, sampling.sampling_times(settings(sampler=sampler, steps=steps)), strict=True):
        assert shifted == pytest.approx(1.5 * t / (1 + 0.5 * t)) and (shifted > t or t in (0, 1))


@PATHS
@pytest.mark.parametrize(("sampler", "steps"), [("euler", 1), ("euler", 3), ("restart", 3), ("ctm", 3)])
def test_samplers_of_the_exact_flow_map_are_exact(path, sampler, steps):
    """In as many steps as one likes: mean and deviation of the data."""
    cfg = settings(path=path, sampler=sampler, steps=steps, gamma=0.6)
    found = moments(Gaussian(path, average=True), cfg, sampling.flow_map_steps(cfg))
    assert found == pytest.approx((MEAN, STD), rel=1e-10)


def test_the_official_ctm_adds_too_little_noise():
    cfg = settings(sampler="ctm", steps=3, gamma=0.6, official=True)
    mean, std = moments(Gaussian("linear", average=True), cfg, sampling.flow_map_steps(cfg))
    assert mean == pytest.approx(MEAN) and std < 0.99 * STD


@PATHS
def test_the_official_ctm_knows_the_linear_path_alone(path):
    """keep is (1 - end) / (1 - to), and add 1 - keep; the last step keeps all."""
    steps = sampling.flow_map_steps(settings(path=path, sampler="ctm", steps=3, gamma=0.6, official=True))
    assert [step.keep for step in steps] == pytest.approx([(1 - s.end) / (1 - s.to) for s in steps])
    assert [step.add for step in steps] == pytest.approx([1 - step.keep for step in steps])
    assert steps[-1].keep == 1 and 0 < steps[0].keep < 1


@PATHS
def test_renoising_keeps_the_share_of_signal_and_of_noise(path):
    for start, end in ((0.0, 0.3), (0.2, 0.8), (0.5, 0.5), (0.4, 1.0)):
        keep, add = sampling.renoise(start, end, path)
        (a, s, _, _), (a_end, s_end, _, _) = (factors(np.float64(t), path) for t in (start, end))
        assert keep * a == pytest.approx(float(a_end), abs=1e-12)
        assert math.hypot(keep * s, add) == pytest.approx(float(s_end), abs=1e-12)


@PATHS
def test_ctm_goes_from_euler_to_restart(path):
    given = {"path": path, "steps": 4, "shift": 1.5}
    euler, restart = (sampling.flow_map_steps(settings(sampler=name, **given)) for name in ("euler", "restart"))
    for gamma, same in ((0.0, euler), (1.0, restart)):
        assert sampling.flow_map_steps(settings(sampler="ctm", gamma=gamma, **given)) == same
    between = sampling.flow_map_steps(settings(sampler="ctm", gamma=0.5, **given))
    assert all(a.to >= b.to >= c.to for a, b, c in zip(euler, between, restart, strict=True))
    assert all(step.add > 0 for step in restart[:-1] + between[:-1])
    assert euler[-1] == between[-1] == restart[-1] and restart[-1].add == 0


@PATHS
@pytest.mark.parametrize(("sampler", "order"), [("euler", 1), ("heun", 2)])
def test_the_error_falls_with_the_steps_in_its_order(path, sampler, order):
    errors = []
    for steps in (16, 32):
        cfg = settings(path=path, sampler=sampler, steps=steps)
        errors.append(abs(moments(Gaussian(path), cfg, sampling.flow_steps(cfg))[1] - STD))
    assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.15)


@PATHS
@pytest.mark.parametrize("scale", [0.5, 1.0])
def test_sde_keeps_mean_and_deviation(path, scale):
    """Its error falls with the steps, in first order, as Euler's."""
    errors = []
    for steps in (60, 120):
        cfg = settings(path=path, sampler="sde", steps=steps, diffusion_scale=scale)
        mean, std = moments(Gaussian(path), cfg, sampling.flow_steps(cfg))
        assert mean == pytest.approx(MEAN, rel=0.02)
        errors.append(abs(std - STD))
    assert errors[1] < 0.02 * STD and errors[0] / errors[1] == pytest.approx(2, rel=0.3)


@PATHS
def test_sde_with_the_coefficients_of_elbo_begins_below_1(path):
    times = (*(1 - 0.01 * 90 ** (i / 80) for i in range(81)), 0.05, 0.01, 0.0)
    cfg = settings(path=path, sampler="sde", diffusion="elbo", times=times)
    assert moments(Gaussian(path), cfg, sampling.flow_steps(cfg)) == pytest.approx((MEAN, STD), rel=0.05)
    with pytest.raises(UserError, match=r"elbo is infinite at t = 1: choose sigma \(--diffusion=sigma\), or times"):
        sampling.flow_steps(settings(path=path, sampler="sde", diffusion="elbo", steps=4))


@PATHS
@pytest.mark.parametrize("steps", [1, 2, 50])
def test_steps_of_sde_are_finite_and_the_last_one_adds_no_noise(path, steps):
    steps = sampling.flow_steps(settings(path=path, sampler="sde", steps=steps))
    assert np.isfinite(np.array(steps, np.float64)).all()
    assert steps[-1].add == 0 and all(step.add > 0 for step in steps[:-1])


@PATHS
def test_sde_without_noise_is_euler(path):
    sde, euler = (settings(path=path, sampler=name, times=(1.0, 0.6, 0.1, 0.0), diffusion_scale=0.0)
                  for name in ("sde", "euler"))  # fmt: skip
    assert sampling.flow_steps(sde) == sampling.flow_steps(euler)


@PATHS
def test_the_score_follows_from_the_velocity(path):
    t, z = np.array([[0.1, 0.5, 0.9, 1.0], [1.0, -2.0, 0.5, 3.0]])
    a, s, _, _ = factors(t, path)
    score = -(z - a * MEAN) / ((a * STD) ** 2 + s**2)
    v = Gaussian(path)(z, t, t)
    for i in range(4):
        of_v, of_z = sampling.score_factors(float(t[i]), path)
        assert float(of_v * v[i] + of_z * z[i]) == pytest.approx(float(score[i]))


@pytest.mark.parametrize("sampler", ["restart", "ctm"])
def test_the_last_step_is_euler_s_wherever_it_ends(sampler):
    c = options.get_config().sample
    c.update(sampler=sampler, times=(1.0, 0.6, 0.3))
    last = sampling.flow_map_steps(c)[-1]
    assert (last.t, last.to, last.end, last.keep, last.move, last.add) == (0.6, 0.3, 0.3, 1.0, pytest.approx(0.3), 0.0)


@PATHS
def test_velocity_is_euler_s_sampler_of_a_flow_model(path):
    """By u(z, t, t): the steps of euler, but for what the network is told, and all that a flow model's euler does."""
    given = {"path": path, "times": (0.95, 0.6, 0.25, 0.0), "cfg_scale": 2.0, "interval": (0.1, 0.7)}
    euler, velocity = (sampling.flow_map_steps(settings(sampler=name, **given)) for name in ("euler", "velocity"))
    assert velocity == [step._replace(to=step.t) for step in euler]
    assert velocity == sampling.flow_steps(settings(**given))


def test_velocity_errs_in_first_order_where_euler_of_a_flow_map_is_exact():
    errors = []
    for steps in (16, 32):
        cfg = settings(sampler="velocity", steps=steps)
        errors.append(abs(moments(Gaussian("linear"), cfg, sampling.flow_map_steps(cfg))[1] - STD))
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.15)
