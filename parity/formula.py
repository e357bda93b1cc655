"""MeanFlow's objective written a second time, from the paper, in numpy around a bare network.

Source: arXiv:2505.13447, algorithm 1 and eqs. 10, 11, 19 to 22.  It knows no static split, shares no forward and runs
the JVP on all rows, so it shows that what the methods save leaves the mathematics unchanged.
"""

import numpy as np


def loss(forward, jvp, batch, draws, cfg):
    """Return a dict of t, r, z, y, v_g, u, du_dt, target, err, weight, row_loss, and scale: d row_loss / d err.

    forward: (z, t, r, y) -> u.  jvp: (z, t, r, y, tangent) -> (u, du_dt).  batch: x [b h w c], y [b], null label.
    draws: noise, times, coin, drop by name, see a method's `Draws`.  cfg: `config.method`.  All in float64.
    """
    x, y, null = batch
    noise, times, coin, drop = (draws[name] for name in ("noise", "times", "coin", "drop"))
    if cfg.time_sampler == "logit_normal":
        times = 1 / (1 + np.exp(-(np.array(cfg.time_mean) + np.array(cfg.time_std) * times)))
    t, r = times[:, 0], times[:, 1]
    if cfg.time_order == "sorted":
        t, r = np.maximum(t, r), np.minimum(t, r)
    r = np.where(flow_rows(coin, cfg), t, np.minimum(t, r))
    z, v = state_and_velocity(x, noise, t[:, None, None, None], cfg)
    lost = drop < cfg.label_drop_prob
    lost = np.arange(len(y)) < lost.sum() if cfg.label_drop == "front" else lost
    y = np.where(lost, null, y)
    guided = ~lost & (cfg.guidance_start <= t) & (t <= cfg.guidance_end) & cfg.guidance
    w, k = cfg.omega, cfg.kappa
    v_guided = w * v + k * forward(z, t, t, y) + (1 - w - k) * forward(z, t, t, np.full_like(y, null))
    v_g = np.where(guided[:, None, None, None], v_guided, v)
    u, du_dt = jvp(z, t, r, y, v_g)
    target = v_g - (t - r)[:, None, None, None] * du_dt
    err = np.square(u - target).sum((1, 2, 3))
    weight, row_loss, scale = weigh(err, cfg)
    return {
        "t": t, "r": r, "z": z, "y": y, "v_g": v_g, "u": u, "du_dt": du_dt, "target": target, "err": err,
        "weight": weight, "row_loss": row_loss, "scale": scale,
    }  # fmt: skip


def flow_rows(coin, cfg):
    """Return [b] bool: the rows with r = t.  `split` spreads int(b * fraction) of them evenly over the batch."""
    num_rows = len(coin)
    if cfg.flow_rows == "coin":
        return coin < cfg.flow_fraction
    num_flow = int(num_rows * cfg.flow_fraction)
    if cfg.flow_rows == "front":
        return np.arange(num_rows) < num_flow
    groups = np.gcd(num_rows, num_flow)
    return np.tile(np.arange(num_rows // groups) < num_flow // groups, groups)


def state_and_velocity(x, e, t, cfg):
    """Return z(t) and dz/dt on the linear or the cosine path; t broadcasts against x and e."""
    if cfg.path == "linear":
        return (1 - t) * x + t * e, e - x
    half_pi = np.pi / 2
    z = np.cos(half_pi * t) * x + np.sin(half_pi * t) * e
    return z, half_pi * (np.cos(half_pi * t) * e - np.sin(half_pi * t) * x)


def weigh(err, cfg):
    """Return weight, weighted loss and its derivative by err under a constant weight, [b] each."""
    if cfg.weighting == "uniform":
        return np.ones_like(err), err, np.ones_like(err)
    measured = err**2 if cfg.weighting == "adaptive_squared" else err
    weight = 1 / (measured + cfg.adaptive_eps) ** cfg.adaptive_power
    return weight, weight * measured, weight * (2 * err if cfg.weighting == "adaptive_squared" else 1)
