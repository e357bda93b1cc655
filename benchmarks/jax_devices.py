"""A training step over several fake devices of the CPU: `python -m benchmarks.jax_devices CONFIG.json NUM RUNS`.

Prints one JSON object: seconds of each run, the metrics of the first steps and the collectives of the compiled step.
Twin of torch_devices.py.
"""

import collections
import json
import pathlib
import re
import sys
import time

import jax
import numpy as np

from benchmarks import cases, jax_steps
from meanflow.config import store

FIRST = 3  # steps before the measured ones, whose metrics are reported
KINDS = "all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all|collective-broadcast"
BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "s32": 32, "u32": 32, "s64": 64, "u64": 64}


def main(path, num_devices, runs):
    """Measure and print."""
    jax.config.update("jax_num_cpu_devices", num_devices)
    config = store.from_json(pathlib.Path(path).read_text())
    jax_steps.start(config)
    step = jax_steps.Step(config, cases.make_batch(config))
    first = [{name: float(a) for name, a in step.run().items()} for _ in range(FIRST)]
    times = []
    for _ in range(runs):
        began = time.perf_counter()
        step.run()
        times.append(time.perf_counter() - began)
    print(json.dumps({"times": times, "metrics": first, "collectives": collectives(step.program())}))


def collectives(program):
    """Return {kind: {"count": N, "bytes": B}} of a compiled program; B is the size of all results on one device.

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
