"""Times a training step between large matmuls: `python -m benchmarks.on_gpu.timed FRAMEWORK CONFIG ROWS`.

Prints `ready` once everything is compiled, and waits for a line on stdin: until then, others may use the card.
"""

import importlib
import json
import statistics
import sys

from benchmarks import cases, measure
from meanflow.commands import flops
from meanflow.config import store

RUNS = 20
READY = "ready"


def main(framework: str, path: str, rows: str) -> dict:
    """Return the figures of a step by name."""
    steps = importlib.import_module(f"benchmarks.{framework}_steps")
    count_forward = importlib.import_module(f"{framework}_impl.flops").count_forward
    config = store.load_file(path)
    config.train.batch_size = int(rows)
    steps.start(config)
    step = measure.warm(steps.Step(config, cases.make_batch(config)))
    memory, matmul = step.memory(), measure.warm(steps.Matmul(config))
    model_flops = flops.of_step(config, count_forward(config))
    print(READY, flush=True)
    sys.stdin.readline()
    times, shares, rates = [], [], []
    before = measure.seconds(matmul)
    for _ in range(RUNS):
        times.append(measure.seconds(step))
        after = measure.seconds(matmul)
        rates.append(matmul.flops * 2 / (before + after))
        shares.append(model_flops / times[-1] / rates[-1])
        before = after
    median = statistics.median
    return {
        "config": config.name, "rows": config.train.batch_size, "dtype": config.model.compute_dtype,
        "median_s": median(times), "fastest_s": min(times), "slowest_s": max(times), "model_flops": model_flops,
        "model_flops_per_s": model_flops / median(times), "matmul_flops_per_s": median(rates),
        "share_of_matmul_rate": median(shares), "peak_bytes": memory.get("peak_bytes"),
        "peak_kind": memory.get("peak_kind"),
    }  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
