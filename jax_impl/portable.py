"""The training state in canonical form, which PyTorch goes on from as well; see `meanflow.weights.training_state`."""

import jax
import numpy as np
import optax
from flax import nnx

from jax_impl import weights
from meanflow.weights.training_state import TrainingState


def export(graphdef, state, progress=None):
    """Return a TrainState of the network of `graphdef` as a `TrainingState`.

    Gathers sharded arrays: call it in every process.
    """
    net = nnx.merge(graphdef, state.params)
    moments = (optax.tree.get(state.opt_state, name) for name in ("mu", "nu"))
    params, first, second, *emas = (weights.to_canonical(net, a) for a in (state.params, *moments, *state.emas))
    return TrainingState(int(state.step), params, first, second, tuple(emas), progress or {})


def adopt(graphdef, like, given):
    """Return a TrainState with the content of a `TrainingState` and the shapes, dtypes and shardings of `like`.

    Raises UserError for another network.
    """
    net = nnx.merge(graphdef, like.params)
    params, first, second, *emas = (
        weights.from_canonical(net, a) for a in (given.params, given.first_moments, given.second_moments, *given.emas)
    )
    step = np.int32(given.step)  # of which each use becomes an array of its own, as donation needs
    opt_state = optax.tree.set(like.opt_state, mu=first, nu=second, count=step)
    state = like._replace(step=step, params=params, opt_state=opt_state, emas=tuple(emas))
    return jax.tree.map(lambda a, b: jax.device_put(a, b.sharding), state, like)
