"""Prints how the compiled training step uses four fake devices.

    collectives.py CONFIG.json...      a line each: {"collectives": {"all-reduce": N, ...}, "moved": N}

`moved` counts the arrays of the state that come out of a step with another sharding than they went in with.
"""

import collections
import json
import re
import sys

import jax
import numpy as np

from jax_impl import step
from meanflow.config import store
from meanflow.data import draws

KINDS = "all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all|collective-broadcast"


def measure(config):
    """Compile the step; count."""
    mesh = step.make_mesh(config)
    graphdef, state = step.create_state(config, mesh)
    size, rows = config.model.input_size, config.train.batch_size
    images = np.zeros((rows, size, size, config.model.channels), np.float32)
    batch = {"image": images, "label": np.zeros(rows, int)}
    batch |= ({"noise": images} if config.method.name == "rectified" else {}) | draws.of_process(config, 0)
    compiled = step.make_train_step(config, graphdef, mesh).lower(state, step.put_batch(batch, mesh)).compile()
    found = re.findall(rf"[ )] ?({KINDS})(?:-start)?\(", compiled.as_text())
    after = jax.tree.leaves(compiled.output_shardings[0])
    moved = sum(not s.is_equivalent_to(a.sharding, a.ndim) for a, s in zip(jax.tree.leaves(state), after, strict=True))
    return {"collectives": collections.Counter(found), "moved": moved}


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 4)
    for path in sys.argv[1:]:
        with open(path) as file:
            print(json.dumps(measure(store.from_json(file.read()))), flush=True)
