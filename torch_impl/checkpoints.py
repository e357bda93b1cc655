"""Checkpoints of a run, through torch.distributed.checkpoint: WORKDIR/checkpoints/torch/STEP, written asynchronously.

Each holds parameters, EMAs, optimizer, step, the loader's state and the config.  It is complete once its `.metadata`
is there, which is written last; an incomplete one is never read.
"""

import collections
import contextlib
import copy
import json
import os
import pathlib
import pickle
import warnings
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.tensor import DTensor

from meanflow import files
from meanflow.commands import checkpoints, snapshots
from meanflow.config import options, store
from meanflow.errors import UserError
from meanflow.weights.training_state import TrainingState
from torch_impl import portable, weights
from torch_impl.step import TrainState, build_net, create_state

DIRECTORY = "checkpoints/torch"
MARKER = ".metadata"  # the file that is written last
_RUN = "run.json"
# What unpickling raises for a file that is not a pickle, or not one of this library's.
_UNPICKLING = (pickle.UnpicklingError, EOFError, AttributeError, ImportError, LookupError, TypeError, ValueError)
_BROKEN_TENSOR = ("PytorchStreamReader", "corrupt", "unexpected EOF")  # in RuntimeErrors of torch.load


class Checkpoints(checkpoints.CheckpointDirectory):
    """The checkpoints of one work directory, to save and resume.  All processes create and call it together."""

    def __init__(self, workdir: str | os.PathLike, config):
        """config: the run's; `train.keep_checkpoints` and `train.keep_every` say which checkpoints to keep."""
        path = pathlib.Path(workdir).absolute() / DIRECTORY
        super().__init__(path, config, MARKER, _RUN, _rank() == 0)
        self.saving: Any = None
        # A save's collectives run in their own thread, so they must not share the group of the training.
        self.group: Any = dist.new_group(backend="gloo") if dist.is_initialized() else None

    def save(self, state: TrainState, progress: dict) -> None:
        """Start a save; training may continue.  Raises UserError if this or the last save could not be written.

        progress: what else resuming needs, as JSON values: `loader`, its state; `window`, the steps not yet logged; and
        `pending`, whether this step's reports are still due.
        """
        self.wait()
        run = {"step": state.step} | progress | {"config": store.to_json(self.config)}
        writer = _Writer(self.path / str(state.step), json.dumps(run))
        stager = DefaultStager(StagingOptions(False, False, False, False))  # copies to host memory before it returns
        try:
            self.saving = dcp.async_save(
                _own(_flat(_named(state))), storage_writer=writer, async_stager=stager, process_group=self.group
            )
        except (OSError, CheckpointException) as error:
            raise checkpoints.cannot_save(self.path, _cause(error)) from error
        finally:
            stager.close()

    def restore(self, like: TrainState, steps: list[int] | None = None) -> tuple[TrainState, dict] | None:
        """Load the newest readable state into the tensors of `like`.  steps: those to try, None for all.

        Returns the state and its progress; None if there is no checkpoint.
        A damaged checkpoint is logged and skipped, and `open` sets it aside.
        Raises UserError if all are damaged, or if the disk keeps one from being read.
        """

        def read(step):
            run, problem = self._from_first(lambda: _inspect(self.path / str(step)))
            if problem:
                raise checkpoints.Damaged(problem)
            _load(self.path / str(step), _named(like), self.group)
            return like._replace(step=step), run

        chosen = self._from_first(self.steps) if steps is None else steps
        found, self.damaged = checkpoints.newest(chosen, read, self.path, checkpoints.START_AGAIN)
        return found

    def wait(self) -> None:
        """Wait until the last save is on disk.  Raises UserError if it could not be written."""
        saving, self.saving = self.saving, None
        if saving is None:
            return
        try:
            saving.result()
        except (OSError, RuntimeError, CheckpointException) as error:
            raise checkpoints.cannot_save(self.path, _cause(error)) from error
        self.tidy()

    def close(self) -> None:
        """Finish the last save."""
        self.wait()

    def _from_first(self, function) -> Any:
        """Return the result of `function` in the first process."""
        shared: list[Any] = [function() if _rank() == 0 else None]
        if self.group is not None:
            dist.broadcast_object_list(shared, src=0, group=self.group)
        return shared[0]


def read_weights(workdir: str | os.PathLike, ema: int = 0, step: int | None = None):
    """Return the config and the canonical weights {name: array} of a run's newest readable checkpoint.

    ema: index into train.ema_decays; -1 for the raw parameters.  step: another checkpoint, or a snapshot.
    Reads nothing else of the checkpoint and changes nothing in the directory.  Raises UserError if there is no such
    run, step or EMA.
    """
    path = pathlib.Path(workdir).absolute() / DIRECTORY
    config, snapshot, steps = snapshots.locate(workdir, path, MARKER, ema, step)
    if snapshot is not None:
        return config, weights.load(snapshot)
    with torch.device("meta"):
        net = build_net(config)

    def read(step):
        _, problem = _inspect(path / str(step))
        if problem:
            raise checkpoints.Damaged(problem)
        params = {name: torch.empty(p.shape, dtype=p.dtype) for name, p in net.named_parameters()}
        _load(path / str(step), {"params": params} if ema < 0 else {"emas": {str(ema): params}})
        return params

    params, _ = checkpoints.newest(steps, read, path, checkpoints.CHOOSE_STEP)
    return config, weights.to_canonical(net, params)


def read_state(workdir: str | os.PathLike, step: int | None = None) -> tuple[options.Config, TrainingState]:
    """Return the config of a run and the whole state of its newest readable checkpoint, or of that of a step.

    Changes nothing in the directory.  Raises UserError if there is no such checkpoint.
    """
    config, steps = snapshots.locate_state(workdir, pathlib.Path(workdir).absolute() / DIRECTORY, MARKER, step)
    found = Checkpoints(workdir, config).restore(_empty_state(config), steps)
    assert found is not None  # there are steps
    return config, portable.export(found[0], checkpoints.progress_of(found[1]))


def write_state(workdir: str | os.PathLike, config: options.Config, given: TrainingState) -> None:
    """Write the checkpoint of a state in canonical form.  Raises UserError for another network, or a full disk."""
    saved = Checkpoints(workdir, config)
    state = portable.adopt(_empty_state(config), given)
    saved.open()
    with _alone():
        saved.save(state, given.progress)
        saved.close()


def _empty_state(config):
    """Return a state on the CPU whose content does not matter, in this process alone."""
    config = copy.deepcopy(config)
    config.train.compile = False
    return create_state(config, None, torch.device("cpu"))


class _Writer(dcp.FileSystemWriter):
    """Writes a checkpoint and its run.json over the remains of an interrupted save; all processes see an error."""

    def __init__(self, path, run):
        super().__init__(path)
        self._run = run

    def set_up_storage_writer(self, is_coordinator, *args, **kwargs):
        super().set_up_storage_writer(is_coordinator, *args, **kwargs)
        self._first = is_coordinator

    def prepare_local_plan(self, plan):
        if not self._first:  # by then the first process has prepared the directory
            return plan
        checkpoints.delete(pathlib.Path(self.path), MARKER)
        files.replace_text(pathlib.Path(self.path) / _RUN, self._run)
        return super().prepare_local_plan(plan)


def _inspect(directory):
    """Return run.json and a description of the damage: files that are missing, truncated or garbage; '' if none.

    Raises UserError if the disk keeps it from being read.
    """
    try:
        run = json.loads((directory / _RUN).read_text())
        if not checkpoints.can_resume(run):
            return None, f"{_RUN} lacks what resuming needs"
        metadata = dcp.FileSystemReader(directory).read_metadata()
        ends: dict[str, int] = {}
        for tensor in metadata.storage_data.values():
            ends[tensor.relative_path] = max(ends.get(tensor.relative_path, 0), tensor.offset + tensor.length)
        for name, end in ends.items():
            size = (directory / name).stat().st_size
            if size < end:
                return None, f"{name} has {size} bytes instead of {end}"
    except checkpoints.MISSING as error:
        return None, str(error)
    except OSError as error:
        raise checkpoints.cannot_read(directory, error) from error
    except _UNPICKLING as error:
        return None, checkpoints.first_line(error)
    return run, ""


def _load(directory, tensors, group=None):
    """Load only the tensors {part: {name: tensor}}; with a group, each process loads its own shard.

    Raises `Damaged`, or UserError if the checkpoint belongs to another network or the disk keeps it from being read.
    """
    found = dcp.FileSystemReader(directory).read_metadata().state_dict_metadata
    for name, tensor in _flat(tensors).items():
        size = getattr(found.get(name), "size", None)
        if size != tensor.shape:
            there = "is missing" if size is None else f"has shape {tuple(size)}"
            raise UserError(f"{directory}: {name} {there}, this network needs {tuple(tensor.shape)}")
    try:
        with _alone():
            dcp.load(tensors, checkpoint_id=directory, process_group=group, no_dist=group is None)
    except CheckpointException as error:
        for cause in (failure[0] for failure in error.failures.values()):
            if isinstance(cause, OSError) and not isinstance(cause, checkpoints.MISSING):
                raise checkpoints.cannot_read(directory, cause) from error
            if not _is_damage(cause):
                raise cause from error
        raise checkpoints.Damaged(checkpoints.first_line(_cause(error))) from error


@contextlib.contextmanager
def _alone():
    """Silence the warning that a process has no group, which is intended."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _is_damage(error):
    """Return whether an error means that a tensor file is damaged; running out of memory, for one, does not."""
    if isinstance(error, RuntimeError):
        return any(text in str(error) for text in _BROKEN_TENSOR)
    return isinstance(error, (*checkpoints.MISSING, *_UNPICKLING))


def _named(state):
    """Return the state's tensors (not copies) as {part: {name: tensor}}."""
    optimizer = {name: state.optimizer.state[p] for name, p in state.net.named_parameters()}
    return {
        "params": {name: p.detach() for name, p in state.net.named_parameters()},
        "optimizer": optimizer,
        "emas": {str(i): ema for i, ema in enumerate(state.emas)},
    }


def _own(tensors):
    """Return the tensors {name: tensor} that this process writes: one replica of each, balanced by bytes.

    A sharded tensor is written by all processes that hold a part of the chosen replica.
    """
    loads: dict[tuple[int, int], int] = collections.Counter()  # bytes by (number of replicas, index of the replica)
    own = {}
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].numel(), item[0])):
        replica, num = _replica(tensor)
        writer = min(range(num), key=lambda i: loads[num, i])
        loads[num, writer] += tensor.numel() * tensor.element_size()
        if writer == replica:
            own[name] = tensor
    return own


def _replica(tensor):
    """Return the index of the replica of a tensor that this process holds (a part of), and the number of replicas."""
    if not isinstance(tensor, DTensor):
        return _rank(), dist.get_world_size() if dist.is_initialized() else 1
    replica, num = 0, 1
    for axis, placement in enumerate(tensor.placements):
        if placement.is_replicate():
            replica = replica * tensor.device_mesh.size(axis) + tensor.device_mesh.get_local_rank(axis)
            num *= tensor.device_mesh.size(axis)
    return replica, num


def _flat(tree):
    """Return {dotted name: tensor}, with the names in a checkpoint."""
    flat = {}
    for key, value in tree.items():
        flat |= {f"{key}.{name}": a for name, a in _flat(value).items()} if isinstance(value, dict) else {key: value}
    return flat


def _rank():
    return dist.get_rank() if dist.is_initialized() else 0


def _cause(error):
    """Return the error itself, or the first of those collected in a CheckpointException."""
    return next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
