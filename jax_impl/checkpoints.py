"""Checkpoints of a run, through Orbax: WORKDIR/checkpoints/jax/STEP, written asynchronously.

Each holds parameters, EMAs, optimizer, step, the loader's state and the config.  It is complete once it has its final
name and its `_CHECKPOINT_METADATA`; an incomplete one is never read.
"""

import json
import logging
import os
import pathlib
import re

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from jax.experimental import multihost_utils

from jax_impl import portable, weights
from jax_impl.devices import local_mesh, with_float64
from jax_impl.step import TrainState, abstract_net, abstract_state
from meanflow.commands import checkpoints, snapshots
from meanflow.config import options, store
from meanflow.errors import UserError
from meanflow.weights.training_state import TrainingState

DIRECTORY = "checkpoints/jax"
MARKER = "_CHECKPOINT_METADATA"  # the file that Orbax writes last, before it gives the directory its name
_STATE, _RUN = "state", "run"
_SAVE_SECONDS = 3600  # timeout of a save
# In TensorStore's ValueErrors about a failing disk, network or memory, as opposed to damaged files.
_NO_DAMAGE = ("RESOURCE_EXHAUSTED", "PERMISSION_DENIED", "UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED", "CANCELLED")

# Parts of a path that Orbax, TensorStore or etils treat as a pattern, an escape or a cloud path, or cannot handle.
_MISREAD = re.compile(r"[*?\[\\\udc80-\udcff]|:(?=/|$)|^/(gs|s3|az|hf)(?=/|$)")


class Checkpoints(checkpoints.CheckpointDirectory):
    """The checkpoints of one work directory, to save and resume.  All processes create and call it together."""

    def __init__(self, workdir: str | os.PathLike, config):
        """config: the run's; `train.keep_checkpoints` and `train.keep_every` say which checkpoints to keep.

        Raises UserError for a path that Orbax would misread.
        """
        super().__init__(_path_in(workdir), config, MARKER, f"{_RUN}/metadata", jax.process_index() == 0)
        handler = ocp.CompositeCheckpointHandler(_STATE, _RUN)
        self.checkpointer = ocp.AsyncCheckpointer(handler, timeout_secs=_SAVE_SECONDS)
        logging.getLogger("asyncio").addFilter(_is_no_echo)

    def save(self, state: TrainState, progress: dict) -> None:
        """Start a save; training may continue.  Raises UserError if this or the last save could not be written.

        progress: what else resuming needs, as JSON values: `loader`, its state; `window`, the steps not yet logged; and
        `pending`, whether this step's reports are still due.
        """
        self.wait()
        directory, run = self.path / str(int(state.step)), progress | {"config": store.to_json(self.config)}
        items = ocp.args.Composite(state=ocp.args.StandardSave(_named(state)), run=ocp.args.JsonSave(run))
        try:
            if jax.process_index() == 0:
                checkpoints.delete(directory, MARKER)  # an unfinished one of a killed run
            self.checkpointer.save(directory, args=items, force=True)
        except (OSError, ValueError) as error:
            raise checkpoints.cannot_save(self.path, error) from error

    def restore(self, like: TrainState, steps: list[int] | None = None) -> tuple[TrainState, dict] | None:
        """Return the newest readable state and its progress; None if there is no checkpoint.

        like: arrays or shapes that give the state's shapes and shardings.  steps: those to try, None for all.
        A damaged checkpoint is logged and skipped, and `open` sets it aside.
        Raises UserError if all are damaged, or if the disk keeps one from being read.
        """
        wanted = {name: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding) for name, a in _named(like).items()}

        def read(step):
            directory = self.path / str(step)
            problem, run, arrays = "", {}, {}
            try:
                run = _inspect(directory)
                arrays = _load(directory, wanted)
            except checkpoints.Damaged as error:
                problem = checkpoints.first_line(error)
            if not _all_agree(not problem):
                raise checkpoints.Damaged(problem or "another process cannot read it")
            return jax.tree.unflatten(jax.tree.structure(like), [arrays[name] for name in wanted]), run

        steps = self.steps() if steps is None else steps
        found, self.damaged = checkpoints.newest(steps, read, self.path, checkpoints.START_AGAIN)
        return found

    def wait(self) -> None:
        """Wait until the last save is on disk.  Raises UserError if it could not be written."""
        try:
            self.checkpointer.wait_until_finished()
        except (OSError, ValueError) as error:
            raise checkpoints.cannot_save(self.path, error) from error
        self.tidy()

    def close(self) -> None:
        """Finish the last save."""
        self.wait()
        self.checkpointer.close()


@with_float64
def read_weights(workdir: str | os.PathLike, ema: int = 0, step: int | None = None):
    """Return the config and the canonical weights {name: array} of a run's newest readable checkpoint.

    ema: index into train.ema_decays; -1 for the raw parameters.  step: another checkpoint, or a snapshot.
    Reads nothing else of the checkpoint and changes nothing in the directory.  Raises UserError if there is no such
    run, step or EMA.
    """
    path = _path_in(workdir)
    config, snapshot, steps = snapshots.locate(workdir, path, MARKER, ema, step)
    if snapshot is not None:
        return config, weights.load(snapshot)
    graphdef, like = abstract_net(config)
    part = "params" if ema < 0 else f"emas.{ema}"
    wanted = {f"{part}.{name}": jax.ShapeDtypeStruct(a.shape, a.dtype) for name, a in _named(like).items()}

    def read(step):
        _inspect(path / str(step))
        arrays = _load(path / str(step), wanted)
        return jax.tree.unflatten(jax.tree.structure(like), [arrays[name] for name in wanted])

    params, _ = checkpoints.newest(steps, read, path, checkpoints.CHOOSE_STEP)
    return config, weights.to_canonical(nnx.merge(graphdef, params), params)


@with_float64
def read_state(workdir: str | os.PathLike, step: int | None = None) -> tuple[options.Config, TrainingState]:
    """Return the config of a run and the whole state of its newest readable checkpoint, or of that of a step.

    Changes nothing in the directory.  Raises UserError if there is no such checkpoint.
    """
    config, steps = snapshots.locate_state(workdir, pathlib.Path(workdir).absolute() / DIRECTORY, MARKER, step)
    saved = Checkpoints(workdir, config)
    graphdef, like = abstract_state(config, local_mesh())
    found = saved.restore(like, steps)
    saved.checkpointer.close()  # not `close`, which deletes what the run no longer keeps
    assert found is not None  # there are steps
    return config, portable.export(graphdef, found[0], checkpoints.progress_of(found[1]))


@with_float64
def write_state(workdir: str | os.PathLike, config: options.Config, given: TrainingState) -> None:
    """Write the checkpoint of a state in canonical form.  Raises UserError for another network, or a full disk."""
    saved = Checkpoints(workdir, config)
    graphdef, like = abstract_state(config, local_mesh())
    state = portable.adopt(graphdef, like, given)
    saved.open()
    saved.save(state, given.progress)
    saved.close()


def _is_no_echo(record):
    """Return whether to log a record: not if it says, of an array that Orbax could not write, that nobody asked.

    A full disk stops every array at once; `wait` raises for the first, and asyncio logs a traceback for each other.
    """
    message = record.getMessage()
    return not ("exception was never retrieved" in message and "orbax" in message)


def _path_in(workdir):
    """Return the directory of the checkpoints.  Raises UserError if Orbax would misread its name."""
    path = pathlib.Path(workdir).absolute() / DIRECTORY
    misread = _MISREAD.search(str(path))
    if misread:
        raise UserError(
            f"{os.fsencode(workdir).decode(errors='replace')}: Orbax, which stores JAX's checkpoints, misreads "
            f"{misread[0]!r} in a path; rename the directory"
        )
    return path


def _inspect(directory):
    """Return a checkpoint's progress.  Raises `Damaged`, or UserError if the disk keeps it from being read."""
    try:
        run = json.loads((directory / _RUN / "metadata").read_text())
        if not checkpoints.can_resume(run):
            raise checkpoints.Damaged(f"{_RUN} lacks what resuming needs")
    except checkpoints.MISSING as error:
        raise checkpoints.Damaged(str(error)) from error
    except OSError as error:
        raise checkpoints.cannot_read(directory, error) from error
    except (TypeError, ValueError) as error:
        raise checkpoints.Damaged(f"{_RUN}: {checkpoints.first_line(error)}") from error
    return run


def _load(directory, wanted):
    """Return the arrays {name: array} named in `wanted`, with its shapes and shardings, if any; reads no others.

    Raises `Damaged`, or UserError if the checkpoint belongs to another network or the disk keeps it from being read.
    """
    path, handler = ocp.utils.epath.Path(directory / _STATE), ocp.PyTreeCheckpointHandler()
    found = _named_problems(directory, lambda: handler.metadata(path).tree)
    for name, a in wanted.items():
        shape = getattr(found.get(name), "shape", None)
        if shape != a.shape:
            there = "is missing" if shape is None else f"has shape {shape}"
            raise UserError(f"{directory}: {name} {there}, this network needs {a.shape}")
    restore_args = ocp.checkpoint_utils.construct_restore_args(wanted)
    args = ocp.args.PyTreeRestore(item=wanted, restore_args=restore_args, partial_restore=True)
    return _named_problems(directory, lambda: handler.restore(path, args=args))


def _named_problems(directory, read):
    """Return `read()`.  Errors of Orbax and TensorStore become `Damaged`, or UserError if the machine is at fault."""
    try:
        return read()
    except checkpoints.MISSING as error:
        raise checkpoints.Damaged(checkpoints.first_line(error)) from error
    except OSError as error:
        raise checkpoints.cannot_read(directory, error) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if any(text in str(error) for text in _NO_DAMAGE):
            raise checkpoints.cannot_read(directory, error) from error
        raise checkpoints.Damaged(checkpoints.first_line(error)) from error


def _named(state):
    """Return {dotted name: array}, so that checkpoints can be read without this project's classes."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _all_agree(value):
    """Return whether `value` is true in every process."""
    return value if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.array(value)).all())
