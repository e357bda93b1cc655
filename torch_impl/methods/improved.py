"""Improved MeanFlow: one network for every guidance scale and interval, guided by the velocity that it predicts.

Source: arXiv:2512.02012; Lyy-iiis/imeanflow, imf.py.  `docs/differences.md` lists where it differs from ours.

`loss_reference` is the algorithm as the paper writes it.  `loss` computes the same with as few forwards as the
mathematics allows.  With F one forward through the trunk and one head, a the share of a head in F, and p the share of
rows with r < t:
  3(1 + a)F  both heads, and their gradient
  pF         the tangent of u; v needs none (uncompiled PyTorch carries one all the same)
  F          the velocity without class, of all rows
  pF         the velocity with class, of rows with r < t: on flow rows it is the row's own prediction
so (4 + 2p + 3a)/3 of a flow-matching step of the same depth.  The official code runs (7 + 3a)/3: the velocity with
class a second time inside the interval, and everything on all rows.
"""

import math
from typing import NamedTuple

import torch

from meanflow.sampling.steps import flow_map_steps as sampling_steps
from torch_impl.methods.common import (
    Rows,
    average_velocity,
    drop_labels,
    expand,
    is_flow,
    join,
    path,
    sample_times,
    split_rows,
    sum_squares,
    take,
    total_derivative,
    weigh,
)
from torch_impl.methods.samplers import integrate

__all__ = ["Draws", "loss", "loss_reference", "sample", "sampling_conditions", "sampling_steps"]


class Draws(NamedTuple):
    """All the randomness of one loss: unit normals and uniforms in [0, 1), one row per example."""

    noise: torch.Tensor  # [b c h w] unit normals
    times: torch.Tensor  # [b 2] unit normals (logit_normal) or uniforms (uniform)
    coin: torch.Tensor  # [b] uniforms: which rows are flow rows (flow_rows = coin)
    drop: torch.Tensor  # [b] uniforms: which rows lose their label
    omega: torch.Tensor  # [b] uniforms: guidance scales
    t_min: torch.Tensor  # [b] uniforms: starts of guidance intervals
    t_max: torch.Tensor  # [b] uniforms: their ends


def loss(net, batch, draws, cfg):
    """Improved MeanFlow objective.  Source: arXiv:2512.02012.

    net: (z, t, r, y, omega, t_min, t_max, heads) -> u, v or both; z, u and v are [b c h w], the others [b];
    `net.num_classes` is the null label.  batch: 'image' [b c h w] in data units, 'label' [b] int.  cfg:
    `config.method`.
    Returns the mean (scalar) of both weighted errors, of u and of v, and aux: t, r, y, omega, t_min, t_max [b], v (of
    the path), v_c (predicted), v_g, u, v_head, du_dt, compound [b c h w], err and err_v [b] (squared, summed over a
    row), weight, weight_v, row_loss and row_loss_v [b].  No gradient flows through v_c, v_g, du_dt and weights.
    The tangent of z is v_c, predicted with the row's own label at the scale that applies at t; v_g is the target of
    both V = u + (t - r) du/dt and the v head.
    """
    x, y = batch["image"], batch["label"]
    t, r = sample_times(draws, cfg)
    given = sample_guidance(draws, cfg)
    z, v = path(x, draws.noise, t, cfg)
    dropped_y, kept = drop_labels(y, draws, net.num_classes, cfg)
    rows = split_rows(len(y), cfg)
    (u, v_head), tape = average_velocity(net, z, t, r, dropped_y, given, rows, heads="uv")
    v_c, v_g = guide(net, z, v, t, y, given, kept, take(v_head, rows, "flow"), cfg)
    du_dt = total_derivative(net, z, v_c, t, r, dropped_y, given, rows, tape)
    compound = u + expand(t - r, z) * du_dt
    err, err_v = sum_squares(compound - v_g), sum_squares(v_head - v_g)
    (weight, row_loss), (weight_v, row_loss_v) = weigh(err, cfg), weigh(err_v, cfg)
    aux = given | {
        "t": t, "r": r, "y": dropped_y, "v": v, "v_c": v_c, "v_g": v_g, "u": u, "v_head": v_head, "du_dt": du_dt,
        "compound": compound, "err": err, "err_v": err_v, "weight": weight, "weight_v": weight_v, "row_loss": row_loss,
        "row_loss_v": row_loss_v,
    }  # fmt: skip
    return (row_loss + row_loss_v).mean(), {name: a.detach() for name, a in aux.items()}


def loss_reference(net, batch, draws, cfg):
    """The objective of `loss` as the paper writes it, with a plain JVP of the whole batch; arXiv:2512.02012."""
    x, y, e = batch["image"], batch["label"], draws.noise

    # t, r = sample_t_r(), z = (1 - t) x + t e, v = e - x; omega, t_min, t_max = sample_guidance()
    t, r = sample_times(draws, cfg)
    z, v = path(x, e, t, cfg)
    given = sample_guidance(draws, cfg)
    zero, one = torch.zeros_like(t), torch.ones_like(t)

    # v_g = v + (1 - 1/w) (v_c - v_null), w = 1 outside the interval; v_g = v where the label is dropped
    null, dropped = torch.full_like(y, net.num_classes), draws.drop < cfg.label_drop_prob
    w = torch.where((t >= given["t_min"]) & (t <= given["t_max"]), given["omega"], one)
    v_c = net(z, t, t, y, omega=w, t_min=zero, t_max=one, heads="v").detach()
    v_null = net(z, t, t, null, omega=one, t_min=zero, t_max=one, heads="v").detach()
    v_g = v + torch.where(dropped, 0, 1 - 1 / w)[:, None, None, None] * (v_c - v_null)

    # u, du_dt = jvp(fn, (z, t, r), (v_c, 1, 0)); the second head predicts v
    y = torch.where(dropped, null, y)

    def fn(z, t, r):
        return net(z, t, r, y, **given, heads="uv")

    (u, v_head), (du_dt, _) = torch.func.jvp(fn, (z, t, r), (v_c, one, zero))  # pyright: ignore

    # Eq. 12: |V - v_g|^2, V = u + (t - r) sg(du_dt), and |v_head - v_g|^2
    compound = u + (t - r)[:, None, None, None] * du_dt.detach()
    err, err_v = sum_squares(compound - v_g), sum_squares(v_head - v_g)

    # sg(1 / (err + c)^p) err of each
    d, d_v = (err**2, err_v**2) if cfg.weighting == "adaptive_squared" else (err, err_v)
    p = 0 if cfg.weighting == "uniform" else cfg.adaptive_power
    weight, weight_v = (((a + cfg.adaptive_eps) ** -p).detach() for a in (d, d_v))
    return (weight * d + weight_v * d_v).mean(), given | {
        "t": t, "r": r, "y": y, "v": v, "v_c": v_c, "v_g": v_g, "u": u, "v_head": v_head, "du_dt": du_dt,
        "compound": compound, "err": err, "err_v": err_v, "weight": weight, "weight_v": weight_v,
        "row_loss": weight * d, "row_loss_v": weight_v * d_v,
    }  # fmt: skip


def sample_guidance(draws, cfg):
    """Return the network's guidance inputs, [b] each by name: omega, t_min, t_max; the interval is [0, 1] on flow rows.

    omega in [1, omega_max] has a density proportional to omega^-omega_power, sampled by inverting the distribution
    function; t_min is uniform in [0, 0.5], t_max in [0.5, 1].  Without guidance omega is 1.
    """
    log_max, left = math.log(cfg.omega_max), 1 - cfg.omega_power
    log_omega = draws.omega * log_max if left == 0 else torch.log1p(draws.omega * math.expm1(left * log_max)) / left
    omega = torch.exp(log_omega) if cfg.guidance else torch.ones_like(draws.omega)
    flow = is_flow(draws, cfg)
    return {
        "omega": omega,
        "t_min": torch.where(flow, 0.0, 0.5 * draws.t_min),
        "t_max": torch.where(flow, 1.0, 0.5 + 0.5 * draws.t_max),
    }


@torch.no_grad()
def guide(net, z, v, t, y, given, kept, v_flow, cfg):
    """Return the predicted velocity v_c and the guided velocity v_g = v + (1 - 1/w)(v_c - v_null) [b c h w].

    Both come from the v head at r = t with the interval [0, 1]: v_c at scale w = omega, or 1 where t is outside
    [t_min, t_max]; v_null without class, at scale 1.  v_g is v where the label was dropped.  On flow rows v_c is the
    row's own prediction `v_flow`, which differs only where v_g does not read it; v_null of all rows and v_c of those
    with r < t run as one batch.  Without guidance v_g is v, and only v_c of rows with r < t is needed.
    """
    rows = split_rows(len(y), cfg)
    zero, one = torch.zeros_like(t), torch.ones_like(t)
    omega = torch.where((t >= given["t_min"]) & (t <= given["t_max"]), given["omega"], 1.0)
    null = torch.full_like(y, net.num_classes)
    both = Rows(rows.groups, rows.flow + rows.jvp if cfg.guidance else 0, rows.jvp)
    z2, t2, y2, omega2, start, end = (
        join(a[: len(a) if cfg.guidance else 0], take(b, rows, "jvp"), both)
        for a, b in ((z, z), (t, t), (null, y), (one, omega), (zero, zero), (one, one))
    )
    v2 = net(z2, t2, t2, y2, omega=omega2, t_min=start, t_max=end, heads="v") if len(z2) else z2
    v_c = join(v_flow, take(v2, both, "jvp"), rows)
    if cfg.guidance:
        v_g = v + expand(1 - 1 / omega, v) * (v_c - take(v2, both, "flow"))
        v = torch.where(expand(kept, v), v_g, v)
    return v_c.detach(), v.detach()


def sampling_conditions(cfg):
    """Return the network's guidance inputs when sampling, one number each by name.  cfg: `config.sample`."""
    return {"omega": cfg.omega, "t_min": cfg.interval[0], "t_max": cfg.interval[1]}


def sample(net, noise, y, given, cfg):
    """Carry noise [b c h w] to data in the steps of `sampling_steps(cfg)`.

    y: [b] labels.  given: the numbers of `sampling_conditions`, the same for every row; see `integrate` for what else
    it may hold.  cfg: `config.sample`.
    """
    guidance = {name: torch.full_like(noise[:, 0, 0, 0], given[name]) for name in ("omega", "t_min", "t_max")}
    return integrate(net, noise, y, given | guidance, cfg, sampling_steps(cfg))
