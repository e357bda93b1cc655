"""`jax_impl.load`: a trained model in a few lines of Python.  Twin of `torch_impl.model`."""

import contextlib
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from jax_impl import checkpoints, weights
from jax_impl.autoencoder import make_encoder
from jax_impl.devices import local_mesh
from jax_impl.methods import METHODS
from jax_impl.sample import NETWORKS, make_sampler
from jax_impl.step import abstract_net
from meanflow.commands import model
from meanflow.sampling.noise import in_dtype_of


def load(source: str | pathlib.Path, **given: Any) -> model.Model:
    """Return the model of a work directory, canonical weights, or an official file.

    Arguments and errors as `meanflow.commands.model.load`.  device: a jax.Device; by default all of this process share
    the rows.
    """
    return model.load(source, FRAMEWORK, **given)


def make_network(config, canonical, device):
    """Return the network of canonical weights {name: array}, see `model.Network`."""
    mesh = local_mesh() if device is None else local_mesh([device])
    with precision(config):
        graphdef, params = abstract_net(config)
        net = nnx.merge(graphdef, params)
        params = weights.from_canonical(net, net.tables() | canonical)
        params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))

    @jax.jit
    def compiled(params, z, t, r, y, given):
        return nnx.merge(graphdef, params)(z, t, r, y, **given)

    def velocity(z, t, r, y, given):
        z, t, r, *given_values = (jnp.asarray(in_dtype_of(config, a)) for a in (z, t, r, *given.values()))
        told = dict(zip(given, given_values, strict=True))
        return np.asarray(jax.device_get(compiled(params, z, t, r, jnp.asarray(y), told)))

    def sampler(config):
        sample = make_sampler(config, graphdef, mesh)
        return lambda _, *arguments: sample(params, *arguments)

    return model.Network(nnx.merge(graphdef, params), sampler, velocity, functools.partial(precision, config))


@contextlib.contextmanager
def precision(config):
    """Set the precision of a config, and afterwards that of before."""
    with (
        jax.default_matmul_precision(config.train.matmul_precision),
        jax.enable_x64(config.model.compute_dtype == "float64"),
    ):
        yield


def conditions(config):
    """Return what the network is told besides (z, t, r, y) when it samples, a number each by name."""
    return METHODS[config.method.name].sampling_conditions(config.sample)


FRAMEWORK = model.Framework(checkpoints.read_weights, make_network, NETWORKS, make_encoder, conditions)
