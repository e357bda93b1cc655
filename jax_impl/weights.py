"""Canonical weights: the names and layouts of the official PyTorch state dicts, as numpy arrays and safetensors.

A parameter's path is its canonical name except for the leaf: `kernel` is `weight`, transposed, and `embedding` is
`weight`.  The rule is total and bijective: an unknown or missing name is an error, a round trip is bitwise.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils

from meanflow.weights import canonical
from meanflow.weights.files import load, metadata, save

__all__ = ["check", "from_canonical", "load", "metadata", "save", "shapes", "to_canonical", "transfer"]

LEAVES = {"kernel": "weight", "embedding": "weight"}


def to_canonical(net, params):
    """Return {canonical name: numpy array} of `params` (nnx.State of `net`) and of the net's fixed tables."""
    weights = dict(net.tables())
    for path, leaf in nnx.to_flat_state(params):
        array = np.asarray(jax.device_get(_whole(leaf.get_value())))
        weights[canonical_name(path)] = array.transpose(to_torch(array)) if path[-1] == "kernel" else array
    return {name: np.array(a, order="C") for name, a in sorted(weights.items())}


def _whole(a):
    """Return an array whole on this host; all processes call it for an array that is spread over them."""
    here = not isinstance(a, jax.Array) or a.is_fully_addressable or a.is_fully_replicated
    return a if here else multihost_utils.process_allgather(a, tiled=True)


def shapes(net):
    """Return {canonical name: shape} of the parameters of `net`."""
    return {
        canonical_name(path): tuple(leaf.shape[i] for i in to_torch(leaf)) if path[-1] == "kernel" else leaf.shape
        for path, leaf in nnx.to_flat_state(nnx.state(net, nnx.Param))
    }


def check(net, weights):
    """Raise UserError unless canonical `weights` {name: array} fit `net`, see `from_canonical`; copies nothing."""
    tables = net.tables()
    canonical.check(weights, {name: table.shape for name, table in tables.items()} | shapes(net), tables)


def from_canonical(net, weights):
    """Return the parameters (nnx.State, in the dtypes of `net`) held by canonical `weights` {name: array}.

    Raises UserError for a missing or unknown name, a wrong shape, or a fixed table that differs from the computed one.
    """
    check(net, weights)
    leaves = []
    for path, leaf in nnx.to_flat_state(nnx.state(net, nnx.Param)):
        array = np.asarray(weights[canonical_name(path)])
        array = array.transpose(to_flax(array)) if path[-1] == "kernel" else array
        leaves.append((path, leaf.replace(jnp.array(array, leaf.dtype))))
    return nnx.from_flat_state(leaves)


def transfer(net, params, weights, resize=False, load_classes=""):
    """Return the canonical weights with which `net`, of fresh `params`, starts from those of a network of its family.

    See `canonical.transfer`.
    """
    own, fit_command = to_canonical(net, params), "python -m jax_impl.time_embedding"
    return canonical.transfer(own, weights, fit_command, resize, load_classes)


def canonical_name(path):
    """Return the canonical name of a parameter path such as ('blocks', 0, 'attn', 'qkv', 'kernel')."""
    *modules, leaf = path
    return ".".join([*map(str, modules), str(LEAVES.get(leaf, leaf))])


def to_torch(kernel):
    """Return the transposition of a kernel [... in out] to a weight [out in ...]."""
    return (kernel.ndim - 1, kernel.ndim - 2, *range(kernel.ndim - 2))


def to_flax(weight):
    """Return the transposition of a weight [out in ...] to a kernel [... in out]."""
    return (*range(2, weight.ndim), 1, 0)
