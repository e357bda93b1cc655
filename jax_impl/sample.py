"""Generate images from a trained model: a PNG grid and an .npz.

python -m jax_impl.sample --workdir=runs/digits --num_samples=100 --steps=1
python -m jax_impl.sample --weights=weights.safetensors --config=configs/digits.py --output=samples
"""

import jax
import numpy as np
from flax import nnx

from configs import resolve
from configs.flags import run
from evaluation import sampling
from evaluation.logs import setup_logging
from jax_impl import checkpoints, weights
from jax_impl.methods import METHODS
from jax_impl.step import abstract_net


def make_sampler(config, graphdef):
    """Return the sampler (params, noise [b h w c], labels [b], c, fresh) -> images [b h w c] in data units.

    All but the first are numpy.  params: nnx.State.  c: a `config.sample`, see `sampling`; one compilation serves every
    guidance that is told.
    fresh: [k b h w c], the noise that samplers draw anew.
    Raises UserError for sampling times that do not fall, or a diffusion that is infinite.
    """
    method = METHODS[config.method.name]
    method.sampling_steps(config.sample)

    @jax.jit
    def compiled(params, noise, y, given):
        return method.sample(nnx.merge(graphdef, params), noise, y, given, config.sample)

    def sampler(params, noise, y, c, fresh=None):
        given = {name: float(value) for name, value in method.sampling_conditions(c).items()}
        given |= {} if fresh is None else {"fresh": fresh}
        return np.asarray(jax.device_get(compiled(params, noise, y, given)))

    return sampler


def load(workdir_path, weights_path, config):
    """Return config, sampler and its weights (nnx.State) of a work directory or of a safetensors file.

    Sampling flags given on the command line replace those of the config.
    """
    if weights_path:
        config, canonical = sampling.override(resolve.check(config)), weights.load(weights_path)
    else:
        config = sampling.override(resolve.read_workdir(workdir_path))
        _, canonical = checkpoints.read_weights(workdir_path, config.sample.ema)
    config, canonical = sampling.without_v_heads(config, canonical)
    graphdef, params = abstract_net(config)
    params = weights.from_canonical(nnx.merge(graphdef, params), canonical)
    return config, make_sampler(config, graphdef), params


def main():
    """Load, generate, write."""
    setup_logging()
    sampling.sample(load)


if __name__ == "__main__":
    sampling.define_sample_flags()
    run(main)
