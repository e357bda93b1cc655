"""The training state in canonical form, which JAX goes on from as well; see `meanflow.weights.training_state`."""

import torch

from meanflow.weights.training_state import TrainingState
from torch_impl import weights
from torch_impl.step import copy_whole

_MOMENTS = ("exp_avg", "exp_avg_sq")


def export(state, progress=None):
    """Return a TrainState as a `TrainingState`.

    Gathers sharded tensors: call it in every process.
    """
    named = dict(state.net.named_parameters())
    moments = ({name: state.optimizer.state[p][key] for name, p in named.items()} for key in _MOMENTS)
    params, first, second, *emas = (weights.to_canonical(state.net, a) for a in (named, *moments, *state.emas))
    return TrainingState(state.step, params, first, second, tuple(emas), progress or {})


def adopt(like, given):
    """Return a TrainState with the content of a `TrainingState`, copied into the tensors of `like`, sharded or not.

    Raises UserError for another network.
    """
    net, optimizer = like.net, like.optimizer.state
    named = dict(net.named_parameters())
    own = (named, *({name: optimizer[p][key] for name, p in named.items()} for key in _MOMENTS), *like.emas)
    canonical = (given.params, given.first_moments, given.second_moments, *given.emas)
    with torch.no_grad():
        for tensors, arrays in zip(own, canonical, strict=True):
            whole = weights.from_canonical(net, arrays)
            for name, tensor in tensors.items():
                copy_whole(tensor, whole[name])
        for p in named.values():
            if p.requires_grad:  # the others have no gradient, so that the optimizer passes them over
                optimizer[p]["step"].fill_(given.step)
    return like._replace(step=given.step)
