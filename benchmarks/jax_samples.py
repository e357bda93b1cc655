"""Sampling in JAX by the trainer's own sampler, of random weights.  Twin of torch_samples.py."""

import jax
from jax.sharding import NamedSharding, PartitionSpec

from jax_impl import step
from jax_impl.devices import local_mesh
from jax_impl.sample import make_sampler


def make_run(config, noise, labels):
    """Return a function that generates images [b h w c], numpy, from noise [b h w c] and labels [b]."""
    graphdef, params = step.build_net(config)
    mesh = local_mesh()
    params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
    sampler = make_sampler(config, graphdef, mesh)
    return lambda: sampler(params, noise, labels, config.sample)
