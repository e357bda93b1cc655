"""The precision study in JAX: a loss and its gradients in one mode, numpy in and out.  See precision.py."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.extend import core

from jax_impl import step, weights
from jax_impl.methods import METHODS
from jax_impl.models.tape import under_jvp

FACTORS = ("dot_general", "conv_general_dilated")  # primitives whose inputs a TPU rounds
PARTS = {"jit": "jaxpr", "pjit": "jaxpr", "custom_jvp_call": "call_jaxpr"}  # primitives that contain others


class Mixed:
    """A network whose calls run in the data types of a mode.

    It is called like the networks: first for the primal of all rows with a recording tape, then for the tangent with
    the same tape.  If the data types of the two differ, nothing is recorded, and the tangent computes its own primal.
    """

    takes_tape = True

    def __init__(self, nets, mode):
        """nets: {dtype: network}, all of the same parameters.  mode: `precision.Mode`."""
        self.nets, self.mode, net = nets, mode, nets[mode.plain]
        self.num_classes, self.augment_dim = net.num_classes, getattr(net, "augment_dim", 0)

    def __call__(self, *inputs, tape=None, **given):
        (_, t, r, _), (plain, primal, tangent, _) = inputs, self.mode
        if len({plain, primal, tangent}) > 1:
            if under_jvp(tape):
                return self.nets[tangent](*inputs, **given)
            tape = None
        u = self.nets[plain](*inputs, **given, tape=tape)
        if plain == primal or r is t:
            return u
        of_row = (r < t)[:, None, None, None]
        return jax.tree.map(lambda a, b: jnp.where(of_row, a, b), self.nets[primal](*inputs, **given), u)


def shapes(config):
    """Return the canonical shapes {name: shape} of the parameters, and the fixed tables {name: array}."""
    net = nnx.merge(*step.abstract_net(config))
    named = {}
    for path, leaf in nnx.to_flat_state(nnx.state(net, nnx.Param)):
        axes = weights.to_torch(leaf) if path[-1] == "kernel" else range(len(leaf.shape))
        named[weights.canonical_name(path)] = tuple(leaf.shape[axis] for axis in axes)
    return named, net.tables()


def make(config, mode, compiled=False):
    """Return run(canonical weights, rows, draws) -> (aux, gradients by canonical name).

    rows, draws: arrays by name, images [b h w c].  mode: `precision.Mode`.  compiled: as one function, which is
    faster only for tiny networks; otherwise one operation at a time, each rounding its result as in PyTorch.
    """
    method, dtype = METHODS[config.method.name], "float64" if mode.plain == "float64" else "float32"
    with jax.enable_x64(True):
        parts = {name: step.abstract_net(in_dtype(config, name)) for name in mode[:3]}
    graphdefs, net = {name: graphdef for name, (graphdef, _) in parts.items()}, nnx.merge(*parts[mode.plain])

    def gradients(params, rows, draws):
        def loss_of(params):
            nets = {name: nnx.merge(graphdef, params) for name, graphdef in graphdefs.items()}
            return method.loss(Mixed(nets, mode), rows, draws, config.method)

        (_, aux), grads = jax.value_and_grad(loss_of, has_aux=True)(params)
        return aux, grads

    step_of = with_rounded_factors(gradients) if mode.rounded else gradients
    step_of = jax.jit(step_of) if compiled else step_of

    def arrays(named):
        return {name: jnp.asarray(a, dtype if a.dtype.kind == "f" else "int32") for name, a in named.items()}

    def run(canonical, rows, draws):
        with jax.enable_x64(True), jax.default_matmul_precision("highest"):
            params = weights.from_canonical(net, canonical)
            given = arrays({name: draws[name] for name in method.Draws._fields})
            aux, grads = step_of(params, arrays(rows), method.Draws(**given))
            named = weights.to_canonical(net, grads)
        return {name: np.asarray(a) for name, a in aux.items()}, {n: named[n] for n in named.keys() - net.tables()}

    return run


def in_dtype(config, dtype):
    """Return a copy of the config with another compute dtype."""
    config = copy.deepcopy(config)
    config.model.compute_dtype = dtype
    return config


def with_rounded_factors(function):
    """Wrap a function: rounds the factors of its float32 products to bfloat16 and accumulates in float32.

    This is the default float32 product on TPUs, which the official JAX code does not change.
    """

    def evaluate(closed, *args):
        values = dict(zip([*closed.jaxpr.constvars, *closed.jaxpr.invars], [*closed.consts, *args], strict=True))
        last = {a: i for i, eqn in enumerate(closed.jaxpr.eqns) for a in eqn.invars if isinstance(a, core.Var)}
        last |= dict.fromkeys((a for a in closed.jaxpr.outvars if isinstance(a, core.Var)), len(closed.jaxpr.eqns))
        for i, eqn in enumerate(closed.jaxpr.eqns):
            inputs = [a.val if isinstance(a, core.Literal) else values[a] for a in eqn.invars]
            if eqn.primitive.name in FACTORS:
                inputs = [a.astype(jnp.bfloat16).astype(jnp.float32) for a in inputs]
            if eqn.primitive.name in PARTS:
                outputs = evaluate(eqn.params[PARTS[eqn.primitive.name]], *inputs)
            else:
                outputs = eqn.primitive.bind(*inputs, **eqn.params)
            outputs = outputs if eqn.primitive.multiple_results else [outputs]
            values.update(zip(eqn.outvars, outputs, strict=True))
            for a in (*eqn.invars, *eqn.outvars):  # free values that are no longer needed
                if isinstance(a, core.Var) and last.get(a, i) == i:
                    values.pop(a, None)
        return [a.val if isinstance(a, core.Literal) else values[a] for a in closed.jaxpr.outvars]

    def rounded(*args):
        closed, shape = jax.make_jaxpr(function, return_shape=True)(*args)
        return jax.tree.unflatten(jax.tree.structure(shape), evaluate(closed, *jax.tree.leaves(args)))

    return rounded
