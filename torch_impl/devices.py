"""Devices and processes: what torchrun started, or one process alone."""

import os

import torch
import torch.distributed as dist


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
