"""FLOPs of one forward of a network, counted without running it."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.extend.core import jaxprs_in_params

from jax_impl.methods import METHODS
from jax_impl.step import abstract_net


def count_forward(config):
    """Return the FLOPs of matmuls and convolutions in a forward of one row: 2 per multiply-add.

    Traces the network with plain attention and computes nothing.
    """
    config = copy.deepcopy(config)
    config.model.compute_dtype = "float32"
    if "attention" in config.model:
        config.model.attention = "plain"
    graphdef, params = abstract_net(config)
    c, given = config.model, METHODS[config.method.name].sampling_conditions(config.sample)
    given = {name: jnp.ones(1) for name in given} | ({"features": True} if c.get("repa_dims") else {})

    def forward(params, z, t, y):
        return nnx.merge(graphdef, params)(z, t, t, y, **given)

    shapes = (1, c.input_size, c.input_size, c.channels), (1,)
    z, t = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
    return _count(jax.make_jaxpr(forward)(params, z, t, jax.ShapeDtypeStruct((1,), jnp.int32)).jaxpr)


def _count(jaxpr):
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in ("dot_general", "conv_general_dilated"):
            total += 2 * eqn.outvars[0].aval.size * _num_terms(eqn)
        total += eqn.params.get("length", 1) * sum(map(_count, jaxprs_in_params(eqn.params)))
    return total


def _num_terms(eqn):
    """Return the products summed in each element of the result of a matmul or convolution."""
    left, right = (v.aval.shape for v in eqn.invars)
    if eqn.primitive.name == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        return int(np.prod([left[axis] for axis in contracted]))
    return int(np.prod(right)) // right[eqn.params["dimension_numbers"].rhs_spec[0]]
