"""Runs a frozen network over any number of images, in batches, on the devices of this process."""

from collections.abc import Callable

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from jax_impl import weights
from jax_impl.devices import AXES, local_mesh


def in_batches(build: Callable, canonical: dict, function: Callable, batch_size: int) -> Callable:
    """Return run(rows) -> tuple of numpy arrays: the results of function(network, rows) for all rows [n ...].

    build: () -> network.  canonical: its weights.  function: (network, rows) -> tuple of arrays [n ...].
    The devices of this process share batches of at most `batch_size` rows, or of one row per device if that is more.
    The last batch is padded with zeros, so that it compiles once.
    Raises UserError for weights that do not fit.
    """
    mesh = local_mesh()
    shared, whole = NamedSharding(mesh, PartitionSpec(AXES)), NamedSharding(mesh, PartitionSpec())
    net = nnx.eval_shape(build)
    graphdef, params = nnx.graphdef(net), jax.device_put(weights.from_canonical(net, canonical), whole)

    @jax.jit
    def compiled(params, rows):
        return function(nnx.merge(graphdef, params), rows)

    def run(rows):
        size = -(-min(batch_size, len(rows)) // mesh.size) * mesh.size
        parts = []
        for first in range(0, len(rows), size):
            part = rows[first : first + size]
            missing = size - len(part)
            padded = np.pad(part, [(0, missing)] + [(0, 0)] * (rows.ndim - 1))
            out = jax.device_get(compiled(params, jax.device_put(padded, shared)))
            parts.append([a[: len(part)] for a in out])
        return tuple(np.concatenate(arrays) for arrays in zip(*parts, strict=True))

    return run
