"""Evaluate a trained model: generate, compare with real images, print one JSON line, write DIR/evaluation.json.

    torchrun torch_impl/evaluate.py --workdir=runs/digits
    torchrun torch_impl/evaluate.py --workdir=runs/b4 --metrics=fid,is,kid,pr --num_samples=50000 \\
        --reference=imagenet_256.npz --inception=inception.safetensors --vae=sd-vae-ft-mse
    torchrun torch_impl/evaluate.py --make_reference=imagenet/train --image_size=256 --metrics=fid,kid,pr \\
        --reference=imagenet_256.npz --inception=inception.safetensors
    torchrun torch_impl/evaluate.py --workdir=runs/imf --omegas=1,2,4,8 --intervals=0:1,0.4:0.65

The first compares with the dataset itself.  The second evaluates images, decoded if the model makes latents, by
Inception features; --save=png keeps them in DIR/evaluation.  Both write a grid of samples to DIR/evaluation.png.  The
third makes the statistics of real images that the second needs.  The last evaluates every guidance scale with every
interval (improved MeanFlow only): it prints a table, and writes DIR/sweep.json and DIR/sweep.html.
Several processes share the samples: torchrun --nproc_per_node=8.
"""

import contextlib
import functools

import torch.distributed as dist

from meanflow.commands import evaluate
from meanflow.commands.processes import ending_together
from meanflow.config.flags import run
from meanflow.console_log import setup_logging
from meanflow.process_group import ProcessGroup
from torch_impl.devices import gather, make_board, start_torch, wait_for_all
from torch_impl.sample import NETWORKS, load


def start(config, stack):
    """Set up devices, join the other processes if there are any, and return the process group.

    stack: until it closes, a process that fails ends all of them.
    """
    start_torch(config)
    stack.enter_context(ending_together(make_board(), wait_for_all))
    return ProcessGroup(dist.get_rank(), dist.get_world_size(), gather)


def main():
    """Load and evaluate, once or for every guidance setting of a sweep."""
    setup_logging()
    with contextlib.ExitStack() as stack:
        evaluate.evaluate(load, NETWORKS, functools.partial(start, stack=stack))
    if dist.is_initialized():  # NCCL warns about a group left open
        dist.destroy_process_group()


if __name__ == "__main__":
    evaluate.define_flags()
    run(main)
