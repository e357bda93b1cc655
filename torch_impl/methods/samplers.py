"""From noise to data: the samplers of flow maps (average velocities) and of flow models (velocities).

A sampler is a list of steps, plain numbers made once, and one loop over them.  Every step but Heun's is
z <- keep z - move u(z, t, to) + add e, with fresh noise e.  Source: arXiv:2505.13447, algorithm 2 (euler);
kyungmnlee/dmf, samplers.py (all of them).
"""

import itertools
import math
from typing import NamedTuple

import torch

from meanflow.errors import UserError

SDE_END = 1e-4  # time from which sde takes its last step, without noise: at 0 the score is infinite


class Step(NamedTuple):
    """One step from time t, in numbers."""

    t: float  # before the step
    to: float  # the network is told (t, to)
    end: float  # time after the step
    keep: float  # factor of z
    move: float  # factor of the velocity
    add: float  # factor of the fresh noise
    guided: bool  # t is in the interval of guidance


def sampling_times(cfg):
    """Return the times of sampling, from noise to data: cfg.times, or cfg.steps uniform steps from 1 to 0, shifted.

    The shift s takes a uniform time t to s t / (1 + (s - 1) t).  sde: uniform steps to `SDE_END`, and one to 0.
    Raises UserError unless they fall strictly and stay in [0, 1].
    """
    last = cfg.steps - 1
    uniform = [1 - i / cfg.steps for i in range(cfg.steps + 1)]
    if cfg.sampler == "sde":
        uniform = [1 - (1 - SDE_END) * i / max(last, 1) for i in range(cfg.steps)] + [0.0]
    times = tuple(cfg.times) or tuple(cfg.shift * t / (1 + (cfg.shift - 1) * t) for t in uniform)
    if len(times) < 2 or any(a <= b for a, b in itertools.pairwise(times)) or times[0] > 1 or times[-1] < 0:
        raise UserError(f"sampling times must fall from at most 1 to at least 0, in one step or more, not {times}")
    return times


def flow_map_steps(cfg):
    """Return the steps of a model of the average velocity, by cfg.sampler.

    `euler`: from time to time.  `restart`: to 0, then noise anew up to the next time.  `ctm`: to a time between 0 and
    the next, sqrt(1 - gamma^2) of it, then noise anew; gamma 0 is euler, 1 is restart.  The noise is what the path
    holds at the next time; cfg.official, of ctm: 1 - keep, which is less, with the keep of the linear path whatever
    the path is.  The last step is euler's.  `velocity`: euler's, by the velocity at the time before the step, of which
    u(z, t, t) is the model's own.
    """
    steps, times = [], sampling_times(cfg)
    share = {"restart": 0.0, "ctm": math.sqrt(1 - cfg.gamma**2)}.get(cfg.sampler, 1.0)
    for t, end in itertools.pairwise(times):
        if cfg.sampler == "velocity":
            steps.append(Step(t, t, end, 1.0, t - end, 0.0, is_guided(t, cfg)))
            continue
        to = end if end == times[-1] else end * share
        official = cfg.official and cfg.sampler == "ctm"
        keep, add = renoise(to, end, "linear" if official else cfg.path)
        add = 1 - keep if official else add
        steps.append(Step(t, to, end, keep, keep * (t - to), add, is_guided(t, cfg)))
    return steps


def renoise(start, end, path):
    """Return the factors of a state at time `start` and of fresh noise whose sum is a state at `end` >= start."""
    (signal, noise), (signal_end, noise_end) = (signal_and_noise(time, path)[:2] for time in (start, end))
    keep = signal_end / signal
    return keep, math.sqrt(max(noise_end**2 - (keep * noise) ** 2, 0.0))


def flow_steps(cfg):
    """Return the steps of a flow model, by cfg.sampler: `euler`, `heun` or `sde` (Euler-Maruyama).

    sde: the drift v - g^2/2 score, with g^2 = diffusion(t), and noise g sqrt(dt), but none in the last step.
    cfg.official: euler and heun stand still where they are not guided.  Raises UserError if g^2 is infinite.
    """
    steps, times = [], sampling_times(cfg)
    for t, end in itertools.pairwise(times):
        guided, dt = is_guided(t, cfg), t - end
        if cfg.sampler == "sde":
            g2 = diffusion(t, cfg)
            of_v, of_z = score_factors(t, cfg.path)
            last = end == times[-1]
            keep, move = 1 + dt * g2 / 2 * of_z, dt * (1 - g2 / 2 * of_v)
            steps.append(Step(t, t, end, keep, move, 0.0 if last else math.sqrt(g2 * dt), guided))
        else:
            still = cfg.official and not (guided and cfg.cfg_scale != 1)
            steps.append(Step(t, t, end, 1.0, 0.0 if still else dt, 0.0, guided))
    return steps


def signal_and_noise(t, path):
    """Return the factors of data and of noise on the path at time t, and the derivatives of both."""
    if path == "cosine":
        angle, rate = t * math.pi / 2, math.pi / 2
        return math.cos(angle), math.sin(angle), -rate * math.sin(angle), rate * math.cos(angle)
    return 1 - t, t, -1.0, 1.0


def score_factors(t, path):
    """Return (of_v, of_z): the score at time t > 0 is of_v v + of_z z, with the velocity v at the state z."""
    a, s, da, ds = signal_and_noise(t, path)
    variance = s**2 - a / da * ds * s
    return a / da / variance, -1 / variance


def diffusion(t, cfg):
    """Return g^2 of the stochastic sampler at time t, by cfg.diffusion.  Raises UserError where it is infinite.

    `sigma`: 2 sigma.  `elbo`: 2 sigma (sigma' - sigma alpha'/alpha), alpha being the factor of the data.
    """
    a, s, da, ds = signal_and_noise(t, cfg.path)
    if cfg.diffusion == "elbo" and t == 1:
        raise UserError(
            "config.sample.diffusion=elbo is infinite at t = 1: choose sigma (--diffusion=sigma), or times that begin "
            "below 1 (--times=0.999,0.5,0); in training --config.sample.diffusion and --config.sample.times"
        )
    return cfg.diffusion_scale * (2 * s if cfg.diffusion == "sigma" else 2 * s * (ds - s * da / a))


def is_guided(t, cfg):
    """Return whether cfg_scale holds at time t."""
    return cfg.interval[0] <= t <= cfg.interval[1]


def no_conditions(cfg):
    """Return what a network is told beside (z, t, r, y) when sampling: nothing.  cfg: `config.sample`."""
    return {}


def sample_flow_map(net, noise, y, given, cfg):
    """Carry noise to data in the steps of `flow_map_steps(cfg)`; see `integrate`."""
    return integrate(net, noise, y, given, cfg, flow_map_steps(cfg))


def sample_flow(net, noise, y, given, cfg):
    """Carry noise to data in the steps of `flow_steps(cfg)`; see `integrate`."""
    return integrate(net, noise, y, given, cfg, flow_steps(cfg))


def integrate(net, noise, y, given, cfg, steps):
    """Carry noise [b c h w] to data along `steps`.  cfg: `config.sample`.

    y: [b] labels.  given: what the network is told beside (z, t, r, y), [b] each by name, and under `fresh` the noise
    that samplers draw anew, [steps - 1 b c h w].  Guidance: u(no class) + cfg_scale (u(y) - u(no class)), two forwards
    as one batch, where a step is guided.
    """
    given = dict(given)
    fresh = given.pop("fresh", None)
    if any(step.add for step in steps[:-1]) and fresh is None:
        raise ValueError(f"the sampler {cfg.sampler} draws noise anew: give `fresh`")

    def conditional(z, t, to):
        return net(z, full(z, t), full(z, to), y, **given)

    def guided(z, t, to):
        z, labels = torch.cat([z, z]), torch.cat([y, torch.full_like(y, net.num_classes)])
        told = {name: torch.cat([a, a]) for name, a in given.items()}
        u, u_null = net(z, full(z, t), full(z, to), labels, **told).chunk(2)
        return u_null + cfg.cfg_scale * (u - u_null)

    def velocity(z, t, to, is_guided):
        return guided(z, t, to) if is_guided and cfg.cfg_scale != 1 else conditional(z, t, to)

    def heun(z, u, end, dt, is_guided):
        return z - dt / 2 * (u + velocity(z - dt * u, end, end, is_guided))

    def step(z, s, corrected, e):
        u = velocity(z, s.t, s.to, s.guided)
        if cfg.sampler == "heun" and corrected:
            return heun(z, u, s.end, s.move, s.guided)
        return s.keep * z - s.move * u + (s.add * e if e is not None else 0)

    for i, s in enumerate(steps):
        corrected = i < len(steps) - 1  # Heun's last step is Euler's
        noise = step(noise, s, corrected, fresh[i] if fresh is not None and corrected else None)
    return noise


def full(z, t):
    """Return the time t for every row of z [b ...], [b]."""
    return torch.full_like(z.flatten(1)[:, 0], t)
