"""The loop over the steps of a sampler, with or without guidance; the steps are in `meanflow.sampling.steps`."""

import jax
import jax.numpy as jnp

from meanflow.sampling.steps import Step, flow_map_steps, flow_steps


def no_conditions(cfg):
    """Return what a network is given besides (z, t, r, y) when sampling: nothing.  cfg: `config.sample`."""
    return {}


def sample_flow_map(net, noise, y, given, cfg):
    """Carry noise to data in the steps of `flow_map_steps(cfg)`; see `integrate`."""
    return integrate(net, noise, y, given, cfg, flow_map_steps(cfg))


def sample_flow(net, noise, y, given, cfg):
    """Carry noise to data in the steps of `flow_steps(cfg)`; see `integrate`."""
    return integrate(net, noise, y, given, cfg, flow_steps(cfg))


def integrate(net, noise, y, given, cfg, steps):
    """Carry noise [b h w c] to data along `steps`.  cfg: `config.sample`.

    y: [b] labels.  given: what the network is given besides (z, t, r, y), by name, [b] each; `fresh` is the fresh noise
    of the samplers that add some, [steps - 1 b h w c].  Guided steps use u(no class) + cfg_scale (u(y) - u(no class)),
    both forwards as one batch.
    """
    cfg_scale = cfg.cfg_scale if "cfg_scale" in cfg else 1  # a network conditioned on its guidance has none
    given = dict(given)
    fresh = given.pop("fresh", None)
    if any(step.add for step in steps[:-1]) and fresh is None:
        raise ValueError(f"the sampler {cfg.sampler} needs fresh noise: give `fresh`")

    def conditional(z, t, to):
        return net(z, full(z, t), full(z, to), y, **given)

    def guided(z, t, to):
        z, labels = jnp.concatenate([z, z]), jnp.concatenate([y, jnp.full_like(y, net.num_classes)])
        both = {name: jnp.concatenate([a, a]) for name, a in given.items()}
        u, u_null = jnp.split(net(z, full(z, t), full(z, to), labels, **both), 2)
        return u_null + cfg_scale * (u - u_null)

    def velocity(z, t, to, is_guided):
        return conditional(z, t, to) if cfg_scale == 1 else jax.lax.cond(is_guided, guided, conditional, z, t, to)

    def heun(z, u, end, dt, is_guided):
        return z - dt / 2 * (u + velocity(z - dt * u, end, end, is_guided))

    def step(z, xs):
        s, i = xs
        u = velocity(z, s["t"], s["to"], s["guided"])
        if cfg.sampler == "heun":
            operands = (z, u, s["end"], s["move"], s["guided"])
            corrected = i < len(steps) - 1  # the last step is Euler's
            return jax.lax.cond(corrected, heun, lambda z, u, end, dt, _: z - dt * u, *operands), None
        z = s["keep"] * z - s["move"] * u
        return (z if fresh is None else z + s["add"] * fresh[jnp.minimum(i, len(fresh) - 1)]), None  # the last adds 0

    columns = zip(Step._fields, zip(*steps, strict=True), strict=True)
    numbers = {name: jnp.asarray(a, bool if name == "guided" else noise.dtype) for name, a in columns}
    return jax.lax.scan(step, noise, (numbers, jnp.arange(len(steps))))[0]


def full(z, t):
    """Return the time t for each row of z [b ...], [b]."""
    return jnp.full(len(z), t, z.dtype)
