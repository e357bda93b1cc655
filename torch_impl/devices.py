"""Devices and processes: those of torchrun, or a single process."""

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

TIMEOUT = datetime.timedelta(minutes=30)  # for collectives: the others wait while one process evaluates or writes


def choose_device():
    """Return this process's device: its GPU if there is one, else the CPU.

    Raises UserError if torchrun started more processes than there are GPUs.
    """
    if torch.cuda.is_available():
        return torch.device("cuda", cluster.gpu_of_rank(os.environ, torch.cuda.device_count()))
    return torch.device("cpu")


def set_precision(config):
    """Set the precision of float32 matmuls and convolutions in this process, train.matmul_precision."""
    torch_precision.set_precision(config.train.matmul_precision)


def start_torch(config, num_threads=0):
    """Set the precision and join torchrun's processes, if any.  Returns the device.

    num_threads: threads per CPU operation if train.num_threads is 0; 0 leaves the choice to PyTorch.
    Raises UserError if the processes cannot be joined.
    """
    set_precision(config)
    remedy = "start one torchrun per node that knows the others, as launch/slurm_torch.sh does"
    cluster.check_started_together(os.environ, cluster.tasks_joined(os.environ), remedy)
    device = choose_device()
    if config.train.num_threads or num_threads:
        torch.set_num_threads(config.train.num_threads or num_threads)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        cluster.warn_of_idle_gpus(os.environ, torch.cuda.device_count())
    group: dict[str, Any] = {"backend": "gloo", "timeout": TIMEOUT}
    if device.type == "cuda":  # no device_id: PyTorch would split this pair for the mesh, gloo with NCCL's options
        group |= {"backend": "cpu:gloo,cuda:nccl"}
    if "RANK" not in os.environ:  # asynchronous checkpoints need a group even for one process
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
    """Return the index of this process and the number of processes; from here on each works alone.

    Uses one CPU thread unless the config says otherwise: rounding depends on the number of threads, which torchrun
    reduces for several processes.  Output does not depend on the number of processes; start more to use more cores.
    """
    start_torch(config, num_threads=1)
    group = dist.get_rank(), dist.get_world_size()
    dist.destroy_process_group()
    return group


def first_does(act):
    """Call `act` only in the first process and wait for it in all.  Returns its result there, None elsewhere.

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
    """Return the board that the processes share, in torchrun's store; None for a single process."""
    if dist.get_world_size() == 1:
        return None
    shared: Any = dist.distributed_c10d._get_default_store()
    store, rank = shared.clone(), dist.get_rank()  # its own connection, because waiting blocks the shared one
    keeper = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"

    def read():
        return store.get("failed").decode() if store.check(["failed"]) else ""

    ends = [f"ends/{i}" for i in range(dist.get_world_size())]
    return Board(
        rank, lambda note: store.set("failed", note), read, lambda: store.set(ends[rank], "yes"),
        lambda: store.check(ends), keeper,
    )  # fmt: skip


def wait_for_all():
    """Wait until all processes get here."""
    dist.barrier()


def gather(part):
    """Return the bytes of every process, in process order, in the first process; an empty list elsewhere."""
    parts = [b""] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(part, parts)
    return parts or []
