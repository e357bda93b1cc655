"""Decoupled MeanFlow: a trained flow transformer becomes a flow map.

Source: arXiv:2510.24474; kyungmnlee/dmf, loss.py, DMFLoss.  `docs/differences.md` lists where it differs from ours.

A step has two terms on the whole batch, each with its own times and noise: flow matching, and MeanFlow on rows with
r < t.  `loss_reference` is the algorithm as the paper writes it.  `loss` computes the same with fewer forwards.  With F
one forward of the batch: 3F for each term with its gradient, F for the tangent, and for guidance 3F by the model itself
(in the flow term the conditional velocity is the row's own prediction) or 4F by a teacher.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient

from jax_impl.methods.common import (
    Rows,
    average_velocity,
    drop_labels,
    expand,
    interleave,
    order_times,
    path,
    separate,
    sum_squares,
    to_time,
    total_derivative,
)
from jax_impl.methods.samplers import no_conditions as sampling_conditions
from jax_impl.methods.samplers import sample_flow_map as sample
from meanflow.sampling.steps import flow_map_steps as sampling_steps

__all__ = ["Draws", "loss", "loss_reference", "sample", "sampling_conditions", "sampling_steps"]


class Draws(NamedTuple):
    """All the randomness of one loss: unit normals and uniforms in [0, 1), one row per example."""

    noise: jax.Array  # [b h w c] unit normals of the MeanFlow term
    noise_flow: jax.Array  # [b h w c] unit normals of the flow term
    times: jax.Array  # [b 2] unit normals, or uniforms (time_sampler = uniform), of the MeanFlow term
    times_flow: jax.Array  # [b] the same of the flow term
    drop: jax.Array  # [b] uniforms: which rows lose their label, in both terms


def loss(net, batch, draws, cfg, teacher=None):
    """Decoupled MeanFlow objective: the mean of the flow term and the MeanFlow term.  Source: arXiv:2510.24474.

    net: (z, t, r, y) -> u; z and u are [b h w c], t, r and y [b]; `net.log_variance(t, r)` is [b]; `net.num_classes` is
    the null label.  batch: 'image' [b h w c] in data units, 'label' [b] int.  cfg: `config.method`.  teacher:
    (z, t, r, y) -> v, a frozen flow model, for guidance_type = distill.
    Returns the loss (scalar) and aux: t, r, t_flow, y [b], v, v_g, v_g_flow, u, u_flow, du_dt, target [b h w c], err
    and err_flow [b] (squared, summed over a row, in the MeanFlow and the flow term), log_variance, log_variance_flow
    [b], row_loss and row_loss_flow, [b] or, for log_variance_pairs = all, [b b].  No gradient flows through v_g,
    v_g_flow, du_dt and target.
    """
    x = batch["image"]
    t, r = order_times(draws.times, cfg)
    t_flow = to_time(draws.times_flow, cfg.flow_time_mean, cfg.flow_time_std, cfg)
    y, kept = drop_labels(batch["label"], draws, net.num_classes, cfg)
    z, v = path(x, draws.noise, t, cfg)
    z_flow, v_flow = path(x, draws.noise_flow, t_flow, cfg)
    rows = Rows(1, 0, len(y))  # flow matching is a separate term here, so there are no flow rows
    u_flow = net(z_flow, t_flow, t_flow, y)
    u, tape = average_velocity(net, z, t, r, y, {}, rows)
    states, velocities, times = (z_flow, z), (v_flow, v), (t_flow, t)
    if cfg.guidance_type == "distill":
        v_g_flow, v_g = distill(teacher, states, times, y, cfg)
    else:
        v_g_flow, v_g = guide_by_itself(net, states, velocities, times, y, kept, u_flow, cfg)
    du_dt = total_derivative(net, z, v_g, t, r, y, {}, rows, tape)
    target = stop_gradient(v_g - expand(t - r, v) * du_dt)
    err, err_flow = sum_squares(u - target), sum_squares(u_flow - v_g_flow)
    log_variance, log_variance_flow = net.log_variance(t, r), net.log_variance(t_flow, t_flow)
    row_loss = log_loss(err / u[0].size, log_variance, cfg)
    row_loss_flow = log_loss(err_flow / u[0].size, log_variance_flow, cfg)
    aux = {
        "t": t, "r": r, "t_flow": t_flow, "y": y, "v": v, "v_g": v_g, "v_g_flow": v_g_flow, "u": u, "u_flow": u_flow,
        "du_dt": du_dt, "target": target, "err": err, "err_flow": err_flow, "log_variance": log_variance,
        "log_variance_flow": log_variance_flow, "row_loss": row_loss, "row_loss_flow": row_loss_flow,
    }  # fmt: skip
    return (row_loss.mean() + row_loss_flow.mean()) / 2, aux


def loss_reference(net, batch, draws, cfg, teacher=None):
    """The objective of `loss` as the paper writes it, with plain JVPs of the whole batch.  Source: arXiv:2510.24474.

    The flow term is the MeanFlow term with r = t.
    """
    x, y, aux = batch["image"], batch["label"], {}
    null, dropped = jnp.full_like(y, net.num_classes), draws.drop < cfg.label_drop_prob
    y = jnp.where(dropped, null, y)
    t_flow = to_time(draws.times_flow, cfg.flow_time_mean, cfg.flow_time_std, cfg)
    terms = ("", draws.noise, *order_times(draws.times, cfg)), ("_flow", draws.noise_flow, t_flow, t_flow)
    for term, e, t, r in terms:
        # z = (1 - t) x + t e, v = e - x
        z, v = path(x, e, t, cfg)

        # v_g = v + w (v(y) - v(null)) by the model itself (mg), v(null) + w (v(y) - v(null)) by a teacher (distill)
        v_g, inside = v, (t >= cfg.guidance_start) & (t <= cfg.guidance_end)
        if cfg.guidance_type == "mg":
            v_g = v + cfg.omega * (net(z, t, t, y) - net(z, t, t, null))
            v_g = jnp.where((inside & ~dropped)[:, None, None, None], v_g, v)
        if cfg.guidance_type == "distill":
            v_c, v_null = teacher(z, t, t, y), teacher(z, t, t, null)  # pyright: ignore
            v_g = jnp.where(inside[:, None, None, None], v_null + cfg.omega * (v_c - v_null), v_c)
        v_g = stop_gradient(v_g)

        # u, du_dt = jvp(fn, (z, t, r), (v_g, 1, 0)), |u - sg(v_g - (t - r) du_dt)|^2
        tangents = (v_g, jnp.ones_like(t), jnp.zeros_like(r))
        u, du_dt = jax.jvp(lambda z, t, r: net(z, t, r, y), (z, t, r), tangents)
        target = stop_gradient(v_g - (t - r)[:, None, None, None] * du_dt)
        err = sum_squares(u - target)

        # log(mean err / exp(s) + c) + s, with a learnt log-variance s
        log_variance = net.log_variance(t, r)
        s = log_variance[:, None] if cfg.log_variance_pairs == "all" else log_variance
        row_loss = jnp.log(err / x[0].size * jnp.exp(-s) + cfg.adaptive_eps) + s
        aux |= {f"t{term}": t, f"v_g{term}": v_g, f"u{term}": u, f"err{term}": err, f"row_loss{term}": row_loss,
                f"log_variance{term}": log_variance}  # fmt: skip
        aux |= {} if term else {"r": r, "y": y, "v": v, "du_dt": du_dt, "target": target}
    return (aux["row_loss"].mean() + aux["row_loss_flow"].mean()) / 2, aux


def guide_by_itself(net, states, velocities, times, y, kept, u_flow, cfg):
    """Return the guided velocities v + w (v(y) - v(no class)) of the flow term and of the MeanFlow term [b h w c] each.

    Only where the label was kept and guidance_start <= t <= guidance_end; v elsewhere, and if guidance_type = default.
    states, velocities, times: pairs, one entry per term.  In the flow term v(y) is the row's own prediction `u_flow`;
    the other three forwards run as one batch.
    """
    if cfg.guidance_type == "default":
        return velocities
    null = jnp.full_like(y, net.num_classes)
    z, t = interleave(*states, states[1]), interleave(*times, times[1])
    null_flow, null_mean, cond_mean = separate(net(z, t, t, interleave(null, null, y)), 3)
    guided = []
    for v, t, u_cond, u_null in zip(velocities, times, (u_flow, cond_mean), (null_flow, null_mean), strict=True):
        inside = kept & (t >= cfg.guidance_start) & (t <= cfg.guidance_end)
        guided.append(stop_gradient(jnp.where(expand(inside, v), v + cfg.omega * (u_cond - u_null), v)))
    return tuple(guided)


def distill(teacher, states, times, y, cfg):
    """Return the teacher's guided velocities v(no class) + w (v(y) - v(no class)) [b h w c], one per term.

    v(y) where t is outside [guidance_start, guidance_end].  states, times: pairs, one entry per term.  y: [b], after
    the label drop.
    """
    null = jnp.full_like(y, teacher.num_classes)
    z, t = interleave(*states, *states), interleave(*times, *times)
    v = separate(teacher(z, t, t, interleave(y, y, null, null)), 4)
    guided = []
    for t, v_cond, v_null in zip(times, v[:2], v[2:], strict=True):
        inside = (t >= cfg.guidance_start) & (t <= cfg.guidance_end)
        guided.append(stop_gradient(jnp.where(expand(inside, z), v_null + cfg.omega * (v_cond - v_null), v_cond)))
    return tuple(guided)


def log_loss(err, log_variance, cfg):
    """Return log(err / variance + eps) + log variance [b], the logarithm of the error relative to a learnt variance.

    err: [b] mean squared errors.  log_variance: [b].  For log_variance_pairs = all, a broadcasting accident of the
    official code, [b b]: the log-variance of row i with the error of row j.  The batch must then stay whole, on one
    device: `meanflow/config/division.py` refuses a run that divides it.
    """
    if cfg.log_variance_pairs == "all":
        log_variance = log_variance[:, None]
    return jnp.log(err * jnp.exp(-log_variance) + cfg.adaptive_eps) + log_variance
