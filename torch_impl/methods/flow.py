"""Flow matching: learns the velocity of a flow; MeanFlow models can start from its weights.

Source: arXiv:2403.03206 (logit-normal times); arXiv:2410.06940 (REPA); kyungmnlee/dmf, loss.py, FMLoss.
"""

from typing import NamedTuple

import torch

from meanflow.sampling.steps import flow_steps as sampling_steps
from torch_impl.methods.common import drop_labels, path, sum_squares, to_time
from torch_impl.methods.samplers import no_conditions as sampling_conditions
from torch_impl.methods.samplers import sample_flow as sample

__all__ = ["Draws", "loss", "loss_reference", "sample", "sampling_conditions", "sampling_steps"]


class Draws(NamedTuple):
    """All the randomness of one loss: unit normals and uniforms in [0, 1), one row per example."""

    noise: torch.Tensor  # [b c h w] unit normals
    times: torch.Tensor  # [b] unit normals, or uniforms (time_sampler = uniform)
    drop: torch.Tensor  # [b] uniforms: which rows lose their label


def loss(net, batch, draws, cfg):
    """Flow-matching objective: the mean squared error of the velocity, plus REPA's alignment of features.

    net: (z, t, r, y) -> v; z and v are [b c h w]; with features=True it also returns its tokens projected for each
    encoder, [b n d_i].  `net.num_classes` is the null label.  batch: 'image' [b c h w] in data units, 'label' [b] int,
    and for REPA 'features' [b n d], those of the frozen encoders concatenated.  cfg: `config.method`.
    Returns the loss (scalar) and aux: t, r (the same), y [b], v, u (the prediction) [b c h w], err [b] (squared, summed
    over a row), row_loss [b] (err averaged over a row), and with REPA projection (scalar, see `alignment`).
    """
    x = batch["image"]
    t = to_time(draws.times, cfg.flow_time_mean, cfg.flow_time_std, cfg)
    y, _ = drop_labels(batch["label"], draws, net.num_classes, cfg)
    z, v = path(x, draws.noise, t, cfg)
    aux = {"t": t, "r": t, "y": y, "v": v}
    if "features" in batch:
        u, projections = net(z, t, t, y, features=True)
        aux["projection"] = alignment(projections, batch["features"])
    else:
        u = net(z, t, t, y)
    err = sum_squares(u - v)
    row_loss = err / u[0].numel()
    aux |= {"u": u, "err": err, "row_loss": row_loss}
    value = row_loss.mean() + cfg.repa_coeff * aux.get("projection", 0)
    return value, {name: a.detach() for name, a in aux.items()}


def loss_reference(net, batch, draws, cfg):
    """The objective of `loss` as the papers write it.  Source: arXiv:2403.03206; arXiv:2410.06940 (REPA)."""
    x, y, e = batch["image"], batch["label"], draws.noise

    # t = sample_t(), z = (1 - t) x + t e, v = e - x; labels are dropped
    t = to_time(draws.times, cfg.flow_time_mean, cfg.flow_time_std, cfg)
    z, v = path(x, e, t, cfg)
    y = torch.where(draws.drop < cfg.label_drop_prob, net.num_classes, y)

    # |u - v|^2, the mean over a row
    u, projections = net(z, t, t, y, features=True) if "features" in batch else (net(z, t, t, y), ())
    err = sum_squares(u - v)
    row_loss = err / x[0].numel()
    aux = {"t": t, "r": t, "y": y, "v": v, "u": u, "err": err, "row_loss": row_loss}
    if not projections:
        return row_loss.mean(), aux

    # REPA, eq. 8: minus the cosine of projected tokens and features, the mean over tokens and encoders
    cosines, start = [], 0
    for p in projections:
        f = batch["features"][..., start : start + p.shape[-1]]
        cosines.append((p * f).sum(-1) / ((p**2).sum(-1) * (f**2).sum(-1)).sqrt())
        start += p.shape[-1]
    projection = -torch.stack(cosines).mean()
    return row_loss.mean() + cfg.repa_coeff * projection, aux | {"projection": projection}


def alignment(projections, features):
    """Return the negative cosine similarity (scalar in [-1, 1]) of projections and features, averaged over all tokens.

    projections: [b n d_i] for each encoder.  features: [b n sum d_i].  Source: arXiv:2410.06940 eq. 8.
    """
    parts = features.split([p.shape[-1] for p in projections], dim=-1)
    return -sum((unit(p) * unit(f)).sum(-1).mean() for p, f in zip(projections, parts, strict=True)) / len(parts)


def unit(a, eps=1e-12):
    """Return a [... d] divided by its norm, or by eps if that is larger, so that its derivative exists at zero."""
    return a / a.square().sum(-1, keepdim=True).clamp(min=eps**2).sqrt()
