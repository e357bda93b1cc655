"""One training step: gradients, optimizer and EMA, around one compiled loss, over one process or many."""

import contextlib
import functools
import math
import os
import warnings
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from meanflow.commands import cluster
from meanflow.config.stages import stages
from meanflow.data import draws
from meanflow.weights import initial
from torch_impl import weights
from torch_impl.measures import measure, of_kinds
from torch_impl.methods import METHODS
from torch_impl.models import ARCHITECTURES, PROJECTIONS


class TrainState(NamedTuple):
    """The optimisation state in a checkpoint; its draws follow from the step and the seed."""

    step: int  # optimizer steps done
    net: nn.Module  # the bare network, float32 parameters
    optimizer: torch.optim.Optimizer
    emas: tuple  # one {name: tensor} of the parameters for each of train.ema_decays
    loss: Any  # the network inside its loss, compiled and wrapped for several processes


class Loss(nn.Module):
    """A method's loss as a module, to be compiled and wrapped by DDP or FSDP.

    `torch.func.jvp` through a DDP-wrapped network silently skips gradient synchronisation, so the wrapper goes around
    the loss.
    """

    def __init__(self, net, method, settings, teacher=None):
        """settings: the `config.method` of each stage."""
        super().__init__()
        self.net, self.method, self.settings, self.teacher = net, method, settings, teacher

    def forward(self, batch, drawn, stage=0):
        """Return the mean loss of the rows in a stage, and the scalars to log."""
        given = {} if self.teacher is None else {"teacher": self.teacher}
        loss, aux = self.method.loss(self.net, batch, drawn, self.settings[stage], **given)
        return loss, measure(loss.detach(), aux)


class Sharded(nn.Module):
    """A plain parent module for FSDP, so that its hooks run outside the compiled module."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args):
        """Call the module."""
        return self.module(*args)


def build_net(config):
    """Return the network with fresh parameters: `initial.draw` from config.seed.

    Parameters are float32; float64 where that is the compute dtype.  Under torch.device("meta") nothing is drawn.
    """
    with_values = torch.get_default_device().type != "meta"
    with torch.device("meta"):
        net = ARCHITECTURES[config.model.name](config.model)
    for module in net.modules():
        if hasattr(module, "remat"):
            module.remat = config.train.remat
    net = net.double() if config.model.compute_dtype == "float64" else net
    if with_values:
        drawn = initial.draw(config.model.name, weights.shapes(net), config.seed)
        net.load_state_dict(weights.from_canonical(net, drawn | net.tables()), assign=True)
    return net


def make_mesh(config, device):
    """Return the mesh (data, fsdp) over all processes, None for one process.

    Raises UserError if train.fsdp does not divide them into groups within a host or of whole hosts.
    """
    world, fsdp = (dist.get_world_size() if dist.is_initialized() else 1), config.train.fsdp
    per_host = int(os.environ.get("LOCAL_WORLD_SIZE", world))  # torchrun numbers the processes of a host consecutively
    cluster.check_groups([rank // per_host for rank in range(world)], fsdp, "processes")
    if world == 1:
        return None
    return init_device_mesh(device.type, (world // fsdp, fsdp), mesh_dim_names=("data", "fsdp"))


def wrap(loss, config, mesh: DeviceMesh | None):
    """Return the loss module compiled, and wrapped for the processes of `mesh`: DDP, or FSDP2 if train.fsdp > 1."""
    if config.train.compile:
        torch._dynamo.config.optimize_ddp = False  # else cuts the graph at every bucket of DDP, inside the JVP too
        loss = torch.compile(loss, backend=config.train.compile_backend, fullgraph=True, dynamic=False)
    if mesh is None:
        return loss
    if config.train.fsdp > 1:
        return fully_shard(Sharded(loss), mesh=mesh if mesh["data"].size() > 1 else mesh["fsdp"])
    device = next(loss.parameters()).device
    ids = [device.index] if device.type == "cuda" else None
    with warnings.catch_warnings():  # torch 2.13 renames the argument; 2.11 only has this name
        warnings.simplefilter("ignore", FutureWarning)
        # Buffers are fixed tables, equal everywhere; and torch 2.13 fails to broadcast a single one of rank 3.
        return DistributedDataParallel(loss, device_ids=ids, broadcast_buffers=False, gradient_as_bucket_view=True)


def create_state(config, mesh, device, params=None, teacher=None):
    """Return the state of step 0 on `device`; `params` {name: tensor} replace fresh weights.

    teacher: a frozen network for the method's loss, or None.
    """
    net = build_net(config)
    if params is not None:
        net.load_state_dict(params)
    net = net.to(device)
    settings = tuple(SimpleNamespace(**c.method) for c in stages(config))
    loss = Loss(net, METHODS[config.method.name], settings, teacher)
    loss = wrap(loss.to(device), config, mesh)
    emas = tuple({name: p.detach().clone() for name, p in net.named_parameters()} for _ in config.train.ema_decays)
    return TrainState(0, net, make_optimizer(net, config.train), emas, loss)


def replace_params(state, params):
    """Copy `params` {name: tensor}, whole on the CPU, to the parameters and EMAs of a state, sharded or not.

    Copies one tensor at a time, so the device never holds a second copy of the weights.
    """
    with torch.no_grad():
        for name, p in state.net.named_parameters():
            for own in (p, *(ema[name] for ema in state.emas)):
                copy_whole(own, params[name])


def copy_whole(own, whole):
    """Copy a tensor that every process has whole into `own`, which may be sharded."""
    whole = whole.to(own.device)
    if isinstance(own, DTensor):  # without a source rank: every process has the whole tensor
        whole = distribute_tensor(whole, own.device_mesh, own.placements, src_data_rank=None)
    own.copy_(whole)


def learning_rate(step, c):
    """Return the learning rate after `step` steps: linear warm-up, then constant or cosine.  c: `config.train`.

    The cosine reaches final_factor times the peak at the last step (schedule_steps if set), or warmup_steps earlier
    with cosine_end = early, as in the official iMF code, which passes optax a length that already excludes the warm-up.
    """
    warmup = c.warmup_from + (c.learning_rate - c.warmup_from) * step / max(c.warmup_steps, 1)
    end = (c.schedule_steps or c.steps) - (c.warmup_steps if c.cosine_end == "early" else 0)
    progress = min(max((step - c.warmup_steps) / max(end - c.warmup_steps, 1), 0), 1)
    cosine = c.final_factor + (1 - c.final_factor) * (1 + math.cos(math.pi * progress)) / 2
    rate = c.learning_rate * (cosine if c.schedule == "cosine" else 1.0)
    return warmup if step < c.warmup_steps else rate


def make_optimizer(net, c):
    """Return Adam or AdamW from `config.train`; the step clips, since it needs the norm anyway."""
    optimizer = torch.optim.AdamW(
        net.parameters(), lr=c.learning_rate, betas=(c.beta1, c.beta2), eps=c.adam_eps,
        weight_decay=c.weight_decay if c.optimizer == "adamw" else 0.0, fused=True,
    )  # fmt: skip
    for p in net.parameters():  # as the first step would, so that a checkpoint always has the same names
        optimizer.state[p] = {
            "step": torch.zeros((), device=p.device),
            "exp_avg": torch.zeros_like(p),
            "exp_avg_sq": torch.zeros_like(p),
        }
    return optimizer


def project(state, config):
    """Return the state with its parameters as a step needs them: normalised for EDM2, otherwise unchanged."""
    projection = PROJECTIONS.get(config.model.name)
    if projection is not None:
        projection(dict(state.net.named_parameters()))
    return state


def apply_gradients(state, c):
    """Return the state after one optimizer and EMA step, and the gradient norm before clipping.

    EMA: ema + (1 - d) (params - ema) after the update, every `ema_every` steps with d = decay^ema_every; this form
    rounds well even for d close to 1.  Source: Gsunshine/meanflow, utils/ema_util.py;
    Gsunshine/py-meanflow, models/meanflow.py (every 16 steps).
    """
    params = [p for p in state.net.parameters() if p.grad is not None]
    grads = [p.grad for p in params]
    norm = torch.nn.utils.get_total_norm(grads)
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    if c.clip_norm > 0:
        torch._foreach_mul_(grads, torch.clamp(c.clip_norm / norm, max=1.0))
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate(state.step, c)
    state.optimizer.step()
    state.optimizer.zero_grad()
    step = state.step + 1
    if step % c.ema_every == 0:
        with torch.no_grad():
            params = list(state.net.parameters())
            for decay, ema in zip(c.ema_decays, state.emas, strict=True):
                torch._foreach_lerp_(list(ema.values()), params, weight=1 - decay**c.ema_every)
    return state._replace(step=step), norm


def make_train_step(config):
    """Return the step: (state, batch, stage=0) -> (state, metrics).

    batch: {'image' [b c h w] float32, 'label' [b] int, the loader's other features, and the step's draws (see
    `draws.of_process`)}, this process's rows.  stage: index of the stage (see `stages`); each one compiles.  The
    state's tensors change in place.
    The result does not depend on the number of processes or micro-batches.  Metrics are scalars: tensors on the device,
    averaged over this process's rows until `reduce_metrics`, or numbers known to the host.  A step does not wait for
    the device.
    """
    method, c, settings = METHODS[config.method.name], config.train, stages(config)
    dtype = torch.float64 if config.model.compute_dtype == "float64" else torch.float32

    def gradients(state, batch, stage):
        total = {}
        parts = [a.chunk(c.accumulate) for a in batch.values()]
        for i, rows in enumerate(zip(*parts, strict=True)):
            with synchronised(state.loss, i == c.accumulate - 1):
                data, drawn = draws.split(dict(zip(batch, rows, strict=True)))
                loss, metrics = state.loss(data, method.Draws(**drawn), stage)
                (loss / c.accumulate).backward()
            total = {name: total.get(name, 0) + a / c.accumulate for name, a in metrics.items()}
        return total

    def train_step(state, batch, stage=0):
        state = project(state, config)
        # Float64 steps have no float32 in them.
        batch = {name: a.to(dtype) if a.is_floating_point() else a for name, a in batch.items()}
        metrics = gradients(state, batch, stage)
        rate = learning_rate(state.step, c)
        state, norm = apply_gradients(state, settings[stage].train)
        return state, metrics | {"grad_norm": norm, "learning_rate": rate}

    return train_step


@contextlib.contextmanager
def synchronised(loss, last):
    """Average gradients over the processes only in the last micro-batch of a step."""
    if isinstance(loss, FSDPModule):
        loss.set_requires_gradient_sync(last)
    with loss.no_sync() if isinstance(loss, DistributedDataParallel) and not last else contextlib.nullcontext():
        yield


def reduce_metrics(window):
    """Return the metrics of each step as floats, averaged over the processes; see `of_kinds`.

    window: a list of {name: scalar}; scalars are tensors on one device, or floats that are equal in all processes.
    Waits for the device once and runs one all-reduce, however long the list is.
    """
    tensors = [a for metrics in window for a in metrics.values() if torch.is_tensor(a)]
    if not tensors:
        return window
    values = torch.stack([a.detach().double() for a in tensors])
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(values)
        values /= dist.get_world_size()
    numbers = iter(values.tolist())
    means = [{name: next(numbers) if torch.is_tensor(a) else a for name, a in metrics.items()} for metrics in window]
    return [of_kinds(metrics) for metrics in means]


def put_batch(batch, device):
    """Put this process's rows of a numpy batch on its device, images as [b c h w] but channels last in memory.

    Waits for the copies, but not for steps: on a GPU, they have a stream of their own.
    """
    rows = {name: torch.from_numpy(np.ascontiguousarray(a)) for name, a in batch.items()}
    rows = copy_beside(rows, device) if device.type == "cuda" else {name: a.to(device) for name, a in rows.items()}
    images = {name: a.permute(0, 3, 1, 2) for name, a in rows.items() if a.ndim == 4}
    return rows | images | {"label": rows["label"].long()}


def copy_beside(rows, device):
    """Return tensors copied to a GPU, while its current stream computes."""
    stream, computing = _copies(device), torch.cuda.current_stream(device)
    with torch.cuda.stream(stream):
        rows = {name: a.pin_memory().to(device, non_blocking=True) for name, a in rows.items()}
    stream.synchronize()
    for a in rows.values():
        a.record_stream(computing)  # or its memory could be given to the next batch while a step reads it
    return rows


@functools.cache
def _copies(device):
    return torch.cuda.Stream(device)
