"""Checkpoints of a run, through torch.distributed.checkpoint: WORKDIR/checkpoints/torch/STEP, written asynchronously.

Each holds parameters, EMAs, optimizer, step, the loader's state and the config.  It is complete once its `.metadata`
is there, which is written last; an unfinished one is never read.
"""

import itertools
import json
import os
import pathlib
import pickle
import shutil
import warnings
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from absl import logging
from torch.distributed.checkpoint.api import CheckpointException

from configs import resolve
from configs.errors import UserError
from evaluation import files
from torch_impl import weights
from torch_impl.step import TrainState, create_state

DIRECTORY = "checkpoints/torch"
# What torch.distributed.checkpoint raises for a truncated, damaged or foreign checkpoint.
DAMAGE = (CheckpointException, ValueError, OSError, KeyError, TypeError, RuntimeError, EOFError, pickle.UnpicklingError)


class Checkpoints:
    """The checkpoints of one work directory, for saving and resuming."""

    def __init__(self, workdir: str | os.PathLike, config):
        """config: the run's; its `train.keep_checkpoints` newest ones stay.  Raises UserError if it cannot write."""
        self.config = config
        self.path = pathlib.Path(workdir).absolute() / DIRECTORY
        self.saving: Any = None
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror}") from error

    def save(self, state: TrainState, progress: dict) -> None:
        """Begin to save; training may go on.  Raises UserError if this or the last save could not be written.

        progress: what else resuming needs, in terms of JSON: `loader`, its state, and `window`, steps not logged yet.
        """
        self.wait()
        directory = self.path / str(state.step)
        run = {"step": state.step} | progress | {"config": resolve.to_json(self.config)}
        try:
            if _rank() == 0:
                _remove(directory)  # an unfinished one of a killed run
                files.replace_text(directory / "run.json", json.dumps(run))
            _barrier()
            self.saving = dcp.async_save(_copy(_named(state)), checkpoint_id=directory)
        except (OSError, CheckpointException) as error:
            raise _cannot_save(self.path, error) from error

    def restore(self, like: TrainState) -> tuple[TrainState, dict] | None:
        """Load the newest readable state into the tensors of `like`; None if there is no checkpoint.

        Returns the state and its progress.
        A damaged checkpoint is named in a warning, set aside, and the one before it used.  Raises UserError if all
        are damaged; then they stay as they are.
        """
        damaged = []
        for step in sorted(self._all_steps(), reverse=True):
            try:
                state, run = _restore(self.path / str(step), like)
            except DAMAGE as error:
                logging.warning("cannot read checkpoint %s: %s", self.path / str(step), _first_line(error))
                damaged.append(step)
            else:
                self._set_aside(damaged)
                return state, run
        if damaged:
            raise UserError(f"no checkpoint in {self.path} could be read; to start again, choose another --workdir")
        return None

    def wait(self) -> None:
        """Return when the last save is on disk.  Raises UserError if it could not be written."""
        if self.saving is None:
            return
        try:
            self.saving.result()
        except (OSError, RuntimeError, CheckpointException) as error:
            raise _cannot_save(self.path, error) from error
        self.saving = None
        _barrier()
        if _rank() == 0:
            for step in sorted(self._all_steps())[: -self.config.train.keep_checkpoints]:
                shutil.rmtree(self.path / str(step))

    def close(self) -> None:
        """Finish the last save and end."""
        self.wait()

    def _all_steps(self):
        return [int(d.name) for d in self.path.iterdir() if d.name.isdigit() and (d / ".metadata").exists()]

    def _set_aside(self, damaged):
        if not damaged:
            return
        _barrier()
        if _rank() == 0:
            for step in damaged:
                aside = _unused(self.path.parent / f"torch_damaged_{step}")
                (self.path / str(step)).rename(aside)
                logging.warning("moved the damaged checkpoint to %s; using the one before it", aside)
        _barrier()


def has_checkpoint(workdir: str | os.PathLike) -> bool:
    """Return whether a work directory holds a checkpoint, whole or not."""
    return any(path.name.isdigit() for path in (pathlib.Path(workdir) / DIRECTORY).glob("*"))


def read_weights(workdir: str | os.PathLike, ema: int = 0):
    """Return the config and the canonical weights {name: array} of a run's newest readable checkpoint.

    ema: index into train.ema_decays; -1 for the raw parameters.  Raises UserError if there is no such run,
    checkpoint or EMA.
    """
    config = resolve.read_workdir(workdir)
    if not (pathlib.Path(workdir) / DIRECTORY).is_dir():
        raise UserError(f"{workdir} holds no PyTorch checkpoint; one of JAX is converted by parity/convert.py")
    if not -1 <= ema < len(config.train.ema_decays):
        raise UserError(
            f"there is no EMA {ema}; {workdir} has {len(config.train.ema_decays)}, -1 is the raw parameters"
        )
    like = create_state(config, None, torch.device("cpu"))
    restored = Checkpoints(workdir, config).restore(like)
    if restored is None:
        raise UserError(f"{workdir} holds no checkpoint yet")
    state = restored[0]
    params = dict(state.net.named_parameters()) if ema < 0 else state.emas[ema]
    return config, weights.to_canonical(state.net, params)


def write_weights(workdir: str | os.PathLike, config, canonical) -> None:
    """Make a work directory whose step-0 checkpoint holds canonical weights {name: array}, EMAs included."""
    lock = resolve.open_workdir(workdir, config, "torch")
    cpu = torch.device("cpu")
    state = create_state(config, None, cpu)
    state = create_state(config, None, cpu, weights.from_canonical(state.net, canonical))
    directory = Checkpoints(workdir, config).path / "0"
    run = {"step": 0, "loader": "", "window": [], "config": resolve.to_json(config)}
    files.replace_text(directory / "run.json", json.dumps(run))
    dcp.save(_named(state), checkpoint_id=directory, no_dist=True)
    lock.close()


def _restore(directory, like):
    run = json.loads((directory / "run.json").read_text())
    dcp.FileSystemReader(directory).read_metadata()  # raises what is wrong with it; `load` would print a traceback
    with warnings.catch_warnings():  # that one process without a group reads alone is what we want
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(_named(like), checkpoint_id=directory, no_dist=not dist.is_initialized())
    return like._replace(step=run["step"]), run


def _named(state):
    """Return {part: {name: tensor}} of the state, the tensors themselves."""
    optimizer = {name: state.optimizer.state[p] for name, p in state.net.named_parameters()}
    return {
        "params": {name: p.detach() for name, p in state.net.named_parameters()},
        "optimizer": optimizer,
        "emas": {str(i): ema for i, ema in enumerate(state.emas)},
    }


def _copy(tree):
    """Copy the tensors, which training goes on changing while they are written."""
    return {name: _copy(a) if isinstance(a, dict) else a.clone() for name, a in tree.items()}


def _remove(path):
    """Remove a directory or whatever else is there."""
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


def _unused(path):
    """Return the path, or if it is taken, one like it that is not."""
    names = (path.with_name(f"{path.name}_{i}") for i in itertools.count(2))
    return next(p for p in itertools.chain([path], names) if not p.exists())


def _rank():
    return dist.get_rank() if dist.is_initialized() else 0


def _barrier():
    if dist.is_initialized():
        dist.barrier()


def _cannot_save(path, error):
    return UserError(f"cannot save a checkpoint in {path}: {_first_line(error)}.  Free the disk; older ones are whole")


def _first_line(error):
    if isinstance(error, CheckpointException):  # which says only that there was an error, in which processes
        error = next(iter(error.failures.values()))[0]
    return next(iter(str(error).splitlines()), type(error).__name__)
