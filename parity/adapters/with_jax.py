"""The JAX implementation behind `Adapter`.

A method runs unjitted around a jitted network, so that all its settings share the compiled network.
"""

import contextlib
import dataclasses
import functools
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jax_impl import step, time_embedding, weights
from jax_impl.methods import METHODS, common, flow, improved, reflow
from jax_impl.models import edm2, layers, unet
from jax_impl.models.tape import Tape, under_jvp
from meanflow.config import options as base
from meanflow.config import store
from meanflow.tables import rotary_table
from parity import trainers
from parity.adapters.adapter import Adapter, Network

OPTIMIZE_LESS = "jax_disable_most_optimizations"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Net(Network):
    """A network with given parameters."""

    apply: Any  # (params, z, t, r, y, given, known, heads, features) -> (u, v or both, or u and features; outputs)
    params: Any  # nnx.State

    def log_variance(self, t, r):
        """Return the logarithm of the variance that the network predicts [b]."""
        return Jax.bound(self).log_variance(t, r)

    def __call__(self, z, t, r, y, heads=None, tape: Any = None, features=False, **given):
        """Return u, or the outputs that `heads` selects if there are several, or u and features."""
        known = tape.outputs if under_jvp(tape) else None
        u, outputs = self.apply(self.params, z, t, r, y, given, known, heads or self.head, features)
        if tape is not None:
            tape.outputs = {} if under_jvp(tape) else jax.tree.map(tape.select, outputs)
        return u


class Jax(Adapter):
    """The JAX implementation."""

    impl = SimpleNamespace(
        METHODS=METHODS, common=common, flow=flow, improved=improved, reflow=reflow, step=step, edm2=edm2,
        time_embedding=time_embedding, layers=layers, unet=unet,
    )  # fmt: skip
    compiled = staticmethod(jax.jit)
    array = staticmethod(jnp.asarray)

    def sees_gpu(self):
        """Return whether JAX sees a GPU."""
        return any(device.platform == "gpu" for device in jax.devices())

    @contextlib.contextmanager
    def full_precision(self, platform="cpu"):
        """Switch on float64 and full float32 matmuls, and forget networks compiled before."""
        changes = {"jax_enable_x64": True, "jax_default_matmul_precision": "highest"}
        before = {name: getattr(jax.config, name) for name in changes}
        before |= {OPTIMIZE_LESS: jax.config.read(OPTIMIZE_LESS)}
        _network.cache_clear()
        try:
            for name, value in changes.items():
                jax.config.update(name, value)
            with jax.default_device(jax.devices(platform)[0]):
                yield
        finally:
            for name, value in before.items():
                jax.config.update(name, value)

    def forget(self):
        """Drop every compiled program: XLA maps memory for each, and Linux limits a process to 65530 maps."""
        _network.cache_clear()
        jax.clear_caches()

    def build(self, config, canonical, as_trained=False):
        """Return the network of `config` with canonical weights {name: array}.  Raises UserError if they do not fit.

        as_trained: compile it as the trainer does; otherwise skip XLA's expensive passes, which halves the time and
        leaves the mathematics unchanged.
        """
        module, apply = _network(_model(config))
        params = weights.from_canonical(module, canonical)
        dtype = "float64" if config.model.compute_dtype == "float64" else "float32"
        jax.config.update(OPTIMIZE_LESS, not as_trained)
        return Net(module=module, apply=apply, params=params, dtype=dtype, method=config.method.name)

    def fresh_weights(self, config, seeds):
        """Return canonical weights {name: array} freshly drawn from each of `seeds`."""
        module, _ = _network(_model(config))
        jax.config.update(OPTIMIZE_LESS, True)
        configs = [SimpleNamespace(seed=seed, model=config.model, train=config.train) for seed in seeds]
        return [weights.to_canonical(module, step.build_net(config)[1]) for config in configs]

    @staticmethod
    def bound(net):
        """Return the network with its weights."""
        return nnx.merge(nnx.graphdef(net.module), net.params)

    def differentiate(self, net, function):
        """Return the value and aux of function(net), and the gradients of trained parameters by canonical name."""
        value_and_grad = jax.value_and_grad(lambda params: function(net.replace(params=params)), has_aux=True)
        (value, aux), grads = value_and_grad(net.params)
        tables, grads = self.tables(net), weights.to_canonical(net.module, grads)
        trained = {name: a for name, a in grads.items() if name not in tables and not step.is_fixed(name)}
        return self.to_numpy(value), self.to_numpy(aux), trained

    def canonical(self, net):
        """Return the network's weights by canonical name."""
        return weights.to_canonical(net.module, net.params)

    def projected(self, net, config):
        """Return the network with its weights projected, as a training step projects them."""
        state = step.TrainState(jnp.zeros((), jnp.int32), net.params, None, ())
        return net.replace(params=step.project(state, config).params)

    def rotary_table(self, net):
        """Return the cosines and sines [tokens, dim/2] of rotary positions."""
        return rotary_table(*net.module.rope_shape)

    def trainer(self, config, given):
        """See `Adapter.trainer`."""
        return trainers.JaxTrainer(config, given, device=jnp.zeros(()).device)

    def optimize(self, start_at, grads, c, params=None):
        """See `Adapter.optimize`."""
        w = {"w": jnp.asarray(start_at)}
        state = step.TrainState(jnp.zeros((), jnp.int32), w, step.make_optimizer(c).init(w), (w,) * len(c.ema_decays))
        apply_gradients = jax.jit(lambda state, grads: step.apply_gradients(state, grads, c))
        history, norms = [], []
        for k, grad in enumerate(grads):
            if params is not None:
                state = state._replace(params={"w": jnp.asarray(params[k])})
            state, norm = apply_gradients(state, {"w": jnp.asarray(grad)})
            history.append([np.asarray(tree["w"]) for tree in (state.params, *state.emas)])
            norms.append(float(norm))
        params, *emas = np.stack(history, axis=1)
        return params, emas, np.array(norms)

    def arrays(self, net, arrays):
        """Return arrays: floats in the network's dtype, labels as integers."""
        return [jnp.asarray(a, net.dtype if a.dtype.kind == "f" else "int32") for a in map(np.asarray, arrays)]

    def to_numpy(self, tree):
        """Return numpy arrays in place of JAX's."""
        return jax.tree.map(np.asarray, tree)


def _model(config):
    """The config of the network alone, as text."""
    alone = base.get_config(config.model.name, config.method.name)
    alone.model.update(config.model)
    return store.to_json(alone)


@functools.cache
def _network(model):
    config = store.from_json(model)
    graphdef, shapes = step.abstract_net(config)
    several = config.model.name == "imf_dit"

    @functools.partial(jax.jit, static_argnames=("heads", "features"))
    def apply(params, z, t, r, y, given, known, heads, features):
        """known: the outputs of a tape, under the JVP; else None."""
        options = ({"heads": heads} if several else {}) | ({"features": True} if features else {})
        tape = Tape(lambda output: output)
        if known is not None:
            tape.outputs = known
            tape.replay(())
        u = nnx.merge(graphdef, params)(z, t, r, y, **given, **options, tape=tape)
        return u, tape.finish() if known is not None else tape.outputs

    return nnx.merge(graphdef, shapes), apply
