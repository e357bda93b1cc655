"""Trains like the command of a framework, and dumps what a step receives: FRAMEWORK STEP DIRECTORY [flags].

Each process writes its draws at STEP, images as [b h w c], to DIRECTORY/PROCESS.npz.
"""

import pathlib
import sys

import numpy as np

from meanflow.config.flags import run
from meanflow.data import draws

framework, wanted, directory = sys.argv[1], int(sys.argv[2]), pathlib.Path(sys.argv[3])
sys.argv[1:] = sys.argv[4:]
if framework == "jax":
    import jax

    from jax_impl import main, train
    from jax_impl.devices import define_flags

    define_flags()
    number, make = jax.process_index, train.make_train_step

    def rows_of(a):
        """Return this process's rows, from all its devices."""
        parts = sorted(a.addressable_shards, key=lambda shard: shard.index[0].start or 0)
        return np.concatenate([shard.data for shard in parts])

else:
    import torch.distributed as dist

    from torch_impl import train

    main, number, make = train, dist.get_rank, train.make_train_step

    def rows_of(a):
        """Return this process's rows."""
        return (a.permute(0, 2, 3, 1) if a.ndim == 4 else a).numpy()


def make_and_dump(*args, **kwargs):
    """Return the training step; its call number `wanted`, from 0, dumps its draws."""
    step, count = make(*args, **kwargs), iter(range(wanted + 1))

    def dumping(state, batch, stage=0):
        if next(count, None) == wanted:
            np.savez(directory / f"{number()}.npz", **{name: rows_of(a) for name, a in draws.split(batch)[1].items()})
        return step(state, batch, stage)

    return dumping


train.make_train_step = make_and_dump
run(main.main)
