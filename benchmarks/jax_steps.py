"""Builds and runs training steps and samplers in JAX; measures FLOPs and memory.  Twin of torch_steps.py.

Also a program, `python -m benchmarks.jax_steps CONFIG.json NUM RUNS`, that measures a step on several fake CPU devices
and prints one JSON object: seconds per run, metrics of the first steps and collectives of the program.
"""

import collections
import copy
import json
import pathlib
import re
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks import cases, measure
from jax_impl import step
from jax_impl.devices import local_mesh, set_precision
from jax_impl.methods import METHODS
from jax_impl.sample import make_sampler
from meanflow.config import store
from meanflow.data import draws

MATMULS = 8  # per run
KINDS = "all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all|collective-broadcast"
BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "s32": 32, "u32": 32, "s64": 64, "u64": 64}


class Step:
    """A compiled training step and its state."""

    def __init__(self, config, batch, mesh=None):
        """Initialise the state and compile.  batch: numpy arrays by name.  mesh: None for all devices."""
        mesh = mesh or step.make_mesh(config)
        graphdef, self._state = step.create_state(config, mesh)
        self._batch = step.put_batch(batch, mesh)
        train_step: Any = step.make_train_step(config, graphdef, mesh)
        self._compiled = train_step.lower(self._state, self._batch).compile()

    def run(self):
        """Run one step, wait for it and return its metrics."""
        self._state, metrics = self._compiled(self._state, self._batch)
        return jax.block_until_ready((self._state, metrics))[1]

    def program(self):
        """Return the compiled program as text."""
        return self._compiled.as_text()

    def memory(self):
        """Return bytes by name.  peak_bytes: XLA's plan for arguments (including the state) and temporaries.

        It is the only figure unaffected by other allocations of the process.
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
    """Set the precision as the trainer does."""
    set_precision(config)


def device():
    """Return the kind of device, `cpu` or `gpu`, and its name."""
    first = jax.devices()[0]
    return first.platform, first.device_kind


def count_step(config, batch):
    """Return the FLOPs of a training step, counted by XLA in the unoptimised program.

    Counts everything, including element-wise operations, optimizer and EMA, with plain attention.  XLA counts the body
    of a loop once, so there must be no micro-batches.  The program targets the CPU, the only target that XLA can count
    before compiling.
    """
    config, mesh = countable(config), local_mesh(jax.devices("cpu")[:1])
    graphdef, state = jax.eval_shape(lambda: step.create_state(config, mesh))
    train_step: Any = step.make_train_step(config, graphdef, mesh)
    with jax.default_device(mesh.devices.flat[0]):
        return train_step.lower(state, batch).cost_analysis()["flops"]


def count_forward(config, batch):
    """Return the FLOPs of the loss without its gradient; for flow matching, one forward F of the network."""
    config = countable(config)
    graphdef, params = step.abstract_net(config)
    method = METHODS[config.method.name]

    def loss(params, batch):
        data, drawn = draws.split(batch)
        return method.loss(nnx.merge(graphdef, params), data, method.Draws(**drawn), config.method)[0]

    with jax.default_device(jax.devices("cpu")[0]):  # as in `count_step`
        cost: Any = jax.jit(loss).lower(params, batch).cost_analysis()
    return cost["flops"]


def countable(config):
    """Return the config with options that allow every operation to be counted."""
    config = copy.deepcopy(config)
    if "attention" in config.model:
        config.model.attention = "plain"
    config.train.accumulate = 1
    return config


class Matmul:
    """Large square matmuls in the dtype and precision of a config: a reference for the speed of steps."""

    def __init__(self, config):
        """Create the factors."""
        size = 1024 if device()[0] == "cpu" else 8192
        self.flops = MATMULS * 2 * size**3
        self._a = jnp.full((size, size), 1 / size, config.model.compute_dtype)  # a @ a = a
        self._matmul = jax.jit(jnp.matmul)

    def run(self):
        """Multiply several times in sequence and wait for the last product."""
        product = self._a
        for _ in range(MATMULS):
            product = self._matmul(product, self._a)
        return jax.block_until_ready(product)


def main(path, num_devices, runs):
    """Measure a step on several devices and print the figures."""
    jax.config.update("jax_num_cpu_devices", num_devices)
    config = store.from_json(pathlib.Path(path).read_text())
    start(config)
    measured = Step(config, cases.make_batch(config))
    first = [{name: float(a) for name, a in measured.run().items()} for _ in range(measure.FIRST)]
    times = [measure.seconds(measured) for _ in range(runs)]
    print(json.dumps({"times": times, "metrics": first, "collectives": collectives(measured.program())}))


def collectives(program):
    """Return {kind: {"count": N, "bytes": B}} for a compiled program; B is the total size of results on one device.

    An asynchronous pair counts once, at its end.
    """
    found = collections.defaultdict(lambda: {"count": 0, "bytes": 0})
    for result, kind in re.findall(rf"= (.*?) ({KINDS})(?:-done)?\(", program):
        found[kind]["count"] += 1
        for dtype, shape in re.findall(r"(\w+)\[([\d,]*)\]", result):
            found[kind]["bytes"] += BITS[dtype] // 8 * int(np.prod([int(n) for n in shape.split(",") if n]))
    return found


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
