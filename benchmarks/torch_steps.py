"""Builds and runs training steps and samplers in PyTorch; measures FLOPs and memory.  Twin of jax_steps.py.

Also a program, `torchrun --nproc_per_node=NUM -m benchmarks.torch_steps CONFIG.json NUM RUNS`, that measures a step on
several processes.  The first prints one JSON object: seconds per run, metrics of the first steps, and how much of the
all-reduces overlaps with the backward pass according to DDP's own timers.
"""

import contextlib
import copy
import json
import pathlib
import sys
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import cases, measure
from meanflow.config import store
from meanflow.data import draws
from torch_impl import step, weights
from torch_impl.devices import choose_device, set_precision, start_torch
from torch_impl.methods import METHODS
from torch_impl.sample import make_sampler

MATMULS = 8  # per run


class Step:
    """A training step, compiled if the config enables it, and its state."""

    def __init__(self, config, batch, mesh=None):
        """Initialise the state.  batch: this process's numpy arrays by name.  mesh: None for a single process."""
        dynamo: Any = torch._dynamo
        dynamo.config.recompile_limit = dynamo.config.accumulated_recompile_limit = 1024  # each case compiles anew
        self._device = choose_device()
        self._state = step.create_state(config, mesh, self._device)
        self._step = step.make_train_step(config)
        self._batch = step.put_batch(batch, self._device)

    def run(self):
        """Run one step, wait for it and return its metrics."""
        self._state, metrics = self._step(self._state, self._batch)
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        return metrics

    def wrapper(self):
        """Return the module around the loss: DDP, FSDP, or the loss itself."""
        return self._state.loss

    def memory(self):
        """Return bytes by name.  peak_bytes: the state plus what a step allocates on a GPU.

        On a CPU only state_bytes: memory.py measures the growth in a separate process.
        """
        s = self._state
        moments = [a for p in s.net.parameters() for a in s.optimizer.state[p].values()]
        arrays = [*s.net.parameters(), *moments, *(a for ema in s.emas for a in ema.values()), *self._batch.values()]
        sizes: dict[str, Any] = {"state_bytes": sum(a.nbytes for a in arrays)}
        if self._device.type == "cuda":
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            self.run()
            sizes["peak_bytes"] = sizes["state_bytes"] + torch.cuda.max_memory_allocated() - before
            sizes["peak_kind"] = "allocated on the GPU"
        return sizes


def sampling(config, noise, labels):
    """Return a function that generates images [b h w c] from noise [b h w c] and labels [b], with random weights."""
    net = step.build_net(config)
    canonical = weights.to_canonical(net, dict(net.named_parameters()))
    sampler = make_sampler(config, choose_device())
    return lambda: sampler(canonical, noise, labels, config.sample)


def start(config):
    """Set the precision and number of threads as the trainer does."""
    set_precision(config)
    if config.train.num_threads:
        torch.set_num_threads(config.train.num_threads)


def device():
    """Return the kind of device, `cpu` or `gpu`, and its name."""
    if choose_device().type == "cuda":
        return "gpu", torch.cuda.get_device_name()
    return "cpu", "cpu"


def count_step(config, batch):
    """Return the FLOPs of matmuls and convolutions in loss and backward pass, uncompiled.

    Counts plain attention.  Nothing is computed: tensors are on the meta device.
    """
    return _count(config, batch, backward=True)


def count_forward(config, batch):
    """Return the FLOPs of the loss without its gradient; for flow matching, one forward F of the network."""
    return _count(config, batch, backward=False)


def _count(config, batch, backward):
    config = countable(config)
    method = METHODS[config.method.name]
    loss = step.Loss(step.build_net(config), method, (SimpleNamespace(**config.method),)).to("meta")
    rows = step.put_batch(batch, torch.device("cpu"))
    rows, drawn = draws.split({name: a.to("meta") for name, a in rows.items()})
    counter: Any = FlopCounterMode(display=False)
    tracker: Any = contextlib.nullcontext()  # the default's hooks fail on modules whose parameters need no gradient
    tracker.parents, counter.mod_tracker = ("Global",), tracker
    with counter, torch.set_grad_enabled(backward):
        value, _ = loss(rows, method.Draws(**drawn))
        if backward:
            value.backward()
    return counter.get_total_flops()


def countable(config):
    """Return the config with options that allow every operation to be counted."""
    config = copy.deepcopy(config)
    if "attention" in config.model:
        config.model.attention = "plain"
    config.train.compile = False
    return config


class Matmul:
    """Large square matmuls in the dtype and precision of a config: a reference for the speed of steps."""

    def __init__(self, config):
        """Create the factors."""
        size = 1024 if device()[0] == "cpu" else 8192
        self.flops = MATMULS * 2 * size**3
        dtype = getattr(torch, config.model.compute_dtype)
        self._a = torch.full((size, size), 1 / size, dtype=dtype, device=choose_device())  # a @ a = a

    def run(self):
        """Multiply several times in sequence and wait for the last product."""
        product = self._a
        for _ in range(MATMULS):
            product = torch.matmul(product, self._a)
        if self._a.is_cuda:
            torch.cuda.synchronize()
        return product


def main(path, num_devices, runs):
    """Measure a step on several processes; the first one prints the figures."""
    config = store.from_json(pathlib.Path(path).read_text())
    device = start_torch(config)
    rows, rank = config.train.batch_size // num_devices, dist.get_rank()
    batch = {name: a[rank * rows : (rank + 1) * rows] for name, a in cases.make_batch(config).items()}
    measured = Step(config, batch, step.make_mesh(config, device))
    if isinstance(measured.wrapper(), DistributedDataParallel):
        measured.wrapper()._set_ddp_runtime_logging_sample_rate(1)
    first = step.reduce_metrics([measured.run() for _ in range(measure.FIRST)])
    times = []
    for _ in range(runs):
        dist.barrier()  # otherwise a process would include the time it waits for others
        times.append(measure.seconds(measured))
    figures = {"times": times, "metrics": first, "overlap": overlap(measured.wrapper())}
    if rank == 0:
        print(json.dumps(figures))
    dist.destroy_process_group()


def overlap(wrapper):
    """Return seconds of backward pass, all-reduces and overlap, and the number of all-reduces; None without DDP."""
    if not isinstance(wrapper, DistributedDataParallel):
        return None
    data = wrapper._get_ddp_logging_data()
    names = {"compute_s": "compute_time", "communication_s": "comm_time", "both_s": "compute_comm_overlap_time"}
    figures = {name: data[f"avg_backward_{key}"] / 1e9 for name, key in names.items()}
    return figures | {"all_reduces": len(data["bucket_sizes"].split(","))}


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
