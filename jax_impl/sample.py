"""Generate images from a trained model: a PNG grid and an .npz.

python -m jax_impl.sample --workdir=runs/digits --num_samples=100 --steps=1
python -m jax_impl.sample --weights=hf://he-vision-group/iMF/MiT_XL_2.pth --omega=8 --output=samples
"""

import functools

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from jax_impl import checkpoints, weights
from jax_impl.autoencoder import make_decoder
from jax_impl.devices import local_mesh, set_precision
from jax_impl.features import make_inception
from jax_impl.methods import METHODS
from jax_impl.step import BATCH, abstract_net
from meanflow.commands import sample as sampling
from meanflow.commands.frozen_networks import FrozenNetworks
from meanflow.config.flags import run
from meanflow.config.workdir import read_workdir
from meanflow.console_log import setup_logging
from meanflow.sampling.noise import in_dtype_of

NETWORKS = FrozenNetworks(make_decoder, make_inception)


def make_sampler(config, graphdef, mesh=None):
    """Return the sampler (params, noise [b h w c], labels [b], c, fresh) -> images [b h w c] in data units.

    All but params (nnx.State) are numpy.  c: a `config.sample`, see `sampling`; all guidance values that the network is
    conditioned on share one compilation.
    fresh: [k b h w c], fresh noise for the steps that add some.
    mesh: devices that share the rows and hold the parameters; None for a single device.  Processes that share a mesh
    call the sampler together, with the same arrays.
    Raises UserError for sampling times that do not decrease, or a diffusion that is infinite.
    """
    method = METHODS[config.method.name]
    method.sampling_steps(config.sample)
    mesh = mesh or local_mesh(jax.local_devices()[:1])
    rows, fresh_rows = NamedSharding(mesh, BATCH), NamedSharding(mesh, PartitionSpec(None, *BATCH))

    @functools.partial(jax.jit, out_shardings=NamedSharding(mesh, PartitionSpec()))
    def compiled(params, noise, y, given):
        return method.sample(nnx.merge(graphdef, params), noise, y, given, config.sample)

    def put(a, sharding):  # from an array that all processes hold
        return jax.make_array_from_callback(a.shape, sharding, lambda index: a[index])

    def sampler(params, noise, y, c, fresh=None):
        noise = in_dtype_of(config, noise)
        num, missing = len(noise), -len(noise) % mesh.size  # all devices get as many rows
        noise, y = (put(np.pad(a, [(0, missing)] + [(0, 0)] * (a.ndim - 1)), rows) for a in (noise, y))
        given: dict = {name: float(value) for name, value in method.sampling_conditions(c).items()}
        if fresh is not None:
            fresh = in_dtype_of(config, fresh)
            given["fresh"] = put(np.pad(fresh, [(0, 0), (0, missing)] + [(0, 0)] * (fresh.ndim - 2)), fresh_rows)
        return np.asarray(jax.device_get(compiled(params, noise, y, given)))[:num]

    return sampler


def load(workdir_path, weights_path, config):
    """Return config, sampler and its weights (nnx.State) of a work directory or of other weights.

    All devices of this process share the work, in the precision in which the model was trained.  Sampling flags on the
    command line override the config.
    """
    if weights_path:
        config, canonical = sampling.read_weights(weights_path, config)
        set_precision(config)
    else:
        config = sampling.override(read_workdir(workdir_path))
        set_precision(config)
        _, canonical = checkpoints.read_weights(workdir_path, config.sample.ema, sampling.step())
        config, canonical = sampling.without_v_heads(config, canonical)
    graphdef, params = abstract_net(config)
    net = nnx.merge(graphdef, params)
    params = weights.from_canonical(net, net.tables() | canonical)
    mesh = local_mesh()
    params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
    return config, make_sampler(config, graphdef, mesh), params


def main():
    """Load, generate, write."""
    setup_logging()
    sampling.sample(load, NETWORKS)


if __name__ == "__main__":
    sampling.define_sample_flags()
    run(main)
