"""Make couplings of a flow model, pairs of noise and image, for Re-MeanFlow: a dataset for both trainers.

    python -m jax_impl.reflow --teacher=runs/flow --output=couplings --num_samples=100000
    python -m jax_impl.reflow --teacher=teacher.safetensors --config=configs/dmf_imagenet.py:sit_256 --labels=dataset \\
        --num_passes=2 --guidance=1.5 --output=couplings

Run again with the same arguments to continue after a kill.  Train on it with --config.data.name=couplings.  Several
processes share the work, each with its own shards: on SLURM or TPU pods add --distributed, elsewhere
--coordinator=HOST:PORT --num_processes=N --process=I to each.
"""

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from jax_impl import checkpoints, weights
from jax_impl.devices import define_flags, local_mesh, start_alone
from jax_impl.methods.reflow import couple
from jax_impl.step import BATCH, abstract_net
from meanflow.commands import reflow
from meanflow.config.flags import run
from meanflow.console_log import setup_logging
from meanflow.errors import UserError
from meanflow.sampling.noise import in_dtype_of


def make_coupler(models, sigmas, guidance):
    """Return the coupler (noise [b h w c], labels [b]) -> images [b h w c] in data units, all numpy.

    models: (config, canonical weights) of the teacher and, optionally, its guide.  sigmas: noise levels, see `couple`.
    The devices of this process share the rows.  Raises UserError for weights that do not fit and, when called, for a
    number of rows that the devices do not divide.
    """
    mesh = local_mesh()
    rows, whole = NamedSharding(mesh, BATCH), NamedSharding(mesh, PartitionSpec())
    graphdefs, params = zip(*(_build(*model) for model in models), strict=True)
    params = jax.device_put(params, whole)

    @jax.jit
    def compiled(params, noise, y):
        net, *guide = (nnx.merge(*parts) for parts in zip(graphdefs, params, strict=True))
        return couple(net, noise, y, sigmas, guidance, *guide)

    def coupler(noise, y):
        noise = in_dtype_of(models[0][0], noise)
        if len(noise) % mesh.size:
            raise UserError(f"--batch_size {len(noise)} is not divisible by the {mesh.size} devices of this process")
        return np.asarray(jax.device_get(compiled(params, *jax.device_put((noise, y), rows))))

    return coupler


def _build(config, canonical):
    graphdef, params = abstract_net(config)
    return graphdef, weights.from_canonical(nnx.merge(graphdef, params), canonical)


def main():
    """Load, make couplings, write."""
    setup_logging()
    reflow.reflow(start_alone, checkpoints.read_weights, make_coupler)


if __name__ == "__main__":
    reflow.define_flags()
    define_flags()
    run(main)
