"""Devices and processes: what torchrun started, or one process alone."""

import os

import torch
import torch.distributed as dist

from configs.errors import UserError


def choose_device():
    """Return this process's device: its own GPU if there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cpu")


def start_torch(precision, num_threads=0):
    """Join the processes of torchrun, or stand alone, and set the precision of float32 matmuls.  Returns the device.

    precision: `highest` (full float32) or `default` (TF32 where the device has it).  num_threads: of an operation on
    the CPU; 0 leaves that to PyTorch.
    """
    device = choose_device()
    torch.set_float32_matmul_precision("highest" if precision == "highest" else "high")
    if num_threads:
        torch.set_num_threads(num_threads)
    torch.backends.cudnn.allow_tf32 = precision != "highest"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:  # asynchronous checkpoints want a group even for one process
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return device


def start_alone(config):
    """Return the number of this process and how many there are; from here on each works alone.

    On the CPU with one thread, unless the config says otherwise: more would round otherwise, and torchrun gives several
    processes fewer than one.  What is written does not depend on their number; for more cores start more processes.
    """
    start_torch(config.train.matmul_precision, config.train.num_threads or 1)
    place = dist.get_rank(), dist.get_world_size()
    dist.destroy_process_group()
    return place


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


def gather(part):
    """Return the bytes that each process calls it with, in the order of the processes; nothing but in the first one."""
    parts = [b""] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(part, parts)
    return parts or []
