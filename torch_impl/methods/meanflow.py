"""MeanFlow: the average velocity of a flow, learnt from its own total derivative.  Source: arXiv:2505.13447.

Every option of the two public systems (Gsunshine/meanflow, meanflow.py; zhuyu-cs/MeanFlow, loss.py) is a setting of
`config.method`; `docs/differences.md` lists what differs between them and which setting reproduces it.

A step runs as few forwards as the mathematics allows.  With F one forward of the whole batch and p the share of rows
with r < t: the primal and its gradient 3F, the tangent pF, guidance F (kappa = 0) or (1 + p)F.
"""

import itertools
import math
from typing import NamedTuple

import torch

from configs.errors import UserError


class Draws(NamedTuple):
    """All the randomness of one loss: unit normals and uniforms in [0, 1), one row an example."""

    noise: torch.Tensor  # [b c h w] unit normals
    times: torch.Tensor  # [b 2] unit normals (logit_normal) or uniforms (uniform)
    coin: torch.Tensor  # [b] uniforms: which rows are flow rows (flow_rows = coin)
    drop: torch.Tensor  # [b] uniforms: which rows lose their label
    dropout: torch.Tensor  # [b] uniforms: from which a network's dropout masks follow


class Rows(NamedTuple):
    """A static interleaving of the batch: `groups` times (`flow` rows with r = t, then `rest` rows with r < t).

    Groups, not one block of each, keep a contiguous shard of the batch whole: to split it moves no data between
    devices, and which rows are flow rows does not depend on how many devices there are.
    """

    groups: int
    flow: int
    rest: int


def draw(key, shape, cfg):
    """Draw what the loss of a batch of the given shape (b c h w) needs.  The only random function.

    key: a `torch.Generator`; the draws are on its device.
    """
    times = torch.randn if cfg.time_sampler == "logit_normal" else torch.rand
    return Draws(
        noise=torch.randn(shape, generator=key, device=key.device),
        times=times((shape[0], 2), generator=key, device=key.device),
        coin=torch.rand(shape[:1], generator=key, device=key.device),
        drop=torch.rand(shape[:1], generator=key, device=key.device),
        dropout=torch.rand(shape[:1], generator=key, device=key.device),
    )


def loss(net, batch, draws, cfg):
    """MeanFlow objective.  Source: arXiv:2505.13447, algorithm 1, eqs. 10 and 11, and with guidance eqs. 19 to 21.

    net: (z, t, r, y, **given) -> u, z and u of shape [b c h w], t, r, y of [b]; see `conditions` for what it is given.
    `net.num_classes` is the null label, `net.dropout` its rate of dropout.
    batch: 'image' [b c h w] in data units, 'label' [b] int, 'augment' [b k] if there are such labels.  cfg:
    `config.method`.
    Returns the weighted mean (scalar) and aux: t, r, y [b], v, v_g, u, du_dt, target [b c h w], err [b] (squared,
    summed over a row), weight [b] and row_loss [b].  No gradient flows through v_g, du_dt, target and weight.
    Departs from the paper: flow rows are a fixed share of the batch, not drawn (but for flow_rows = coin).
    """
    x, y, given = batch["image"], batch["label"], conditions(net, batch, draws)
    t, r = sample_times(draws, cfg)
    z, v = path(x, draws.noise, t, cfg)
    y, kept = drop_labels(y, draws, net.num_classes, cfg)
    rows = split_rows(len(y), cfg)
    u_flow = flow_velocity(net, z, t, y, given, rows)
    v_g = guide(net, z, v, t, y, given, kept, u_flow, cfg)
    u, du_dt = average_velocity(net, z, v_g, t, r, y, given, u_flow, rows)
    target = (v_g - expand(interval(t, r, cfg), v) * du_dt).detach()
    err = sum_squares(u - target)
    weight, row_loss = weigh(err, cfg)
    aux = {
        "t": t, "r": r, "y": y, "v": v, "v_g": v_g, "u": u, "du_dt": du_dt, "target": target, "err": err,
        "weight": weight, "row_loss": row_loss,
    }  # fmt: skip
    return row_loss.mean(), {name: a.detach() for name, a in aux.items()}


def conditions(net, batch, draws):
    """Return what the network is given beside (z, t, r, y), arrays of [b ...] by name.

    augment: augmentation labels, if the batch has them and the network wants them; one that is told of none
    (augment_dim 0) learns augmented images as if they were real.  dropout: its masks, if it has
    dropout; the primal and the tangent of a row share them.
    """
    given = {"augment": batch["augment"]} if net.augment_dim and "augment" in batch else {}
    return given | ({"dropout": net.dropout_masks(draws.dropout)} if net.dropout else {})


def sample_times(draws, cfg):
    """Return t >= r, [b] each in [0, 1], from two draws, each with its own mean and deviation, and r = t on flow rows.

    `sorted`: t is the larger, r the smaller, then flow rows.  `truncated`: t is the first, r the second but at most t,
    so that rows other than flow rows may have r = t as well.  Source: Gsunshine/py-meanflow, models/time_sampler.py,
    where they are v0 and v1.
    """
    times = draws.times
    t, r = times[:, 0], times[:, 1]
    if cfg.time_sampler == "logit_normal":
        t, r = (torch.sigmoid(times[:, i] * cfg.time_std[i] + cfg.time_mean[i]) for i in range(2))
    r, t = torch.minimum(t, r), torch.maximum(t, r) if cfg.time_order == "sorted" else t
    return t, torch.where(is_flow(draws, cfg), t, r)


def is_flow(draws, cfg):
    """Return [b] bool: the rows with r = t.

    `split`: a fixed interleaving (see `Rows`).  `front`: the first int(b * flow_fraction) rows, as the official JAX
    code.  `coin`: each row with probability flow_fraction, as the PyTorch reproduction.
    """
    if cfg.flow_rows == "coin":
        return draws.coin < cfg.flow_fraction
    row = torch.arange(len(draws.coin), device=draws.coin.device)
    if cfg.flow_rows == "front":
        return row < int(len(row) * cfg.flow_fraction)
    rows = split_rows(len(row), cfg)
    return row % (rows.flow + rows.rest) < rows.flow


def split_rows(batch_size, cfg):
    """Return the static split of a batch: all rows are `rest` unless flow_rows = split."""
    num_flow = int(batch_size * cfg.flow_fraction) if cfg.flow_rows == "split" else 0
    groups = math.gcd(batch_size, num_flow)
    return Rows(groups, num_flow // groups, (batch_size - num_flow) // groups)


def path(x, e, t, cfg):
    """Return the state z and its velocity v = dz/dt [b c h w] between data x (t = 0) and noise e (t = 1)."""
    t = expand(t, x)
    if cfg.path == "cosine":
        angle = t * (math.pi / 2)
        z = torch.cos(angle) * x + torch.sin(angle) * e
        return z, (torch.cos(angle) * e - torch.sin(angle) * x) * (math.pi / 2)
    return (1 - t) * x + t * e, e - x


def drop_labels(y, draws, null, cfg):
    """Return labels [b] with some replaced by `null`, and [b] bool: the rows that kept theirs.

    `coin`: each row with probability label_drop_prob.  `front`: as many rows as that gives, but the first ones, as
    the official JAX code.
    """
    dropped = draws.drop < cfg.label_drop_prob
    if cfg.label_drop == "front":
        dropped = torch.arange(len(y), device=y.device) < dropped.sum()
    return torch.where(dropped, null, y), ~dropped


def flow_velocity(net, z, t, y, given, rows):
    """Return u(z, t, t, y) on the flow rows of a static split [groups*flow c h w]: one plain forward."""
    z, t, y = (take(a, rows, "flow") for a in (z, t, y))
    given = {name: take(a, rows, "flow") for name, a in given.items()}
    return net(z, t, t, y, **given) if rows.flow else z


@torch.no_grad()
def guide(net, z, v, t, y, given, kept, u_flow, cfg):
    """Return the guided velocity v_g [b c h w]: w v + k u(z,t,t,y) + (1-w-k) u(z,t,t,null), w = omega, k = kappa.

    Only where the label was kept and guidance_start <= t <= guidance_end; v elsewhere.  On flow rows u(z,t,t,y) is
    the row's own prediction `u_flow`; the null forward of all rows and the conditional forward of the rest run as
    one batch.  With k = 0 no conditional forward is needed.  Guidance sees no dropout: where the network has it, no
    forward is shared.  Source: eq. 21 of arXiv:2505.13447, appendix B.1.
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
        both = Rows(rows.groups, rows.flow + rows.rest, rows.rest)  # the null forward of all, then the rest's own
        z2, t2, y2 = (join(a, take(b, rows, "rest"), both) for a, b in ((z, z), (t, t), (null, y)))
        given = {name: join(a, take(a, rows, "rest"), both) for name, a in given.items()}
        u = net(z2, t2, t2, y2, **given)
        u_null, u_cond = take(u, both, "flow"), join(u_flow, take(u, both, "rest"), rows)
        v_g = cfg.omega * v + cfg.kappa * u_cond + (1 - cfg.omega - cfg.kappa) * u_null
    guided = kept & (t >= cfg.guidance_start) & (t <= cfg.guidance_end)
    return torch.where(expand(guided, v), v_g, v).detach()


def average_velocity(net, z, v_g, t, r, y, given, u_flow, rows):
    """Return u(z, t, r, y, given) and its total derivative du/dt along (v_g, 1, 0), [b c h w] each.

    The JVP runs on the rest of a static split; flow rows have their forward already, and du/dt = 0 there because
    nothing reads it.
    """
    z, v_g, t, r, y = (take(a, rows, "rest") for a in (z, v_g, t, r, y))
    given = {name: take(a, rows, "rest") for name, a in given.items()}
    u, du_dt = z, z
    if rows.rest:
        tangents = (v_g, torch.ones_like(t), torch.zeros_like(r))
        u, du_dt = torch.func.jvp(lambda z, t, r: net(z, t, r, y, **given), (z, t, r), tangents)  # pyright: ignore
    return join(u_flow, u, rows), join(torch.zeros_like(u_flow), du_dt, rows).detach()


def interval(t, r, cfg):
    """Return t - r [b], clipped to [0, 1] if clip_interval."""
    return torch.clip(t - r, 0, 1) if cfg.clip_interval else t - r


def weigh(err, cfg):
    """Return the constant weight [b] and the weighted loss [b] of each row's summed squared error err [b].

    `adaptive`: err / (err + eps)^p, arXiv:2505.13447 eq. 22.  `adaptive_squared`: the same of err^2, as the PyTorch
    reproduction.  `uniform`: err itself.
    """
    if cfg.weighting == "uniform":
        return torch.ones_like(err), err
    if cfg.weighting == "adaptive_squared":
        err = err**2
    weight = ((err + cfg.adaptive_eps) ** -cfg.adaptive_power).detach()
    return weight, weight * err


def sample(net, noise, y, cfg):
    """Carry noise [b c h w] to data along `sampling_times(cfg)`: z_r = z_t - (t - r) u(z_t, t, r, y).

    y: [b] labels.  cfg: `config.sample`; with cfg_scale s not 1, u = u(null) + s (u(y) - u(null)), two forwards as
    one batch.  Source: arXiv:2505.13447, algorithm 2; zhuyu-cs/MeanFlow, meanflow_sampler.py.
    """

    def step(z, times):
        t, r = (torch.full_like(z[:, 0, 0, 0], time) for time in times)
        if cfg.cfg_scale == 1:
            u = net(z, t, r, y)
        else:
            both = torch.cat([y, torch.full_like(y, net.num_classes)])
            u, u_null = net(*(torch.cat([a, a]) for a in (z, t, r)), both).chunk(2)
            u = u_null + cfg.cfg_scale * (u - u_null)
        return z - expand(t - r, z) * u

    for t, r in itertools.pairwise(sampling_times(cfg)):
        noise = step(noise, (t, r))
    return noise


def sampling_times(cfg):
    """Return the times of sampling, from noise to data: cfg.times, or cfg.steps uniform steps from 1 to 0.

    Raises UserError unless they fall strictly and stay in [0, 1].
    """
    times = tuple(cfg.times) or tuple(1 - i / cfg.steps for i in range(cfg.steps + 1))
    if len(times) < 2 or any(a <= b for a, b in itertools.pairwise(times)) or times[0] > 1 or times[-1] < 0:
        raise UserError(f"sampling times must fall from at most 1 to at least 0, in one step or more, not {times}")
    return times


def take(a, rows, part):
    """Return the `flow` or the `rest` rows of a [b ...]."""
    a = a.reshape(rows.groups, -1, *a.shape[1:])
    a = a[:, : rows.flow] if part == "flow" else a[:, rows.flow :]
    return a.reshape(-1, *a.shape[2:]).contiguous()  # a JVP wants primal and tangent in one layout


def join(a, b, rows):
    """Join rows a and b group by group; the inverse of `take` for a flow and a rest part."""
    a, b = (part.reshape(rows.groups, len(part) // rows.groups, *part.shape[1:]) for part in (a, b))
    joined = torch.cat([a, b], dim=1)
    return joined.reshape(-1, *joined.shape[2:])


def expand(a, like):
    """Give a [b] the rank of `like` [b ...]."""
    return a.reshape(-1, *[1] * (like.ndim - 1))


def sum_squares(a):
    """Return the sum of squares over each row of a [b ...], [b], in float32 at least."""
    return a.square().sum(tuple(range(1, a.ndim)))
