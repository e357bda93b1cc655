"""The objectives derived a second time from the papers, in numpy around a bare network.

They share nothing with the methods: neither times, paths and weights, as `loss_reference` does, nor gradients, which
are those of an equivalent regression.  They know no static split, share no forward and run the JVP on all rows.
"""

from typing import Any, NamedTuple

import numpy as np


class Bare(NamedTuple):
    """A network as functions of arrays; those a method does not use may be None."""

    forward: Any  # (z, t, r, y, given, head) -> u or the velocity of another head
    jvp: Any  # (z, t, r, y, tangent, given) -> (u, du_dt)
    log_variance: Any = None  # (t, r) -> [b]
    features: Any = None  # (z, t, y) -> [b n d] for each encoder
    teacher: Any = None  # (z, t, r, y) -> v, a frozen flow model


class Regression(NamedTuple):
    """A sum with the same gradients as a loss, whose constants are given as numbers.

    It adds, for each head, the mean over rows of scale ||u - target||^2; the mean of slope times the log-variance; and
    the products of cotangents and features.
    """

    inputs: tuple  # z, t, r, y
    targets: dict  # {head: (target [b h w c], scale [b])}
    given: dict  # the network's other inputs, by name
    slope: Any = None  # [b]
    cotangents: Any = None  # [b n d] for each encoder


def meanflow(net, batch, given, draws, cfg):
    """Return t, r, v_g, u, du_dt, target, err, weight, row_loss, and under `regressions` what has their gradients.

    net: a `Bare`.  batch: image [b h w c], label [b], the null label, and other entries by name.  given: the network's
    other inputs in training, by name.  draws: by name, see the method's `Draws`.  cfg: `config.method`.  All in
    float64.  Source: arXiv:2505.13447, algorithm 1 and eqs. 10, 11, 19 to 22.
    """
    x, y, null, noise = batch["image"], batch["label"], batch["null"], draws["noise"]
    in_guidance = {name: a for name, a in given.items() if name != "dropout"}
    t, r = sorted_times(draws, cfg)
    z, v = state_and_velocity(x, noise, t[:, None, None, None], cfg)
    lost = lost_labels(draws, cfg)
    y = np.where(lost, null, y)
    guided = ~lost & (cfg.guidance_start <= t) & (t <= cfg.guidance_end) & cfg.guidance
    w, k = cfg.omega, cfg.kappa
    u_cond, u_null = (net.forward(z, t, t, labels, in_guidance) for labels in (y, np.full_like(y, null)))
    v_guided = w * v + k * u_cond + (1 - w - k) * u_null
    v_g = np.where(guided[:, None, None, None], v_guided, v)
    u, du_dt = net.jvp(z, t, r, y, v_g, given)
    interval = np.clip(t - r, 0, 1) if cfg.clip_interval else t - r
    target = v_g - interval[:, None, None, None] * du_dt
    err = np.square(u - target).sum((1, 2, 3))
    weight, row_loss, scale = weigh(err, cfg)
    result = {
        "t": t, "r": r, "v_g": v_g, "u": u, "du_dt": du_dt, "target": target, "err": err, "weight": weight,
        "row_loss": row_loss,
    }  # fmt: skip
    return result | {"regressions": [Regression((z, t, r, y), {"u": (target, scale)}, given)]}


def improved(net, batch, _, draws, cfg):
    """Return the same for improved MeanFlow, with v_c, v_head, compound, omega, t_min, t_max and the second error.

    draws: also omega, t_min, t_max.  Source: arXiv:2512.02012.
    """
    x, y, null, noise = batch["image"], batch["label"], batch["null"], draws["noise"]
    t, r = sorted_times(draws, cfg)
    h = (t - r)[:, None, None, None]
    z, v = state_and_velocity(x, noise, t[:, None, None, None], cfg)
    flow, lost = flow_rows(draws["coin"], cfg), lost_labels(draws, cfg)
    t_min, t_max = np.where(flow, 0, draws["t_min"] / 2), np.where(flow, 1, (1 + draws["t_max"]) / 2)
    omega = power_law(draws["omega"], cfg.omega_max, cfg.omega_power) if cfg.guidance else np.ones_like(t)
    w = np.where((t_min <= t) & (t <= t_max), omega, 1)
    zeros, ones = np.zeros_like(t), np.ones_like(t)
    v_c = net.forward(z, t, t, y, {"omega": w, "t_min": zeros, "t_max": ones}, "v")
    v_null = net.forward(z, t, t, np.full_like(y, null), {"omega": ones, "t_min": zeros, "t_max": ones}, "v")
    v_g = np.where((lost | (w == 1))[:, None, None, None], v, v + (1 - 1 / w)[:, None, None, None] * (v_c - v_null))
    y, given = np.where(lost, null, y), {"omega": omega, "t_min": t_min, "t_max": t_max}
    u, du_dt = net.jvp(z, t, r, y, v_c, given)
    v_head, compound = net.forward(z, t, r, y, given, "v"), u + h * du_dt
    err, err_v = (np.square(a - v_g).sum((1, 2, 3)) for a in (compound, v_head))
    (weight, row_loss, scale), (weight_v, row_loss_v, scale_v) = weigh(err, cfg), weigh(err_v, cfg)
    result = given | {
        "t": t, "r": r, "v_g": v_g, "v_c": v_c, "u": u, "v_head": v_head, "du_dt": du_dt, "compound": compound,
        "err": err, "err_v": err_v, "weight": weight, "weight_v": weight_v, "row_loss": row_loss,
        "row_loss_v": row_loss_v,
    }  # fmt: skip
    targets = {"u": (v_g - h * du_dt, scale), "v": (v_g, scale_v)}
    return result | {"regressions": [Regression((z, t, r, y), targets, given)]}


def rectified(net, batch, _, draws, cfg):
    """Return the same for Re-MeanFlow.  batch: also noise; draws: also second, interval, omega.

    Source: Re-MeanFlow, 2025; Xinxi-Zhang/Re-MeanFlow, meanflow.py.
    """
    x, noise, null = batch["image"], batch["noise"], batch["null"]
    y, size = np.where(lost_labels(draws, cfg), null, batch["label"]), x[0].size
    t, r = coupling_times(draws, cfg)
    z, v = state_and_velocity(x, noise, t[:, None, None, None], cfg)
    v_g = v
    if cfg.guidance:
        scale = 1 + (cfg.omega_max - 1) * draws["omega"]
        constant = cfg.omega_sampler == "constant"
        w = np.full_like(t, cfg.omega) if constant else np.where(scale > 2, scale - 1, 1)
        k = np.full_like(t, cfg.kappa) if constant else (scale - w) / scale
        w, k = w[:, None, None, None], k[:, None, None, None]
        u_cond, u_null = (net.forward(z, t, t, labels, {}) for labels in (y, np.full_like(y, null)))
        v_g = u_null + w * (v - u_null) + k * (u_cond - u_null)
    u, du_dt = net.jvp(z, t, r, y, v_g, {})
    target = v_g - (t - r)[:, None, None, None] * du_dt
    mean = np.square(u - target).mean((1, 2, 3))
    weight, row_loss, scale = weigh(mean, cfg)
    near = np.square(x - noise).mean((1, 2, 3)) < cfg.distance_clip if cfg.distance_clip else np.ones(len(t), bool)
    result = {
        "t": t, "r": r, "v": v, "v_g": v_g, "u": u, "du_dt": du_dt, "target": target, "err": mean * size,
        "weight": near * weight, "row_loss": near * row_loss,
    }  # fmt: skip
    return result | {"regressions": [Regression((z, t, r, y), {"u": (target, near * scale / size)}, {})]}


def coupling_times(draws, cfg):
    """Return t and r [b] of Re-MeanFlow, r = t on flow rows."""
    largest, t = 80 / 81, draws["times"]
    if cfg.time_sampler == "uniform":
        r = t * draws["second"]
    else:
        t = np.log(1 + t * (np.exp(4) - 1)) / 4
        t = np.where(draws["second"] < 0.5, t, 1 - t)
        t = np.where(1e-5 + 0.99998 * t > largest, largest, 1e-5 + 0.99998 * t)
        r = t - 1 / (1 + np.exp(-(cfg.interval_mean + cfg.interval_std * draws["interval"])))
        r = np.where((r < 0) | ((t > 0.8) & (r < 0.4)), 0, r)
    return t, np.where(flow_rows(draws["coin"], cfg), t, r)


def flow(net, batch, _, draws, cfg):
    """Return t, r, u, err, row_loss of flow matching, projection, and under `regressions` what has their gradients.

    batch: also `features` [b n d].  Source: arXiv:2403.03206; REPA: arXiv:2410.06940 eq. 8.
    """
    x, y = batch["image"], np.where(lost_labels(draws, cfg), batch["null"], batch["label"])
    t = time_of(draws["times"], cfg.flow_time_mean, cfg.flow_time_std, cfg)
    z, v = state_and_velocity(x, draws["noise"], t[:, None, None, None], cfg)
    u, size = net.forward(z, t, t, y), x[0].size
    err = np.square(u - v).sum((1, 2, 3))
    cosines, cotangents, start = [], [], 0
    for projected in net.features(z, t, y) if "features" in batch else ():
        wanted = batch["features"][:, :, start : start + projected.shape[-1]]
        start += projected.shape[-1]
        length = np.sqrt((projected**2).sum(-1, keepdims=True))
        direction, wanted = projected / length, wanted / np.sqrt((wanted**2).sum(-1, keepdims=True))
        cosine = (direction * wanted).sum(-1, keepdims=True)
        cosines.append(cosine.mean())
        cotangents.append(-(wanted - cosine * direction) / length / cosine.size)
    scale = cfg.repa_coeff / max(len(cosines), 1)
    regression = Regression(
        (z, t, t, y), {"u": (v, np.full_like(t, 1 / size))}, {}, None, [scale * c for c in cotangents]
    )
    result = {"t": t, "r": t, "u": u, "v": v, "err": err, "row_loss": err / size, "regressions": [regression]}
    projection = {"projection": -np.mean(cosines)} if cosines else {}
    return result | projection | {"loss": err.mean() / size + cfg.repa_coeff * sum(projection.values())}


def decoupled(net, batch, _, draws, cfg):
    """Return the quantities of both terms of decoupled MeanFlow, and under `regressions` one per term.

    draws: also noise_flow, times_flow.  Source: arXiv:2510.24474.
    """
    x, lost = batch["image"], lost_labels(draws, cfg)
    y, size = np.where(lost, batch["null"], batch["label"]), x[0].size
    t, r = sorted_pair(draws, cfg)
    t_flow = time_of(draws["times_flow"], cfg.flow_time_mean, cfg.flow_time_std, cfg)
    result, regressions = {"t": t, "r": r, "t_flow": t_flow}, []
    for suffix, noise, start, end in (("", "noise", t, r), ("_flow", "noise_flow", t_flow, t_flow)):
        z, v = state_and_velocity(x, draws[noise], start[:, None, None, None], cfg)
        v_g = guided_velocity(net, z, v, start, y, batch["null"], lost, cfg)
        u, du_dt = net.jvp(z, start, end, y, v_g, {})
        target = v_g - (start - end)[:, None, None, None] * du_dt
        err = np.square(u - target).sum((1, 2, 3))
        log_variance = net.log_variance(start, end)
        # One row per log-variance, one column per error; only the diagonal is intended.
        scaled = np.exp(-log_variance)[:, None] * err / size
        row_loss = np.log(scaled + cfg.adaptive_eps) + log_variance[:, None]
        pairs = np.full(scaled.shape, 1 / len(t)) if cfg.log_variance_pairs == "all" else np.eye(len(t))
        share = pairs / (scaled + cfg.adaptive_eps) / 2
        scale, slope = (share * np.exp(-log_variance)[:, None] / size).sum(0), 0.5 - (share * scaled).sum(1)
        regressions.append(Regression((z, start, end, y), {"u": (target, scale)}, {}, slope))
        quantities = {"v_g": v_g, "u": u, "log_variance": log_variance}
        quantities["row_loss"] = row_loss if cfg.log_variance_pairs == "all" else np.diagonal(row_loss)
        result |= {name + suffix: a for name, a in quantities.items()}
        result |= {"err_flow": err} if suffix else {"err": err, "du_dt": du_dt, "target": target}
    value = (result["row_loss"].mean() + result["row_loss_flow"].mean()) / 2
    return result | {"regressions": regressions, "loss": value}


def guided_velocity(net, z, v, t, y, null, lost, cfg):
    """Return the velocity [b h w c] that the terms of decoupled MeanFlow regress."""
    source = net.teacher if cfg.guidance_type == "distill" else net.forward
    if cfg.guidance_type == "default":
        return v
    v_cond, v_null = (source(z, t, t, labels) for labels in (y, np.full_like(y, null)))
    inside = (cfg.guidance_start <= t) & (t <= cfg.guidance_end)
    if cfg.guidance_type == "distill":
        return np.where(inside[:, None, None, None], v_null + cfg.omega * (v_cond - v_null), v_cond)
    return np.where((inside & ~lost)[:, None, None, None], v + cfg.omega * (v_cond - v_null), v)


FORMULAS = {
    "meanflow": meanflow, "improved": improved, "flow": flow, "decoupled": decoupled, "rectified": rectified,
}  # fmt: skip


def sorted_times(draws, cfg):
    """Return t and r [b], r = t on flow rows."""
    t, r = sorted_pair(draws, cfg)
    return t, np.where(flow_rows(draws["coin"], cfg), t, r)


def sorted_pair(draws, cfg):
    """Return t and r [b], before flow rows are set."""
    t, r = (time_of(draws["times"][:, i], cfg.time_mean[i], cfg.time_std[i], cfg) for i in range(2))
    if cfg.time_order == "sorted":
        t, r = np.maximum(t, r), np.minimum(t, r)
    return t, np.minimum(t, r)


def time_of(drawn, mean, std, cfg):
    """Return the times [b] of draws [b]."""
    return {
        "uniform": lambda n: drawn,
        "logit_normal": lambda n: 1 / (1 + np.exp(-n)),
        "arctan": lambda n: np.arctan2(np.exp(n), 1) / (np.pi / 2),
        "arctan_official": lambda n: np.arctan2(n, 1) / (np.pi / 2),
    }[cfg.time_sampler](mean + std * drawn)


def lost_labels(draws, cfg):
    """Return [b] bool: the rows whose label is dropped."""
    lost = draws["drop"] < cfg.label_drop_prob
    return np.arange(len(lost)) < lost.sum() if cfg.label_drop == "front" else lost


def power_law(u, most, power):
    """Return omega in [1, most] at which the distribution function of the density omega^-power is u."""
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
    """Return the weight, the weighted loss and its derivative in err at constant weight, [b] each."""
    if cfg.weighting == "uniform":
        return np.ones_like(err), err, np.ones_like(err)
    measured = err**2 if cfg.weighting == "adaptive_squared" else err
    weight = 1 / (measured + cfg.adaptive_eps) ** cfg.adaptive_power
    return weight, weight * measured, weight * (2 * err if cfg.weighting == "adaptive_squared" else 1)
