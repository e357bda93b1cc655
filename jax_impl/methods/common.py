"""Shared by the methods: times and flow rows, path, label drop, weights of the loss, and splitting a batch."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient

from jax_impl.models.tape import Tape
from meanflow.config import division


class Rows(NamedTuple):
    """A static, interleaved split of the batch: `groups` times (`flow` rows with r = t, then `jvp` rows with r < t).

    Groups, rather than one block of each, keep contiguous shards of the batch together: splitting moves no data
    between devices, and which rows are flow rows does not depend on the number of devices.
    """

    groups: int
    flow: int
    jvp: int


def sample_times(draws, cfg):
    """Return t >= r, [b] each in [0, 1], from two draws with a mean and deviation each; r = t on flow rows.

    `sorted`: t is the larger, r the smaller.  `truncated`: t is the first, r the second capped at t, so other rows can
    have r = t too.  Flow rows are set afterwards.  Source: Gsunshine/py-meanflow, models/time_sampler.py, v0 and v1.
    """
    t, r = order_times(draws.times, cfg)
    return t, jnp.where(is_flow(draws, cfg), t, r)


def order_times(times, cfg):
    """Return t >= r [b] from two draws [b 2], without flow rows; see `sample_times`."""
    t, r = (to_time(times[:, i], cfg.time_mean[i], cfg.time_std[i], cfg) for i in range(2))
    r, t = jnp.minimum(t, r), jnp.maximum(t, r) if cfg.time_order == "sorted" else t
    return t, r


def to_time(drawn, mean, std, cfg):
    """Return times in [0, 1] from unit normals or, if time_sampler = uniform, from uniforms, which already are times.

    `logit_normal`: sigmoid(normal).  `arctan`: 2/pi atan(exp(normal)), the time at which the cosine path has the
    signal-to-noise ratio that the linear path has at sigmoid(normal).  `arctan_official`: without exp, as in
    kyungmnlee/dmf, loss.py; can be negative.
    """
    normal = drawn * std + mean
    if cfg.time_sampler == "arctan":
        return jnp.arctan(jnp.exp(normal)) * (2 / math.pi)
    if cfg.time_sampler == "arctan_official":
        return jnp.arctan(normal) * (2 / math.pi)
    return jax.nn.sigmoid(normal) if cfg.time_sampler == "logit_normal" else drawn


def is_flow(draws, cfg):
    """Return [b] bool: the rows with r = t.

    `split`: a fixed interleaving (see `Rows`).  `front`: the first int(b * flow_fraction) rows of the whole batch (the
    official JAX code: of each device's); see `meanflow.data.draws.arrange`.  `coin`: each row with probability
    flow_fraction, as in the PyTorch reproduction.
    """
    if cfg.flow_rows != "split":
        return draws.coin < cfg.flow_fraction
    rows = split_rows(len(draws.coin), cfg)
    return jnp.arange(len(draws.coin)) % (rows.flow + rows.jvp) < rows.flow


def split_rows(batch_size, cfg):
    """Return the static split of a batch; unless flow_rows = split, all rows are `jvp`.

    Raises UserError if flow_fraction of the batch is not a whole number of rows.
    """
    return Rows(*division.split(batch_size, cfg.flow_fraction if cfg.flow_rows == "split" else 0.0))


def path(x, e, t, cfg):
    """Return the state z and its velocity v = dz/dt [b h w c] between data x (t = 0) and noise e (t = 1)."""
    t = expand(t, x)
    if cfg.path == "cosine":
        angle = t * (math.pi / 2)
        z = jnp.cos(angle) * x + jnp.sin(angle) * e
        return z, (jnp.cos(angle) * e - jnp.sin(angle) * x) * (math.pi / 2)
    return (1 - t) * x + t * e, e - x


def drop_labels(y, draws, null, cfg):
    """Return labels [b] with some replaced by `null`, and [b] bool: the rows that keep theirs.

    `coin`: each row with probability label_drop_prob.  `front`: the same number of rows, but the first ones of the
    whole batch (the official JAX code: of each device's); see `meanflow.data.draws.arrange`.
    """
    dropped = draws.drop < cfg.label_drop_prob
    return jnp.where(dropped, null, y), ~dropped


def weigh(err, cfg):
    """Return each row's weight [b], which has no gradient, and weighted loss [b], from its squared error err [b].

    `adaptive`: err / (err + eps)^p, arXiv:2505.13447 eq. 22.  `adaptive_squared`: the same for err^2, as in the PyTorch
    reproduction.  `uniform`: err itself.
    """
    if cfg.weighting == "uniform":
        return jnp.ones_like(err), err
    if cfg.weighting == "adaptive_squared":
        err = err**2
    weight = stop_gradient((err + cfg.adaptive_eps) ** -cfg.adaptive_power)
    return weight, weight * err


def average_velocity(net, z, t, r, y, given, rows, **options):
    """Return u = net(z, t, r, y, **given) on all rows, with gradient, and the tape that `total_derivative` reads.

    options: arguments of the network that are no arrays of rows.
    """
    tape = Tape(lambda a: take(a, rows, "jvp"), (z, t, r, y))
    u = net(z, t, r, y, **given, **options, **with_tape(net, tape))
    tape.close()
    return u, tape


def total_derivative(net, z, v, t, r, y, given, rows, tape):
    """Return du/dt [b h w c], the total derivative of u = net(z, t, r, y, **given) along (v, 1, 0), without gradient.

    tape: from `average_velocity` of the same arguments.  The JVP runs only on rows with r < t of a static split; on
    flow rows, where nothing reads it, du/dt is 0.
    """
    du_dt = jnp.zeros_like(z)
    if not rows.jvp:
        return du_dt
    tape.replay((z, t, r, y))
    flow, taped = take(du_dt, rows, "flow"), with_tape(net, tape)
    z, v, t, r, y = (take(a, rows, "jvp") for a in (z, v, t, r, y))
    given = {name: take(a, rows, "jvp") for name, a in given.items()}
    tangents = (v, jnp.ones_like(t), jnp.zeros_like(r))
    _, du_dt = jax.jvp(lambda z, t, r: net(z, t, r, y, **given, **taped), (z, t, r), tangents)
    tape.finish()
    return stop_gradient(join(flow, du_dt, rows))


def with_tape(net, tape):
    """Return the tape as an argument of a network that has `takes_tape`; the JVP of any other computes everything."""
    return {"tape": tape} if getattr(net, "takes_tape", False) else {}


def take(a, rows, part):
    """Return the `flow` or the `jvp` rows of a [b ...]."""
    a = a.reshape(rows.groups, -1, *a.shape[1:])
    a = a[:, : rows.flow] if part == "flow" else a[:, rows.flow :]
    return a.reshape(-1, *a.shape[2:])


def join(a, b, rows):
    """Interleave rows a and b group by group; the inverse of `take` of both parts."""
    a, b = (part.reshape(rows.groups, len(part) // rows.groups, *part.shape[1:]) for part in (a, b))
    joined = jnp.concatenate([a, b], axis=1)
    return joined.reshape(-1, *joined.shape[2:])


def interleave(*parts):
    """Interleave parts [b ...] row by row into [b*parts ...], so that contiguous shards of rows stay together."""
    a = jnp.stack(parts, axis=1)
    return a.reshape(-1, *a.shape[2:])


def separate(a, num):
    """Return the `num` parts [b ...] of a [b*num ...]; the inverse of `interleave`."""
    a = a.reshape(-1, num, *a.shape[1:])
    return tuple(a[:, i] for i in range(num))


def expand(a, like):
    """Return a [b] with the rank of `like` [b ...], to broadcast against it."""
    return a.reshape(-1, *[1] * (like.ndim - 1))


def sum_squares(a):
    """Return the sum of squares of each row of a [b ...], [b]."""
    return jnp.square(a).sum(tuple(range(1, a.ndim)))
