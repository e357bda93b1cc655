"""Canonical weights: the names and layouts of the official PyTorch state dicts, as numpy arrays and safetensors.

They are this network's own state dict, but fixed tables are computed: given ones are verified, never loaded.  An
unknown or a missing name is an error, a round trip is bitwise.
"""

import numpy as np
import torch
from absl import logging
from torch.distributed.tensor import DTensor

from meanflow.errors import UserError
from meanflow.weights import canonical
from meanflow.weights.files import load, metadata, save

__all__ = ["adopt", "from_canonical", "load", "metadata", "save", "to_canonical"]

# Names that a model may have more than the one it starts from begin so: MeanFlow's embedder of t - r, REPA's projectors
# and the log-variance of decoupled MeanFlow; and those that it may have no use for, EDM2's own embedder of time too.
ADDED = ("r_embedder.", "projectors.", "logvar_linear.")
UNUSED = ("projectors.", "logvar_linear.", "logvar_fourier.", "unet.emb_noise.")


def to_canonical(net, params):
    """Return {canonical name: numpy array} of `params` {name: tensor}, with the fixed tables of the net.

    Gathers sharded tensors: call it on every process.
    """
    weights = dict(net.tables())
    for name, tensor in params.items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        array = whole.detach().cpu().numpy()
        weights[name] = array.reshape(()) if name.endswith(canonical.SCALARS) else array
    return {name: np.array(a, order="C") for name, a in sorted(weights.items())}


def from_canonical(net, weights):
    """Return the state dict {name: tensor} in the dtypes of `net` held by canonical `weights` {name: array}.

    Raises UserError for a missing or unknown name, a wrong shape, or a fixed table that is not the computed one.
    """
    params, tables = net.state_dict(), net.tables()
    shapes = {name: () if name.endswith(canonical.SCALARS) else tuple(tensor.shape) for name, tensor in params.items()}
    canonical.check(weights, shapes, tables)
    state = {}
    for name, tensor in params.items():
        array = tables.get(name, weights[name])
        state[name] = torch.from_numpy(np.array(array)).to(tensor.dtype).reshape(tensor.shape)
    return state


def adopt(net, params, weights):
    """Return canonical weights for `net` that start from `weights` of a model of its family.

    What `net` has more, of `ADDED`, is that of its own `params`, what it has no use for, of `UNUSED`, is left out; both
    are named in a message.  All else must fit, see `from_canonical`.
    """
    own = to_canonical(net, params)
    if "unet.emb_noise_r.weight" in own.keys() - weights.keys() and "unet.emb_noise.weight" in weights:
        raise UserError(
            "the weights to start from are of an EDM2 network of one time, and this one is told two: fit its time "
            "embeddings first (python torch_impl/time_embedding.py), and start from what that writes"
        )
    added = sorted(name for name in own.keys() - weights.keys() if name.startswith(ADDED))
    unused = sorted(name for name in weights.keys() - own.keys() if name.startswith(UNUSED))
    for text, names in (("start fresh", added), ("are left out", unused)):
        if names:
            logging.info("of the weights to start from, %s %s", ", ".join(names), text)
    return {name: a for name, a in weights.items() if name not in unused} | {name: own[name] for name in added}
