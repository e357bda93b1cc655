"""MeanFlow: learns the average velocity of a flow from its own total derivative.  Source: arXiv:2505.13447.

Every option of the two public systems (Gsunshine/meanflow, meanflow.py; zhuyu-cs/MeanFlow, loss.py) is a setting of
`config.method`; `docs/differences.md` lists where they differ and which setting reproduces each.

`loss_reference` is the algorithm as the paper writes it.  `loss` computes the same with as few forwards as the
mathematics allows.  With F one forward of the whole batch and p the share of rows with r < t: the primal and its
gradient 3F, the tangent pF, guidance F (kappa = 0) or (1 + p)F.
"""

from typing import NamedTuple

import torch

from meanflow.sampling.steps import flow_map_steps as sampling_steps
from torch_impl.methods.common import (
    Rows,
    average_velocity,
    drop_labels,
    expand,
    join,
    path,
    sample_times,
    split_rows,
    sum_squares,
    take,
    total_derivative,
    weigh,
)
from torch_impl.methods.samplers import no_conditions as sampling_conditions
from torch_impl.methods.samplers import sample_flow_map as sample

__all__ = ["Draws", "loss", "loss_reference", "sample", "sampling_conditions", "sampling_steps"]


class Draws(NamedTuple):
    """All the randomness of one loss: unit normals and uniforms in [0, 1), one row per example."""

    noise: torch.Tensor  # [b c h w] unit normals
    times: torch.Tensor  # [b 2] unit normals (logit_normal) or uniforms (uniform)
    coin: torch.Tensor  # [b] uniforms: which rows are flow rows (flow_rows = coin)
    drop: torch.Tensor  # [b] uniforms: which rows lose their label
    dropout: torch.Tensor  # [b] uniforms: seeds of the network's dropout masks


def loss(net, batch, draws, cfg):
    """MeanFlow objective.  Source: arXiv:2505.13447, algorithm 1, eqs. 10 and 11, and with guidance eqs. 19 to 21.

    net: (z, t, r, y, **given) -> u; z and u are [b c h w], t, r and y [b]; see `conditions` for `given`.
    `net.num_classes` is the null label.
    batch: 'image' [b c h w] in data units, 'label' [b] int, optionally 'augment' [b k].  cfg: `config.method`.
    Returns the weighted mean (scalar) and aux: t, r, y [b], v, v_g, u, du_dt, target [b c h w], err [b] (squared,
    summed over a row), weight [b] and row_loss [b].  No gradient flows through v_g, du_dt, target and weight.
    Departs from the paper: flow rows are a fixed share of the batch, not drawn (except with flow_rows = coin).
    """
    x, y, given = batch["image"], batch["label"], conditions(net, batch, draws)
    t, r = sample_times(draws, cfg)
    z, v = path(x, draws.noise, t, cfg)
    y, kept = drop_labels(y, draws, net.num_classes, cfg)
    rows = split_rows(len(y), cfg)
    u, tape = average_velocity(net, z, t, r, y, given, rows)
    v_g = guide(net, z, v, t, y, given, kept, take(u, rows, "flow"), cfg)
    du_dt = total_derivative(net, z, v_g, t, r, y, given, rows, tape)
    target = (v_g - expand(interval(t, r, cfg), v) * du_dt).detach()
    err = sum_squares(u - target)
    weight, row_loss = weigh(err, cfg)
    aux = {
        "t": t, "r": r, "y": y, "v": v, "v_g": v_g, "u": u, "du_dt": du_dt, "target": target, "err": err,
        "weight": weight, "row_loss": row_loss,
    }  # fmt: skip
    return row_loss.mean(), {name: a.detach() for name, a in aux.items()}


def loss_reference(net, batch, draws, cfg):
    """The objective of `loss` as the paper writes it, with a plain JVP of the whole batch; arXiv:2505.13447."""
    x, y, e = batch["image"], batch["label"], draws.noise
    given = conditions(net, batch, draws)
    no_dropout = {name: a for name, a in given.items() if name != "dropout"}

    # Alg. 1: t, r = sample_t_r(), z = (1 - t) x + t e, v = e - x
    t, r = sample_times(draws, cfg)
    z, v = path(x, e, t, cfg)

    # Appendix B.1: labels are dropped
    null, dropped = torch.full_like(y, net.num_classes), draws.drop < cfg.label_drop_prob
    y = torch.where(dropped, null, y)

    # Eq. 21 (eq. 19 if kappa = 0): v_g = w v + k u(z, t, t, y) + (1 - w - k) u(z, t, t, null)
    v_g, w, k = v, cfg.omega, cfg.kappa
    if cfg.guidance:
        guided = ~dropped & (t >= cfg.guidance_start) & (t <= cfg.guidance_end)
        v_g = w * v + k * net(z, t, t, y, **no_dropout) + (1 - w - k) * net(z, t, t, null, **no_dropout)
        v_g = torch.where(guided[:, None, None, None], v_g, v).detach()

    # Alg. 1, eq. 8: u, du_dt = jvp(fn, (z, t, r), (v, 1, 0))
    tangents = (v_g, torch.ones_like(t), torch.zeros_like(r))
    u, du_dt = torch.func.jvp(lambda z, t, r: net(z, t, r, y, **given), (z, t, r), tangents)  # pyright: ignore

    # Eqs. 9 to 11: |u - sg(u_tgt)|^2, u_tgt = v - (t - r) du_dt
    h = torch.clip(t - r, 0, 1) if cfg.clip_interval else t - r
    target = (v_g - h[:, None, None, None] * du_dt).detach()
    err = sum_squares(u - target)

    # Eq. 22: sg(1 / (err + c)^p) err
    d = err**2 if cfg.weighting == "adaptive_squared" else err
    weight = ((d + cfg.adaptive_eps) ** -(0 if cfg.weighting == "uniform" else cfg.adaptive_power)).detach()
    return (weight * d).mean(), {
        "t": t, "r": r, "y": y, "v": v, "v_g": v_g, "u": u, "du_dt": du_dt, "target": target, "err": err,
        "weight": weight, "row_loss": weight * d,
    }  # fmt: skip


def conditions(net, batch, draws):
    """Return the network's inputs in addition to (z, t, r, y), [b ...] each by name.

    augment: augmentation labels, if the batch has them and `net.augment_dim` is positive; without them a network learns
    augmented images as if they were real.  dropout: masks, if `net.dropout` is positive; the primal and the tangent of
    a row share them.  Both attributes are optional.
    """
    given = {"augment": batch["augment"]} if getattr(net, "augment_dim", 0) and "augment" in batch else {}
    return given | ({"dropout": net.dropout_masks(draws.dropout)} if getattr(net, "dropout", 0) else {})


@torch.no_grad()
def guide(net, z, v, t, y, given, kept, u_flow, cfg):
    """Return the guided velocity v_g [b c h w]: w v + k u(z,t,t,y) + (1-w-k) u(z,t,t,null), w = omega, k = kappa.

    Only where the label was kept and guidance_start <= t <= guidance_end; v elsewhere.  On flow rows u(z,t,t,y) is
    the row's own prediction `u_flow`; the null forward of all rows and the conditional forward of those with r < t run
    as one batch.  k = 0 needs no conditional forward.  Guidance runs without dropout, so a network with dropout shares
    no forward.  Source: eq. 21 of arXiv:2505.13447, appendix B.1.
    """
    if not cfg.guidance:
        return v
    rows = split_rows(len(y), cfg)
    if "dropout" in given:
        rows, u_flow = Rows(1, 0, len(y)), u_flow[:0]
    given = {name: a for name, a in given.items() if name != "dropout"}
    null = torch.full_like(y, net.num_classes)
    if cfg.kappa == 0:
        v_g = cfg.omega * v + (1 - cfg.omega) * net(z, t, t, null, **given)
    else:
        u_cond, u_null = conditional_and_null(net, z, t, y, null, given, u_flow, rows)
        v_g = cfg.omega * v + cfg.kappa * u_cond + (1 - cfg.omega - cfg.kappa) * u_null
    guided = kept & (t >= cfg.guidance_start) & (t <= cfg.guidance_end)
    return torch.where(expand(guided, v), v_g, v).detach()


def conditional_and_null(net, z, t, y, null, given, u_flow, rows):
    """Return u(z, t, t, y) and u(z, t, t, null) [b c h w], from one batch.

    u_flow: u(z, t, t, y) of the flow rows of a static split, which need no conditional forward of their own.
    """
    both = Rows(rows.groups, rows.flow + rows.jvp, rows.jvp)
    z2, t2, y2 = (join(a, take(b, rows, "jvp"), both) for a, b in ((z, z), (t, t), (null, y)))
    given = {name: join(a, take(a, rows, "jvp"), both) for name, a in given.items()}
    u = net(z2, t2, t2, y2, **given)
    return join(u_flow, take(u, both, "jvp"), rows), take(u, both, "flow")


def interval(t, r, cfg):
    """Return t - r [b], clipped to [0, 1] if clip_interval."""
    return torch.clip(t - r, 0, 1) if cfg.clip_interval else t - r
