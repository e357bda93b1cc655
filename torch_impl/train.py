"""Train in PyTorch, one device per process; the loop is shared with JAX (`meanflow.commands.train`).

    torchrun torch_impl/train.py --config=configs/digits.py --workdir=runs/digits_torch
    torchrun --nproc_per_node=8 torch_impl/train.py --config=configs/meanflow_imagenet.py:b4 --workdir=runs/b4

Run again with the same arguments to resume.
"""

import functools
import socket
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from meanflow import signals
from meanflow.commands import startup
from meanflow.commands import train as training
from meanflow.commands.logs import MetricLog
from meanflow.commands.processes import ending_together
from meanflow.commands.train import Termination
from meanflow.config import checks
from meanflow.config.flags import config as config_flag
from meanflow.config.flags import run, workdir
from meanflow.config.workdir import check_workdir, config_of, open_workdir
from meanflow.console_log import setup_logging, show_only_warnings
from meanflow.data import draws
from meanflow.data.examples import with_latents
from meanflow.data.loader import make_loader
from meanflow.data.prefetch import Prefetcher
from meanflow.process_group import ProcessGroup
from torch_impl import weights
from torch_impl.checkpoints import Checkpoints, read_weights
from torch_impl.devices import first_does, gather, make_board, start_torch, wait_for_all
from torch_impl.flops import count_forward
from torch_impl.models.attention import check_kernels
from torch_impl.sample import NETWORKS, make_sampler
from torch_impl.step import (
    build_net,
    create_state,
    make_mesh,
    make_train_step,
    put_batch,
    reduce_metrics,
    replace_params,
)


def train(config, workdir, device):
    """Train from config, or resume what is in the work directory, to `config.train.steps`.  Returns the last state.

    SIGTERM or SIGUSR1, inside `signals.caught`, saves a checkpoint and returns.  Raises UserError for anything the user
    can fix, including a non-finite loss; the latest checkpoint then predates it.
    """
    checks.check_trainable(config)
    check_kernels(config.model, device)
    first = dist.get_rank() == 0
    if not first:
        show_only_warnings()
    config = with_latents(config)
    # First, because another run in this directory may have taken all the memory of the device.
    check_workdir(workdir, config, "torch", alone=dist.get_world_size() == 1)
    checks.check_divisible(config, dist.get_world_size(), "processes")
    mesh = make_mesh(config, device)
    process = dist.get_rank(), dist.get_world_size()
    loader = make_loader(config, config.train.batch_size, *process)
    draw = functools.partial(draws.of_process, config, process=process)
    loader = Prefetcher(loader, functools.partial(put_batch, device=device), config.data.prefetch, draw)
    checkpoints = Checkpoints(workdir, config)
    state, progress = start_state(config, mesh, device, checkpoints)
    reports = make_reports(config, device, workdir)
    # Only now that everything the config names has been found: a mistake leaves no directory behind.
    digests = training.read_contents(config, read_weights)
    lock = first_does(lambda: open_workdir(workdir, config, "torch", digests))
    checkpoints.open()
    log, step = MetricLog(workdir, active=first), state.step
    run = training.Run(config, loader, checkpoints, log, training.Window(reduce_metrics), reports, lock)
    run.resume(step, progress)
    run.per_step = report_setup(config, state)
    train_step, termination = make_train_step(config), Termination(make_post())
    with training.closing(run, alone=dist.get_world_size() == 1):
        return training.loop(run, train_step, state, step, termination, peak_memory)


def start_state(config, mesh, device, checkpoints=None):
    """Return the state to train from and its progress (see `Checkpoints.save`).

    They come from the newest checkpoint.  Without one, the state is that of step 0, with the weights in the directory,
    or those of `train.load_from`, if there are any, and the progress is None.  A run with a checkpoint never reads that
    model, which may be gone.  Raises UserError if it is needed and differs from this one in channels, heads or path.
    """
    state = create_state(config, mesh, device, teacher=load_teacher(config, device))
    restored = checkpoints.restore(state) if checkpoints else None
    if restored:
        return restored
    model, load_classes = training.start_of(config, checkpoints)
    if model:
        net = build_net(config)
        own, canonical = training.read_model(model, config, read_weights)
        checks.check_alike(config, own, "train.load_from")
        params = dict(net.named_parameters())
        canonical = weights.transfer(net, params, canonical, resize=True, load_classes=load_classes)
        replace_params(state, weights.from_canonical(net, canonical))
    return state, None


def load_teacher(config, device):
    """Return the frozen flow model of guidance distillation, None without one.

    Raises UserError if `method.teacher` is not a flow model, or has other images or classes.
    """
    if not training.has_teacher(config):
        return None
    own, canonical = training.read_model(config.method.teacher, config, read_weights)
    net = build_net(checks.check_teacher(config, own))
    net.load_state_dict(weights.from_canonical(net, weights.transfer(net, dict(net.named_parameters()), canonical)))
    return net.to(device).requires_grad_(False)


def report_setup(config, state):
    """Report the set-up of a run, see `startup.report`, and return its result; {} except in the first process.

    Call in all processes.
    """
    hosts = [host.decode() for host in gather(socket.gethostname().encode())]
    if not hosts:
        return {}

    def size(tensors):  # bytes on this process's device
        return sum((a.to_local() if isinstance(a, DTensor) else a).nbytes for a in tensors)

    params = list(state.net.parameters())
    moments = [a for p in params for a in state.optimizer.state[p].values()]
    emas = [a for ema in state.emas for a in ema.values()]
    sizes = {"parameters": size(params), "optimizer": size(moments), "EMA": size(emas)}
    sizes["gradients"] = size(p for p in params if p.requires_grad)
    device = params[0].device
    device = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    num_parameters = sum(p.numel() for p in params)
    setup = startup.Setup(hosts, dist.get_world_size(), device, num_parameters, sizes, count_forward(config))
    return startup.report(config, setup, state.step)


def peak_memory(metrics):
    """Return the peak bytes used on the device of these metrics; None on a CPU."""
    device = metrics["loss"].device
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def make_post():
    """Return how processes agree to stop, see `Termination`; None for a single process.  Call in all processes."""
    if dist.get_world_size() == 1:
        return None
    group = dist.new_group(backend="gloo")  # the default group is busy with gradients

    def post(asked):
        flag = torch.tensor(float(asked))
        work: Any = dist.all_reduce(flag, dist.ReduceOp.MAX, group=group, async_op=True)

        def read():
            work.wait()
            return bool(flag)

        return read

    return post


def make_reports(config, device, workdir):
    """Return the reports of a run, [(every, report)]: image grids, evaluations and snapshots.

    Raises UserError for what evaluations need and cannot be read.
    """
    group = ProcessGroup(dist.get_rank(), dist.get_world_size(), gather)

    def weights_of(state, ema):
        return weights.to_canonical(state.net, dict(state.net.named_parameters()) if ema < 0 else state.emas[ema])

    def canonical_emas(state):
        return (weights.to_canonical(state.net, ema) for ema in state.emas)

    # After an evaluation all wait for the first process: in a step, groups of a mesh wait ten minutes only.
    sampling = training.make_reports(config, make_sampler(config, device), NETWORKS, group, weights_of, wait_for_all)
    return [*sampling, training.make_snapshots(config, workdir, canonical_emas, active=group.process == 0)]


def main():
    """Check the config and train."""
    setup_logging()
    c = checks.check(config_of(config_flag(), workdir()))
    device = start_torch(c)
    with ending_together(make_board(), wait_for_all), signals.caught():
        train(c, workdir(), device)
    dist.destroy_process_group()


if __name__ == "__main__":
    run(main)
