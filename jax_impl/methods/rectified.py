"""Re-MeanFlow: MeanFlow along the straight lines between a teacher's noise and its samples.

Source: Re-MeanFlow, 2025 (Rectified MeanFlow); Xinxi-Zhang/Re-MeanFlow, meanflow.py and train.py.  The couplings come
from `reflow`; `meanflow/config/stages.py` says in which steps the velocity is guided.  `loss_reference` is the
algorithm as the source has it; `loss` computes the same with fewer forwards, as `meanflow.loss` does.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient

from jax_impl.methods.common import (
    average_velocity,
    drop_labels,
    expand,
    is_flow,
    path,
    split_rows,
    sum_squares,
    take,
    total_derivative,
    weigh,
)
from jax_impl.methods.meanflow import conditional_and_null
from jax_impl.methods.samplers import integrate
from jax_impl.methods.samplers import no_conditions as sampling_conditions
from meanflow.sampling.steps import flow_map_steps

__all__ = ["Draws", "loss", "loss_reference", "sample", "sample_times", "sampling_conditions", "sampling_steps"]

TIME_MAX = 80 / 81  # t of the largest sigma of the teacher's noise, 80
STEEPNESS = 4.0  # a of the exponential density exp(a t) whose sum with its mirror image is the U
MARGIN = 1e-5  # between the U and the ends of [0, 1]


class Draws(NamedTuple):
    """All the randomness of one loss, one row per example; the noise comes with the coupling."""

    times: jax.Array  # [b] uniforms in [0, 1), of t
    second: jax.Array  # [b] uniforms: the side of the U (re2_truncate), or r / t (uniform)
    interval: jax.Array  # [b] unit normals, of t - r (re2_truncate)
    coin: jax.Array  # [b] uniforms: which rows are flow rows (flow_rows = coin)
    drop: jax.Array  # [b] uniforms: which rows lose their label
    omega: jax.Array  # [b] uniforms, of the guidance scale (omega_sampler = uniform)


def loss(net, batch, draws, cfg):
    """MeanFlow objective along straight lines between paired noise and data.

    net: (z, t, r, y) -> u; z and u are [b h w c], t, r and y [b]; `net.num_classes` is the null label.
    batch: 'image' [b h w c] in data units, 'noise' [b h w c] that the teacher made it from, 'label' [b] int.
    cfg: `config.method`.
    Returns the weighted mean (scalar) and aux: t, r, y [b], v, v_g, u, du_dt, target [b h w c], err [b] (squared,
    summed over a row), weight and row_loss [b] (of err averaged over a row; 0 for pairs beyond distance_clip), and with
    distance_clip kept, the fraction of pairs within it.  No gradient flows through v_g, du_dt, target and weight.
    Departs from the source: flow rows are a fixed share of the batch; the guidance scale is drawn per row, not per
    step; and the mean is over all rows, not only the kept ones, so that no row depends on another.
    """
    x, noise = batch["image"], batch["noise"]
    t, r = sample_times(draws, cfg)
    z, v = path(x, noise, t, cfg)
    y, _ = drop_labels(batch["label"], draws, net.num_classes, cfg)
    rows = split_rows(len(y), cfg)
    u, tape = average_velocity(net, z, t, r, y, {}, rows)
    v_g = guide(net, z, v, t, y, take(u, rows, "flow"), rows, draws, cfg)
    du_dt = total_derivative(net, z, v_g, t, r, y, {}, rows, tape)
    target = stop_gradient(v_g - expand(t - r, v) * du_dt)
    err = sum_squares(u - target)
    weight, row_loss = weigh(err / x[0].size, cfg)
    near = is_near(x, noise, cfg)
    aux = {
        "t": t, "r": r, "y": y, "v": v, "v_g": v_g, "u": u, "du_dt": du_dt, "target": target, "err": err,
        "weight": jnp.where(near, weight, 0), "row_loss": jnp.where(near, row_loss, 0),
    }  # fmt: skip
    aux |= {"kept": near.mean(dtype=err.dtype)} if cfg.distance_clip else {}
    return aux["row_loss"].mean(), aux


def loss_reference(net, batch, draws, cfg):
    """The objective of `loss` as the source has it, with a plain JVP of the whole batch; eqs. of arXiv:2505.13447."""
    x, y, e = batch["image"], batch["label"], batch["noise"]

    # Alg. 1: t, r = sample_t_r(), z = (1 - t) x + t e, v = e - x, along the coupling; labels are dropped
    t, r = sample_times(draws, cfg)
    z, v = path(x, e, t, cfg)
    null = jnp.full_like(y, net.num_classes)
    y = jnp.where(draws.drop < cfg.label_drop_prob, null, y)

    # Eq. 21: v_g = w v + k u(z, t, t, y) + (1 - w - k) u(z, t, t, null), with w / (1 - k) drawn for each row
    v_g = v
    if cfg.guidance:
        w, k = jnp.full_like(t, cfg.omega), jnp.full_like(t, cfg.kappa)
        if cfg.omega_sampler == "uniform":
            w_pi = 1 + draws.omega * (cfg.omega_max - 1)
            w = jnp.maximum(1, w_pi - 1)
            k = 1 - w / w_pi
        w, k = w[:, None, None, None], k[:, None, None, None]
        v_g = stop_gradient(w * v + k * net(z, t, t, y) + (1 - w - k) * net(z, t, t, null))

    # Eqs. 8 to 11: u, du_dt = jvp(fn, (z, t, r), (v, 1, 0)), |u - sg(v - (t - r) du_dt)|^2
    tangents = (v_g, jnp.ones_like(t), jnp.zeros_like(r))
    u, du_dt = jax.jvp(lambda z, t, r: net(z, t, r, y), (z, t, r), tangents)
    target = stop_gradient(v_g - (t - r)[:, None, None, None] * du_dt)
    err = sum_squares(u - target)

    # Eq. 22: sg(1 / (err + c)^p) err, of the mean error; couplings beyond distance_clip weigh nothing
    near = sum_squares(e - x) < (cfg.distance_clip or math.inf) * x[0].size
    d = (err / x[0].size) ** (2 if cfg.weighting == "adaptive_squared" else 1)
    weight = (d + cfg.adaptive_eps) ** -(0 if cfg.weighting == "uniform" else cfg.adaptive_power)
    weight = stop_gradient(jnp.where(near, weight, 0))
    return (weight * d).mean(), {
        "t": t, "r": r, "y": y, "v": v, "v_g": v_g, "u": u, "du_dt": du_dt, "target": target, "err": err,
        "weight": weight, "row_loss": weight * d,
    } | ({"kept": near.mean(dtype=err.dtype)} if cfg.distance_clip else {})  # fmt: skip


def sample_times(draws, cfg):
    """Return t >= r, [b] each in [0, 1), and r = t on flow rows.

    `re2_truncate`: t has a U-shaped density, with most of its mass near both ends, and is at most 80/81; t - r is
    logit-normal; r is clipped at 0, and set to 0 where t > 0.8 and r < 0.4: long intervals that start near noise end at
    the data.  `uniform`: t up to 1, as in the official code, and r below it.
    """
    if cfg.time_sampler == "uniform":
        t, r = draws.times, draws.times * draws.second
    else:
        side = jnp.log1p(draws.times * math.expm1(STEEPNESS)) / STEEPNESS
        t = jnp.where(draws.second < 0.5, side, 1 - side)
        t = jnp.minimum(MARGIN + (1 - 2 * MARGIN) * t, TIME_MAX)
        r = jnp.maximum(t - jax.nn.sigmoid(draws.interval * cfg.interval_std + cfg.interval_mean), 0)
        r = jnp.where((t > 0.8) & (r < 0.4), 0, r)
    return t, jnp.where(is_flow(draws, cfg), t, r)


def guide(net, z, v, t, y, u_flow, rows, draws, cfg):
    """Return the guided velocity v_g [b h w c]: w v + k u(z,t,t,y) + (1-w-k) u(z,t,t,null), for dropped labels too.

    omega_sampler `uniform`: the effective scale w_pi of a row is uniform in [1, omega_max], w = max(1, w_pi - 1) and
    k = 1 - w / w_pi.  `constant`: w = omega, k = kappa.
    """
    if not cfg.guidance:
        return v
    u_cond, u_null = conditional_and_null(net, z, t, y, jnp.full_like(y, net.num_classes), {}, u_flow, rows)
    w, k = (jnp.full_like(t, a) for a in (cfg.omega, cfg.kappa))
    if cfg.omega_sampler == "uniform":
        w_pi = 1 + draws.omega * (cfg.omega_max - 1)
        w = jnp.maximum(1, w_pi - 1)
        k = 1 - w / w_pi
    w, k = expand(w, v), expand(k, v)
    return stop_gradient(w * v + k * u_cond + (1 - w - k) * u_null)


def is_near(x, noise, cfg):
    """Return [b] bool: pairs with a mean squared distance below distance_clip; all of them if that is 0."""
    return sum_squares(noise - x) < (cfg.distance_clip * x[0].size if cfg.distance_clip else jnp.inf)


def sampling_steps(cfg):
    """Return the steps of `flow_map_steps` with the network's times capped at 80/81, where couplings start.

    One step from full noise n is then n - u(n, 80/81, 0), as in Xinxi-Zhang/Re-MeanFlow, meanflow.py, sample_one_step.
    """
    return [s._replace(t=min(s.t, TIME_MAX), to=min(s.to, TIME_MAX)) for s in flow_map_steps(cfg)]


def sample(net, noise, y, given, cfg):
    """Carry noise to data in the steps of `sampling_steps(cfg)`; see `integrate`."""
    return integrate(net, noise, y, given, cfg, sampling_steps(cfg))
