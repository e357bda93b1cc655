"""Devices and processes: what torchrun started, or one process alone."""

import datetime
import os
import socket
from typing import Any

import torch
import torch.distributed as dist
from absl import logging

from meanflow import torch_precision
from meanflow.commands import cluster
from meanflow.commands.processes import Board
from meanflow.errors import UserError

TIMEOUT = datetime.timedelta(minutes=30)  # of a collective: others wait while one process evaluates or writes


def choose_device():
    """Return this process's device: its own GPU if there is one, else the CPU.

    Raises UserError if torchrun started more processes than there are GPUs.
    """
    if torch.cuda.is_available():
        return torch.device("cuda", cluster.gpu_of_rank(os.environ, torch.cuda.device_count()))
    return torch.device("cpu")


def set_precision(config):
    """Set how precisely this process computes: train.matmul_precision of float32 matmuls and convolutions."""
    torch_precision.set_precision(config.train.matmul_precision)


def start_torch(config, num_threads=0):
    """Set the precision, and join the processes of torchrun or stand alone.  Returns the device.

    num_threads: of an operation on the CPU unless train.num_threads says otherwise; 0 leaves that to PyTorch.
    Raises UserError if the processes cannot be joined.
    """
    set_precision(config)
    remedy = "start one torchrun per node, and tell each of the others, as launch/slurm.sh does"
    cluster.check_started_together(os.environ, cluster.tasks_joined(os.environ), remedy)
    device = choose_device()
    if config.train.num_threads or num_threads:
        torch.set_num_threads(config.train.num_threads or num_threads)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        cluster.warn_of_idle_gpus(os.environ, torch.cuda.device_count())
    group: dict[str, Any] = {"backend": "gloo", "timeout": TIMEOUT}
    if (
        device.type == "cuda"
    ):  # without a device_id: PyTorch would split this pair for the mesh, gloo with NCCL's options
        group |= {"backend": "cpu:gloo,cuda:nccl"}
    if "RANK" not in os.environ:  # asynchronous checkpoints want a group even for one process
        group |= {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    try:
        dist.init_process_group(**group)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"cannot join the other processes: {str(error).splitlines()[0]}") from error
    logging.info(
        "process %d of %d on %s: %s", dist.get_rank(), dist.get_world_size(), socket.gethostname(),
        f"{device}, of {torch.cuda.device_count()} GPUs" if device.type == "cuda" else device,
    )  # fmt: skip
    return device


def start_alone(config):
    """Return the number of this process and how many there are; from here on each works alone.

    On the CPU with one thread, unless the config says otherwise: more would round otherwise, and torchrun gives several
    processes fewer than one.  What is written does not depend on their number; for more cores start more processes.
    """
    start_torch(config, num_threads=1)
    group = dist.get_rank(), dist.get_world_size()
    dist.destroy_process_group()
    return group


def first_does(act):
    """Call `act` in the first process alone.  Returns its result there and None elsewhere; all wait for it.

    Raises its UserError in every process, so that none waits for one that has ended.
    """
    result, texts = None, [""]
    if dist.get_rank() == 0:
        try:
            result = act()
        except UserError as error:
            texts = [str(error)]
    dist.broadcast_object_list(texts)
    if texts[0]:
        raise UserError(texts[0])
    return result


def make_board():
    """Return the board of this process and the others, in the store of torchrun; None for one process alone."""
    if dist.get_world_size() == 1:
        return None
    shared: Any = dist.distributed_c10d._get_default_store()
    store, rank = shared.clone(), dist.get_rank()  # a connection of its own, for waiting blocks the shared one
    keeper = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"

    def read():
        return store.get("failed").decode() if store.check(["failed"]) else ""

    ends = [f"ends/{i}" for i in range(dist.get_world_size())]
    return Board(
        rank, lambda note: store.set("failed", note), read, lambda: store.set(ends[rank], "yes"),
        lambda: store.check(ends), keeper,
    )  # fmt: skip


def wait_for_all():
    """Return once all processes have come here."""
    dist.barrier()


def gather(part):
    """Return the bytes that each process calls it with, in the order of the processes; nothing but in the first one."""
    parts = [b""] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(part, parts)
    return parts or []
