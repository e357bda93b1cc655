"""Canonical weights: the names and layouts of the official PyTorch state dicts, as numpy arrays and safetensors.

They are this network's own state dict, except that fixed tables are computed: given ones are checked, never loaded.
An unknown or missing name is an error, a round trip is bitwise.
"""

import numpy as np
import torch
from torch.distributed.tensor import DTensor

from meanflow.weights import canonical
from meanflow.weights.files import load, metadata, save

__all__ = ["check", "from_canonical", "load", "metadata", "save", "shapes", "to_canonical", "transfer"]


def to_canonical(net, params):
    """Return {canonical name: numpy array} of `params` {name: tensor} and of the net's fixed tables.

    Gathers sharded tensors: call it on every process.
    """
    weights = dict(net.tables())
    for name, tensor in params.items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        array = whole.detach().cpu().numpy()
        weights[name] = array.reshape(()) if name.endswith(canonical.SCALARS) else array
    return {name: np.array(a, order="C") for name, a in sorted(weights.items())}


def shapes(net):
    """Return {canonical name: shape} of the parameters of `net`."""
    return {name: () if name.endswith(canonical.SCALARS) else tuple(p.shape) for name, p in net.named_parameters()}


def check(net, weights):
    """Raise UserError unless canonical `weights` {name: array} fit `net`, see `from_canonical`; copies nothing."""
    tables = net.tables()
    canonical.check(weights, {name: table.shape for name, table in tables.items()} | shapes(net), tables)


def from_canonical(net, weights):
    """Return the state dict {name: tensor} in the dtypes of `net` held by canonical `weights` {name: array}.

    Raises UserError for a missing or unknown name, a wrong shape, or a fixed table that differs from the computed one.
    """
    check(net, weights)
    state, tables = {}, net.tables()
    for name, tensor in net.state_dict().items():
        array = tables.get(name, weights[name])
        state[name] = torch.from_numpy(np.array(array)).to(tensor.dtype).reshape(tensor.shape)
    return state


def transfer(net, params, weights, resize=False, load_classes=""):
    """Return the canonical weights with which `net`, of fresh `params`, starts from those of a network of its family.

    See `canonical.transfer`.
    """
    own, fit_command = to_canonical(net, params), "python torch_impl/time_embedding.py"
    return canonical.transfer(own, weights, fit_command, resize, load_classes)
