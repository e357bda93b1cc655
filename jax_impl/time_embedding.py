"""Fit the two time embeddings of a Re-MeanFlow network to the single one of its EDM2 teacher, to start training from.

    python -m jax_impl.time_embedding --teacher=runs/teacher --output=start.safetensors
    python -m jax_impl.time_embedding --teacher=edm2-img512-s-2147483-0.070.pkl --output=start.safetensors

Then --config.train.load_from=start.safetensors trains from them.
Source: Xinxi-Zhang/Re-MeanFlow, init_time_emb.py, which fits by Adam; least squares reach a smaller error.
"""

import jax.numpy as jnp
from flax import nnx

from jax_impl import checkpoints, weights
from jax_impl.devices import set_precision
from jax_impl.models.edm2 import log_sigma
from jax_impl.step import abstract_net
from meanflow.commands import time_embedding
from meanflow.config.flags import run
from meanflow.console_log import setup_logging


def build(config, canonical):
    """Return the network with canonical weights {name: array}.  Raises UserError if they do not fit."""
    graphdef, shapes = abstract_net(config)
    return nnx.merge(graphdef, weights.from_canonical(nnx.merge(graphdef, shapes), canonical))


def error(config, canonical, teacher_config, teacher, t, r):
    """Return the mean squared error (float) of a network's embedding of t and r [b] to the teacher's of t alone.

    canonical, teacher: weights {name: array}.  Raises UserError if they do not fit their config.
    """
    net, target = build(config, canonical), build(teacher_config, teacher).unet
    t, r = jnp.asarray(t), jnp.asarray(r)
    return float(jnp.square(net.unet.embed_times(t, r) - target.embed_times(log_sigma(t), None)).mean())


def main():
    """Load, fit, write."""
    setup_logging()
    time_embedding.time_embedding(set_precision, checkpoints.read_weights, weights.save, error)


if __name__ == "__main__":
    time_embedding.define_flags()
    run(main)
