"""The PyTorch half of a rehearsal: `python -m benchmarks.rehearsal.torch_step CONFIG.json CARD DEVICES NODES`.

The trainer's own step runs on fake tensors, which have shapes but no values, and every allocation is counted.  Prints
one JSON object; see `rehearse`.  Twin of jax_step.py.
"""

import contextlib
import copy
import itertools
import json
import os
import pathlib
import sys
import time
import weakref
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from typing import NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import cases, torch_steps
from benchmarks.rehearsal import buffers, cards
from meanflow.config import checks, store
from meanflow.errors import exit_on_user_error
from torch_impl import step
from torch_impl.devices import set_precision
from torch_impl.flops import count_forward

DEVICE = torch.device("cpu")  # of the fake tensors: a build of PyTorch for CPUs runs no backward pass for other devices
BUCKET = 25 * 2**20  # bytes; DDP's default
BLOCK = 512  # bytes; CUDA's allocator rounds up to it
KERNELS = ("attention", "convolution")  # operations to report by name
COLLECTIVES = {"allgather": "all-gather", "reduce_scatter": "reduce-scatter"}
ASSUMED = {
    "eager": "without torch.compile: each operation allocates its result, and autograd keeps what it saves",
    "compiled": "compiled: what is kept for the backward pass is what torch.compile's partitioner chooses; operations "
    "are not fused here as inductor fuses them on a card, so temporaries are an upper bound",
    "both": "fake tensors on the CPU, whose operations save what those on a GPU save; workspaces of kernels and of "
    f"NCCL and the fragments of CUDA's allocator are not counted, sizes are rounded up to {BLOCK} bytes",
}


class Buffer(NamedTuple):
    """A storage, and what it was first used for."""

    serial: int
    size: int  # bytes
    shape: str
    where: str  # the line of ours that made it


class Allocations(TorchDispatchMode):
    """Counts the storages alive, their largest sum, and what they are then, by shape and the line of ours that made it.

    Also counts collectives and the operations of `KERNELS`.
    """

    def __init__(self, fake):
        """fake: the mode whose tensors are counted, not those of PyTorch's own that find a result's shape."""
        super().__init__()
        self.fake, self.alive, self.now, self.peak, self.at_peak = fake, {}, 0, 0, set()
        self.serials = itertools.count()
        self.collectives = defaultdict(lambda: {"count": 0, "bytes": 0})
        self.kernels = Counter()

    @classmethod
    def is_infra_mode(cls):
        """Return that torch.compile may run under this mode, which changes no result."""
        return True

    supports_higher_order_operators = True  # those that keep the state of random numbers for what runs again

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # what it does to its own part is counted
        result = func(*args, **(kwargs or {}))
        for a in tree_leaves(result):
            if isinstance(a, FakeTensor) and a.fake_mode is self.fake:
                self.track(a)
        if isinstance(func, torch._ops.HigherOrderOperator):
            func = next((a for a in args if isinstance(a, torch._ops.OpOverload)), func)
        namespace, _, name = func.name().partition("::")
        kind = next((kind for part, kind in COLLECTIVES.items() if part in name), None)
        if namespace in ("c10d", "_c10d_functional") and kind:
            self.collectives[kind]["count"] += 1
            sizes = [a.nbytes for a in tree_leaves(args) if isinstance(a, torch.Tensor)]  # of the whole and of a part
            self.collectives[kind]["bytes"] += min(sizes) if kind == "reduce-scatter" else max(sizes)
        if any(part in name for part in KERNELS):
            self.kernels[name] += 1
        return result

    def track(self, a: torch.Tensor) -> None:
        """Count the storage of a tensor, unless it is known, until it is freed."""
        storage = a.untyped_storage()
        key = storage._cdata
        if key in self.alive or not storage.nbytes():
            return
        calls = list(stack())
        if any(path.endswith("tensor/_sharding_prop.py") for path, *_ in calls):
            return  # DTensor finds the shape of a result
        size = -(-storage.nbytes() // BLOCK) * BLOCK
        text = f"{str(a.dtype).removeprefix('torch.')}[{','.join(map(str, a.shape))}]"
        where = buffers.line_of_ours(calls) or "PyTorch"
        self.alive[key] = Buffer(next(self.serials), size, text, where)
        weakref.finalize(storage, self.free, key)
        self.now += size
        if self.now > self.peak:
            self.peak, self.at_peak = self.now, set(self.alive.values())

    def free(self, key: int) -> None:
        """Forget a storage."""
        self.now -= self.alive.pop(key).size

    def of(self, tensors: Iterable[torch.Tensor]) -> set[Buffer]:
        """Return the buffers of this process's parts of tensors."""
        tensors = (a.to_local() if isinstance(a, DTensor) else a for a in tensors)
        return {self.alive[a.untyped_storage()._cdata] for a in tensors}


def stack() -> Iterator[tuple[str, int, str]]:
    """Yield (path, line, function) of the calls that led here, the innermost first."""
    frame = sys._getframe(1)
    while frame:
        yield frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_qualname
        frame = frame.f_back


@contextlib.contextmanager
def processes(num_devices: int, num_nodes: int) -> Iterator[None]:
    """Be the first of as many processes as there are cards, whose collectives do nothing."""
    here = {"LOCAL_WORLD_SIZE": str(num_devices)}
    dist.init_process_group("fake", rank=0, world_size=num_devices * num_nodes, store=FakeStore())
    try:
        with mock.patch.dict(os.environ, here):
            yield
    finally:
        dist.destroy_process_group()


def run_step(config, num_devices: int, num_nodes: int) -> dict:
    """Run a step of the config on fake tensors and return what it allocates, see `rehearse`, but for what it costs."""
    world, fake = num_devices * num_nodes, FakeTensorMode(allow_non_fake_inputs=True)
    trace = Allocations(fake)
    with processes(num_devices, num_nodes), without_values(config.train.compile):
        mesh = step.make_mesh(config, DEVICE)
        with fake, trace:
            state = step.create_state(config, mesh, DEVICE)
            if isinstance(state.loss, DistributedDataParallel):
                state.loss.register_comm_hook(None, all_reduce)
                trace.collectives |= buckets(state.loss)
            rows = {name: a[: len(a) // world] for name, a in cases.make_batch(config).items()}
            batch = step.put_batch(rows, DEVICE)
            kept = parts_of(state, batch, trace)
            gradients = set(trace.alive.values()).difference(*kept.values())  # buckets of DDP, which stay
            for p in state.net.parameters():
                if p.requires_grad:
                    p.register_post_accumulate_grad_hook(lambda p: gradients.update(trace.of([p.grad])))
            trace.peak = 0
            step.make_train_step(config)(state, batch)
    kept["gradients"] = gradients
    found = {name: trace.at_peak & held for name, held in kept.items()}
    rest = trace.at_peak.difference(*found.values())
    parts = {name: sum(a.size for a in held) for name, held in (found | {"temporaries": rest}).items()}
    return {
        "parts": parts, "peak_bytes": trace.peak, "largest": buffers.largest(a[1:] for a in rest),
        "collectives": dict(trace.collectives), "custom_calls": dict(trace.kernels.most_common()),
    }  # fmt: skip


@contextlib.contextmanager
def without_values(compiled: bool) -> Iterator[None]:
    """Leave out what compares or moves parameters, which fake tensors cannot do; uncompiled, make duals of copies."""
    ddp = "torch.nn.parallel.distributed"
    dual = forward_ad.make_dual if compiled else make_dual
    with (
        mock.patch(f"{ddp}._verify_param_shape_across_processes"),
        mock.patch(f"{ddp}._sync_module_states"),
        mock.patch("torch.nn.Module.to", lambda module, *_: module),
        mock.patch("torch.autograd.forward_ad.make_dual", dual),
    ):
        yield


def make_dual(primal: torch.Tensor, tangent: torch.Tensor, **more) -> torch.Tensor:
    """Return a dual number as PyTorch does, which fails for fake tensors that are both parts of larger ones."""
    return _make_dual(primal.clone(), tangent.clone(), **more)


_make_dual = forward_ad.make_dual


def parts_of(state, batch, trace: Allocations) -> dict[str, set[Buffer]]:
    """Return the buffers that are there for the whole step, by part."""
    params = list(state.net.parameters())
    moments = [a for p in params for a in state.optimizer.state[p].values()]
    tensors = {
        "parameters": [*params, *state.net.buffers()], "optimizer": moments,
        "ema": [a for ema in state.emas for a in ema.values()], "batch": batch.values(),
    }  # fmt: skip
    return {name: trace.of(found) for name, found in tensors.items()}


def all_reduce(_, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Return the gradients of a bucket of DDP, as if reduced."""
    done = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done


def buckets(wrapper: DistributedDataParallel) -> dict:
    """Return the number and bytes of the all-reduces of DDP's steps but for the first, which has a single bucket."""
    params = [p.detach() for p in wrapper.parameters() if p.requires_grad][::-1]  # in the order of their gradients
    limits = [dist._DEFAULT_FIRST_BUCKET_BYTES, BUCKET]
    indices, _ = dist._compute_bucket_assignment_by_size(params, limits)
    return {"all-reduce": {"count": len(indices), "bytes": sum(p.nbytes for p in params)}}


def rehearse(config, card: cards.Card, num_devices: int, num_nodes: int) -> dict:
    """Return what a step needs on one card, of `num_nodes` hosts with `num_devices` each.

    parts: bytes by name; they add up to peak_bytes.  collectives: {kind: {"count", "bytes"}}.  custom_calls:
    {operation: count}.  largest: [{"bytes", "count", "shape", "where"}] at the moment of the peak.  flops: counted in a
    step, on one card; forward_flops: in one forward F of a row.  assumed: sentences.  seconds: it took.
    """
    began = time.perf_counter()
    checks.check_divisible(config, num_devices * num_nodes, "processes")
    set_precision(config)
    found = {kind: run_step(changed, num_devices, num_nodes) for kind, changed in ways(config).items()}
    kind = next(iter(found))
    config.train.batch_size //= num_devices * num_nodes
    return found[kind] | {
        "largest": found["eager"]["largest"],  # a compiled graph does not say which line of ours made a buffer
        "peak_kind": f"{kind}, on fake tensors", "peaks": {name: a["peak_bytes"] for name, a in found.items()},
        "flops": torch_steps.count_step(config, cases.make_batch(config)), "forward_flops": count_forward(config),
        "assumed": [*(ASSUMED[name] for name in found), ASSUMED["both"]], "seconds": time.perf_counter() - began,
    }  # fmt: skip


def ways(config) -> dict:
    """Return the config by how its step runs: compiled, if it is, and eager."""
    eager = copy.deepcopy(config)
    eager.train.compile = False
    if not config.train.compile:
        return {"eager": eager}
    config = copy.deepcopy(config)
    config.train.compile_backend = "aot_eager_decomp_partition"
    return {"compiled": config, "eager": eager}


def main(path: str, card: str, num_devices: str, num_nodes: str) -> None:
    """Rehearse the config in a file, and print the figures."""
    config = checks.check(store.from_json(pathlib.Path(path).read_text()))
    print(json.dumps(rehearse(config, cards.find(card), int(num_devices), int(num_nodes))))


if __name__ == "__main__":
    with exit_on_user_error():
        main(*sys.argv[1:])
