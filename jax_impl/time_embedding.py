"""Fit the two time embeddings of a Re-MeanFlow network to the one of its EDM2 teacher: the weights to start from.

    python -m jax_impl.time_embedding --teacher=runs/teacher --output=start.safetensors

Then --config.train.load_from=start.safetensors trains from them.
Source: Xinxi-Zhang/Re-MeanFlow, init_time_emb.py, which fits by Adam (--fit=adam); least squares come nearer.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jax_impl import weights
from jax_impl.devices import set_precision
from jax_impl.models.edm2 import log_sigma
from jax_impl.reflow import load
from jax_impl.step import abstract_net
from meanflow.commands import time_embedding
from meanflow.config.flags import run
from meanflow.console_log import setup_logging

BETAS = (0.9, 0.99)  # of Adam, as in the official code


def build(config, canonical):
    """Return the network with canonical weights {name: array}.  Raises UserError if they do not fit."""
    graphdef, shapes = abstract_net(config)
    return nnx.merge(graphdef, weights.from_canonical(nnx.merge(graphdef, shapes), canonical))


def squared_error(net, teacher, t, r):
    """Return the mean squared error (scalar) of the embedding of times t and r [b], the teacher's being of t alone."""
    target = teacher.unet.embed_times(log_sigma(t), None)
    return jnp.square(net.unet.embed_times(t, r) - target).mean()


def error(config, canonical, teacher_config, teacher, t, r):
    """Return the same as a number, of networks by config and canonical weights {name: array}."""
    nets = build(config, canonical), build(teacher_config, teacher)
    return float(squared_error(*nets, jnp.asarray(t), jnp.asarray(r)))


def fit(config, canonical, teacher_config, teacher, times, learning_rate):
    """Return canonical weights whose two time embeddings are fitted by Adam, a step each of times, and the losses.

    times: [steps 2 b], t and r.  All other weights stay as they are.
    """
    net, teacher = build(config, canonical), build(teacher_config, teacher)
    graphdef, trained, kept = nnx.split(net, lambda path, _: path[-2] in ("emb_noise_t", "emb_noise_r"), ...)
    optimizer = optax.adam(learning_rate, *BETAS)

    def loss(trained, t, r):
        return squared_error(nnx.merge(graphdef, trained, kept), teacher, t, r)

    @jax.jit
    def step(carry, times):
        trained, state = carry
        value, grads = jax.value_and_grad(loss)(trained, *times)
        updates, state = optimizer.update(grads, state)
        return (optax.apply_updates(trained, updates), state), value

    (trained, _), losses = jax.lax.scan(step, (trained, optimizer.init(trained)), jnp.asarray(times))
    params = nnx.state(nnx.merge(graphdef, trained, kept), nnx.Param)
    return weights.to_canonical(net, params), np.asarray(losses)


def main():
    """Load, fit, write."""
    setup_logging()
    time_embedding.time_embedding(set_precision, load, weights.save, fit, error)


if __name__ == "__main__":
    time_embedding.define_flags()
    run(main)
