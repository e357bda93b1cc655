"""The steps of every sampler, as plain numbers: times, coefficients and where guidance applies.

A sampler is a list of steps, made once, and each framework's loop over them (`integrate`).  Every step but Heun's is
z <- keep z - move u(z, t, to) + add e, with fresh noise e.  Source: arXiv:2505.13447, algorithm 2 (euler);
kyungmnlee/dmf, samplers.py (all of them).
"""

import itertools
import math
from typing import NamedTuple

from meanflow.errors import UserError

SDE_END = 1e-4  # time at which the last, noiseless step of sde starts: at 0 the score is infinite


class Step(NamedTuple):
    """One step from time t."""

    t: float  # before the step
    to: float  # the network is given (t, to)
    end: float  # time after the step
    keep: float  # factor of z
    move: float  # factor of the velocity
    add: float  # factor of the fresh noise
    guided: bool  # t is inside the guidance interval


def sampling_times(cfg):
    """Return the times from noise to data: cfg.times, or cfg.steps uniform steps from 1 to 0, shifted.

    A shift s maps a uniform time t to s t / (1 + (s - 1) t).  sde: uniform steps to `SDE_END`, then one to 0.
    Raises UserError unless they decrease strictly within [0, 1].
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
    """Return the steps for a model of the average velocity, by cfg.sampler.

    `euler`: from each time to the next.  `restart`: to 0, then noise is added up to the next time.  `ctm`: to
    sqrt(1 - gamma^2) times the next time, then noise is added; gamma 0 is euler, 1 is restart.  The noise restores the
    level of the path at the next time; the official ctm (cfg.official) adds less, 1 - keep, and uses the linear path's
    keep on any path.  The last step is Euler's.  `velocity`: Euler steps by the instantaneous velocity u(z, t, t).
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
    """Return (keep, add): keep z + add e is a state at time `end` >= start, for z at `start` and fresh noise e."""
    (signal, noise), (signal_end, noise_end) = (signal_and_noise(time, path)[:2] for time in (start, end))
    keep = signal_end / signal
    return keep, math.sqrt(max(noise_end**2 - (keep * noise) ** 2, 0.0))


def flow_steps(cfg):
    """Return the steps for a flow model, by cfg.sampler: `euler`, `heun` or `sde` (Euler-Maruyama).

    sde: drift v - g^2/2 score with g^2 = diffusion(t), and noise g sqrt(dt) in every step but the last.
    cfg.official: euler and heun do not move in unguided steps.  Raises UserError if g^2 is infinite.
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
    """Return the factors of data and noise on the path at time t, then their derivatives."""
    if path == "cosine":
        angle, scale = t * math.pi / 2, math.pi / 2
        return math.cos(angle), math.sin(angle), -scale * math.sin(angle), scale * math.cos(angle)
    return 1 - t, t, -1.0, 1.0


def score_factors(t, path):
    """Return (of_v, of_z) such that the score at time t > 0 is of_v v + of_z z, with v the velocity at z."""
    a, s, da, ds = signal_and_noise(t, path)
    variance = s**2 - a / da * ds * s
    return a / da / variance, -1 / variance


def diffusion(t, cfg):
    """Return g^2 of the stochastic sampler at time t, by cfg.diffusion.  Raises UserError where it is infinite.

    `sigma`: 2 sigma.  `elbo`: 2 sigma (sigma' - sigma alpha'/alpha), where alpha is the factor of the data.
    """
    a, s, da, ds = signal_and_noise(t, cfg.path)
    if cfg.diffusion == "elbo" and t == 1:
        raise UserError(
            "config.sample.diffusion=elbo is infinite at t = 1: choose sigma (--diffusion=sigma), or times that begin "
            "below 1 (--times=0.999,0.5,0); in training --config.sample.diffusion and --config.sample.times"
        )
    return cfg.diffusion_scale * (2 * s if cfg.diffusion == "sigma" else 2 * s * (ds - s * da / a))


def is_guided(t, cfg):
    """Return whether time t is inside the guidance interval."""
    return cfg.interval[0] <= t <= cfg.interval[1]
