"""Training steps and samplers in JAX: builds, runs and counts them, and measures memory.  Twin of torch_steps.py."""

import copy
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from jax_impl import step
from jax_impl.devices import local_mesh, set_precision
from jax_impl.methods import METHODS
from jax_impl.sample import make_sampler

MATMULS = 8  # in one run


class Step:
    """A compiled training step and its state."""

    def __init__(self, config, batch, mesh=None):
        """Draw the state and compile.  batch: numpy arrays by name.  mesh: None for all devices."""
        mesh = mesh or step.make_mesh(config)
        graphdef, self._state = step.create_state(config, mesh)
        self._batch = step.put_batch(batch, mesh)
        train_step: Any = step.make_train_step(config, graphdef, mesh)
        self._compiled = train_step.lower(self._state, self._batch).compile()

    def run(self):
        """Take one more step, wait for it, and return its metrics."""
        self._state, metrics = self._compiled(self._state, self._batch)
        return jax.block_until_ready((self._state, metrics))[1]

    def program(self):
        """Return the compiled program as text."""
        return self._compiled.as_text()

    def memory(self):
        """Return bytes by name.  peak_bytes: as planned by XLA, for arguments (including the state) and temporaries.

        Only this number does not depend on what else the process holds.
        """
        plan = self._compiled.memory_analysis()
        sizes = {name: getattr(plan, f"{name}_size_in_bytes") for name in ("temp", "argument", "output", "alias")}
        state_bytes = sum(a.nbytes for a in jax.tree.leaves((self._state, self._batch)))
        peak = {"peak_bytes": sizes["temp"] + sizes["argument"], "peak_kind": "planned by XLA"}
        return peak | {"state_bytes": state_bytes} | {f"{name}_bytes": size for name, size in sizes.items()}


def sampling(config, noise, labels):
    """Return a function that generates images [b h w c] from noise [b h w c] and labels [b], with random weights."""
    graphdef, params = step.build_net(config)
    mesh = local_mesh()
    params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
    sampler = make_sampler(config, graphdef, mesh)
    return lambda: sampler(params, noise, labels, config.sample)


def start(config):
    """Set precision as the trainer does."""
    set_precision(config)


def device():
    """Return the kind of device, `cpu` or `gpu`, and its name."""
    first = jax.devices()[0]
    return first.platform, first.device_kind


def count_step(config, batch):
    """Return the FLOPs of a training step, as XLA counts them in the unoptimised program.

    A loop counts once, so there must be no micro-batches.  Attention is counted in its plain form.  Everything counts,
    including element-wise work, optimizer and EMA.  The program is for a CPU: XLA counts no other before compiling.
    """
    config, mesh = countable(config), local_mesh(jax.devices("cpu")[:1])
    graphdef, state = jax.eval_shape(lambda: step.create_state(config, mesh))
    train_step: Any = step.make_train_step(config, graphdef, mesh)
    with jax.default_device(mesh.devices.flat[0]):
        return train_step.lower(state, batch).cost_analysis()["flops"]


def count_forward(config, batch):
    """Return the FLOPs of a loss without gradient, which for flow matching is one forward F of the network."""
    config = countable(config)
    graphdef, params = step.abstract_net(config)
    method = METHODS[config.method.name]

    def loss(params, batch):
        draws = method.draw(jax.random.key(0), batch["image"].shape, config.method)
        return method.loss(nnx.merge(graphdef, params), batch, draws, config.method)[0]

    with jax.default_device(jax.devices("cpu")[0]):  # as in `count_step`
        cost: Any = jax.jit(loss).lower(params, batch).cost_analysis()
    return cost["flops"]


def countable(config):
    """Return the config of a step in which all operations can be counted."""
    config = copy.deepcopy(config)
    if "attention" in config.model:
        config.model.attention = "plain"
    config.train.accumulate = 1
    return config


class Matmul:
    """Large square matmuls in the dtype and precision of a config: the yardstick for the speed of steps."""

    def __init__(self, config):
        """Make the factors."""
        size = 1024 if device()[0] == "cpu" else 8192
        self.flops = MATMULS * 2 * size**3
        self._a = jnp.full((size, size), 1 / size, config.model.compute_dtype)  # a @ a = a
        self._matmul = jax.jit(jnp.matmul)

    def run(self):
        """Multiply several times in sequence, and wait for the last product."""
        product = self._a
        for _ in range(MATMULS):
            product = self._matmul(product, self._a)
        return jax.block_until_ready(product)
