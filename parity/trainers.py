"""Both trainers' own pieces in one process, to take their steps side by side on the same batches.

Each takes the steps that its trainer compiles, on one device, and gives its state in canonical form.  Batches are NumPy
arrays with their draws, see `meanflow.data.draws`.
"""

import contextlib
from typing import Protocol

import jax
import numpy as np
import torch

from jax_impl import devices as jax_devices
from jax_impl import portable as jax_portable
from jax_impl import step as jax_step
from jax_impl import train as jax_train
from meanflow.config import options
from meanflow.config.stages import stage_at
from meanflow.weights.training_state import TrainingState
from torch_impl import devices as torch_devices
from torch_impl import portable as torch_portable
from torch_impl import step as torch_step
from torch_impl import train as torch_train

Batch = dict[str, np.ndarray]


class Trainer(Protocol):
    """A run in one framework, at the state after its last step."""

    def __init__(self, config: options.Config, given: TrainingState | None = None):
        """given: the state to go on from, None for what a new run of the config starts from."""

    def step(self, batch: Batch) -> dict[str, float]:
        """Take a step on a whole batch, and return what it logs."""
        ...

    def export(self) -> TrainingState:
        """Return the state in canonical form."""
        ...


class JaxTrainer:
    """See `Trainer`."""

    def __init__(self, config, given=None, device=None):
        """device: the first of this process if None."""
        self.config, self.mesh = config, jax_devices.local_mesh([device or jax.local_devices()[0]])
        self.graphdef, self.state, _ = jax_train.start_state(config, self.mesh)
        if given is not None:
            self.state = jax_portable.adopt(self.graphdef, self.state, given)
        teacher = jax_train.load_teacher(config, self.mesh)
        self._step = jax_step.make_train_step(config, self.graphdef, self.mesh, teacher=teacher)
        self._num = int(self.state.step)

    def step(self, batch):
        """See `Trainer.step`."""
        batch = jax_step.put_batch(batch, self.mesh)
        self.state, metrics = self._step(self.state, batch, stage_at(self.config, self._num))
        self._num += 1
        return jax_train.fetch([metrics])[0]

    def export(self):
        """See `Trainer.export`."""
        return jax_portable.export(self.graphdef, self.state)


class TorchTrainer:
    """See `Trainer`."""

    def __init__(self, config, given=None, device=None, num_threads=0):
        """device: that of this process if None.  num_threads: while it takes a step, 0 for those the process has."""
        self.config, self.device, self.num_threads = config, device or torch_devices.choose_device(), num_threads
        self.state, _ = torch_train.start_state(config, None, self.device)
        if given is not None:
            self.state = torch_portable.adopt(self.state, given)
        self._step = torch_step.make_train_step(config)

    def step(self, batch):
        """See `Trainer.step`."""
        with threads(self.num_threads):
            batch = torch_step.put_batch(batch, self.device)
            self.state, metrics = self._step(self.state, batch, stage_at(self.config, self.state.step))
            return torch_step.reduce_metrics([metrics])[0]

    def export(self):
        """See `Trainer.export`."""
        return torch_portable.export(self.state)


TRAINERS = {"jax": JaxTrainer, "torch": TorchTrainer}


def set_precision(config: options.Config) -> None:
    """Set the precision of both frameworks, as their trainers do; before any of them begins."""
    jax_devices.set_precision(config)
    torch_devices.set_precision(config)


@contextlib.contextmanager
def threads(num: int):
    """Let PyTorch use `num` threads within the context, 0 for as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(num or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
