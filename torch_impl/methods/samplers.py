"""The loop over the steps of a sampler, with or without guidance; the steps are in `meanflow.sampling.steps`."""

import torch

from meanflow.sampling.steps import flow_map_steps, flow_steps


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
    """Carry noise [b c h w] to data along `steps`.  cfg: `config.sample`.

    y: [b] labels.  given: what the network is given besides (z, t, r, y), by name, [b] each; `fresh` is the fresh noise
    of the samplers that add some, [steps - 1 b c h w].  Guided steps use u(no class) + cfg_scale (u(y) - u(no class)),
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
        z, labels = torch.cat([z, z]), torch.cat([y, torch.full_like(y, net.num_classes)])
        both = {name: torch.cat([a, a]) for name, a in given.items()}
        u, u_null = net(z, full(z, t), full(z, to), labels, **both).chunk(2)
        return u_null + cfg_scale * (u - u_null)

    def velocity(z, t, to, is_guided):
        return guided(z, t, to) if is_guided and cfg_scale != 1 else conditional(z, t, to)

    def heun(z, u, end, dt, is_guided):
        return z - dt / 2 * (u + velocity(z - dt * u, end, end, is_guided))

    def step(z, s, corrected, e):
        u = velocity(z, s.t, s.to, s.guided)
        if cfg.sampler == "heun" and corrected:
            return heun(z, u, s.end, s.move, s.guided)
        return s.keep * z - s.move * u + (s.add * e if e is not None else 0)

    for i, s in enumerate(steps):
        corrected = i < len(steps) - 1  # Heun's last step is Euler's
        noise = step(noise, s, corrected, fresh[i] if fresh is not None and corrected else None)
    return noise


def full(z, t):
    """Return the time t for each row of z [b ...], [b]."""
    return torch.full_like(z.flatten(1)[:, 0], t)
