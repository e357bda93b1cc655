"""The objectives written a second time, from the papers, in numpy around a bare network.

They know no static split, share no forward and run the JVP on all rows, so they show that what the methods save
leaves the mathematics unchanged.
"""

import numpy as np


def meanflow(forward, jvp, batch, given, draws, cfg):
    """Return t, r, v_g, u, du_dt, target, err, weight, row_loss, and what `inputs_and_targets` adds.

    forward: (z, t, r, y, given) -> u.  jvp: (z, t, r, y, tangent, given) -> (u, du_dt).  batch: x [b h w c], y [b],
    null label.  given: what the network is given in training, by name.  draws: noise, times, coin, drop by name, see
    a method's `Draws`.  cfg: `config.method`.  All in float64.
    Source: arXiv:2505.13447, algorithm 1 and eqs. 10, 11, 19 to 22.
    """
    (x, y, null), noise = batch, draws["noise"]
    in_guidance = {name: a for name, a in given.items() if name != "dropout"}
    t, r = sorted_times(draws, cfg)
    z, v = state_and_velocity(x, noise, t[:, None, None, None], cfg)
    lost = lost_labels(draws, cfg)
    y = np.where(lost, null, y)
    guided = ~lost & (cfg.guidance_start <= t) & (t <= cfg.guidance_end) & cfg.guidance
    w, k = cfg.omega, cfg.kappa
    u_cond, u_null = (forward(z, t, t, labels, in_guidance) for labels in (y, np.full_like(y, null)))
    v_guided = w * v + k * u_cond + (1 - w - k) * u_null
    v_g = np.where(guided[:, None, None, None], v_guided, v)
    u, du_dt = jvp(z, t, r, y, v_g, given)
    target = v_g - (t - r)[:, None, None, None] * du_dt
    err = np.square(u - target).sum((1, 2, 3))
    weight, row_loss, scale = weigh(err, cfg)
    result = {
        "t": t, "r": r, "v_g": v_g, "u": u, "du_dt": du_dt, "target": target, "err": err, "weight": weight,
        "row_loss": row_loss,
    }  # fmt: skip
    return result | inputs_and_targets((z, t, r, y), given, {"u": (target, scale)})


def improved(forward, jvp, batch, _, draws, cfg):
    """Return the same of improved MeanFlow, and v_c, v_head, compound, omega, t_min, t_max and its second error.

    forward: (z, t, r, y, given, head) -> the velocity of a head.  draws: omega, t_min, t_max as well.
    Source: arXiv:2512.02012.
    """
    (x, y, null), noise = batch, draws["noise"]
    t, r = sorted_times(draws, cfg)
    h = (t - r)[:, None, None, None]
    z, v = state_and_velocity(x, noise, t[:, None, None, None], cfg)
    flow, lost = flow_rows(draws["coin"], cfg), lost_labels(draws, cfg)
    t_min, t_max = np.where(flow, 0, draws["t_min"] / 2), np.where(flow, 1, (1 + draws["t_max"]) / 2)
    omega = power_law(draws["omega"], cfg.omega_max, cfg.omega_power) if cfg.guidance else np.ones_like(t)
    w = np.where((t_min <= t) & (t <= t_max), omega, 1)
    zeros, ones = np.zeros_like(t), np.ones_like(t)
    v_c = forward(z, t, t, y, {"omega": w, "t_min": zeros, "t_max": ones}, "v")
    v_null = forward(z, t, t, np.full_like(y, null), {"omega": ones, "t_min": zeros, "t_max": ones}, "v")
    v_g = np.where((lost | (w == 1))[:, None, None, None], v, v + (1 - 1 / w)[:, None, None, None] * (v_c - v_null))
    y, given = np.where(lost, null, y), {"omega": omega, "t_min": t_min, "t_max": t_max}
    u, du_dt = jvp(z, t, r, y, v_c, given)
    v_head, compound = forward(z, t, r, y, given, "v"), u + h * du_dt
    err, err_v = (np.square(a - v_g).sum((1, 2, 3)) for a in (compound, v_head))
    (weight, row_loss, scale), (weight_v, row_loss_v, scale_v) = weigh(err, cfg), weigh(err_v, cfg)
    result = given | {
        "t": t, "r": r, "v_g": v_g, "v_c": v_c, "u": u, "v_head": v_head, "du_dt": du_dt, "compound": compound,
        "err": err, "err_v": err_v, "weight": weight, "weight_v": weight_v, "row_loss": row_loss,
        "row_loss_v": row_loss_v,
    }  # fmt: skip
    return result | inputs_and_targets((z, t, r, y), given, {"u": (v_g - h * du_dt, scale), "v": (v_g, scale_v)})


FORMULAS = {"meanflow": meanflow, "improved": improved}


def inputs_and_targets(inputs, given, targets):
    """Return what one regression needs to have the gradients of the loss: under `inputs`, `given` and `targets`.

    inputs: z, t, r, y.  targets: {head: (target [b h w c], scale [b])}, scale being d row_loss / d err.
    """
    return {"inputs": inputs, "given": given, "targets": targets}


def sorted_times(draws, cfg):
    """Return t and r [b], r = t on flow rows."""
    times = draws["times"]
    if cfg.time_sampler == "logit_normal":
        times = 1 / (1 + np.exp(-(np.array(cfg.time_mean) + np.array(cfg.time_std) * times)))
    t, r = times[:, 0], times[:, 1]
    if cfg.time_order == "sorted":
        t, r = np.maximum(t, r), np.minimum(t, r)
    return t, np.where(flow_rows(draws["coin"], cfg), t, np.minimum(t, r))


def lost_labels(draws, cfg):
    """Return [b] bool: the rows that lose their label."""
    lost = draws["drop"] < cfg.label_drop_prob
    return np.arange(len(lost)) < lost.sum() if cfg.label_drop == "front" else lost


def power_law(u, most, power):
    """Return omega in [1, most] whose distribution function, of the density omega^-power, is u."""
    if power == 1:
        return most**u
    return (1 + u * (most ** (1 - power) - 1)) ** (1 / (1 - power))


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
