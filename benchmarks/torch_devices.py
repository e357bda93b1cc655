"""A training step over the processes of torchrun: `torchrun --nproc_per_node=NUM -m benchmarks.torch_devices ...`.

The first process prints one JSON object: seconds of each run, the metrics of the first steps and how much of the
all-reduces overlaps with the backward pass, by DDP's own clock.  Arguments: CONFIG.json NUM RUNS.  Twin of
jax_devices.py.
"""

import json
import pathlib
import sys
import time

import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from benchmarks import cases, torch_steps
from meanflow.config import store
from torch_impl import step as training
from torch_impl.devices import start_torch

FIRST = 3  # steps before the measured ones, whose metrics are reported


def main(path, num_devices, runs):
    """Measure; the first process prints."""
    config = store.from_json(pathlib.Path(path).read_text())
    device = start_torch(config)
    rows, rank = config.train.batch_size // num_devices, dist.get_rank()
    batch = {name: a[rank * rows : (rank + 1) * rows] for name, a in cases.make_batch(config).items()}
    step = torch_steps.Step(config, batch, training.make_mesh(config, device))
    if isinstance(step.wrapper(), DistributedDataParallel):
        step.wrapper()._set_ddp_runtime_logging_sample_rate(1)
    first = training.reduce_metrics([step.run() for _ in range(FIRST)])
    times = []
    for _ in range(runs):
        dist.barrier()  # otherwise a process would count the time it waits for another
        began = time.perf_counter()
        step.run()
        times.append(time.perf_counter() - began)
    figures = {"times": times, "metrics": first, "overlap": overlap(step.wrapper())}
    if rank == 0:
        print(json.dumps(figures))
    dist.destroy_process_group()


def overlap(wrapper):
    """Return seconds of the backward pass, of its all-reduces and of their overlap, and their number, for DDP."""
    if not isinstance(wrapper, DistributedDataParallel):
        return None
    data = wrapper._get_ddp_logging_data()
    names = {"compute_s": "compute_time", "communication_s": "comm_time", "both_s": "compute_comm_overlap_time"}
    figures = {name: data[f"avg_backward_{key}"] / 1e9 for name, key in names.items()}
    return figures | {"all_reduces": len(data["bucket_sizes"].split(","))}


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
