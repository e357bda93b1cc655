"""Checkpoints of a run, through Orbax: WORKDIR/checkpoints/jax/STEP, written asynchronously and atomically.

Each holds parameters, EMAs, optimizer, step, the loader's state and the config.
"""

import copy
import itertools
import os
import pathlib

import jax
import orbax.checkpoint as ocp
from absl import logging
from flax import nnx
from jax.experimental import multihost_utils

from configs import resolve
from configs.errors import UserError
from jax_impl import weights
from jax_impl.devices import local_mesh
from jax_impl.step import TrainState, create_state, make_mesh

DIRECTORY = "checkpoints/jax"
# What Orbax and TensorStore raise for a truncated, damaged or foreign checkpoint.
DAMAGE = (ValueError, OSError, KeyError, TypeError, AttributeError, RuntimeError)


class Checkpoints:
    """The checkpoints of one work directory, for saving and resuming."""

    def __init__(self, workdir: str | os.PathLike, config):
        """config: the run's; its `train.keep_checkpoints` newest ones stay.  Raises UserError if it cannot write."""
        self.config = config
        self.path = pathlib.Path(workdir).absolute() / DIRECTORY
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror}") from error
        self.manager = self._open()

    def save(self, state: TrainState, progress: dict) -> None:
        """Begin to save; training may go on.  Raises UserError if this or the last save could not be written.

        progress: what else resuming needs, in terms of JSON: `loader`, its state, and `window`, steps not logged yet.
        """
        run = progress | {"config": resolve.to_json(self.config)}
        items = ocp.args.Composite(state=ocp.args.StandardSave(_named(state)), run=ocp.args.JsonSave(run))
        try:
            self.manager.save(int(state.step), args=items)
        except (OSError, ValueError) as error:
            raise _cannot_save(self.path, error) from error

    def restore(self, like: TrainState) -> tuple[TrainState, dict] | None:
        """Return the newest readable state, shaped and sharded as `like`, and its progress; None if there is none.

        A damaged checkpoint is named in a warning, set aside, and the one before it used.  Raises UserError if all
        are damaged; then they stay as they are.
        """
        damaged = []
        for step in sorted(self.manager.all_steps(), reverse=True):
            try:
                state, run = _restore(self.manager, step, like)
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
        try:
            self.manager.wait_until_finished()
        except (OSError, ValueError) as error:
            raise _cannot_save(self.path, error) from error

    def close(self) -> None:
        """Finish the last save and end."""
        self.wait()
        self.manager.close()

    def _open(self):
        keep = self.config.train.keep_checkpoints
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=False)
        return ocp.CheckpointManager(self.path, options=options, item_names=("state", "run"))

    def _set_aside(self, damaged):
        if not damaged:
            return
        self.manager.close()
        if jax.process_index() == 0:
            for step in damaged:
                aside = _unused(self.path.parent / f"jax_damaged_{step}")
                (self.path / str(step)).rename(aside)
                logging.warning("moved the damaged checkpoint to %s; using the one before it", aside)
        _barrier("set_aside")
        self.manager = self._open()


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
        raise UserError(f"{workdir} holds no JAX checkpoint; one of PyTorch is converted by parity/convert.py")
    if not -1 <= ema < len(config.train.ema_decays):
        raise UserError(
            f"there is no EMA {ema}; {workdir} has {len(config.train.ema_decays)}, -1 is the raw parameters"
        )
    whole = copy.deepcopy(config)
    whole.train.fsdp = 1  # however many devices the run had, and this process has
    graphdef, like = create_state(whole, make_mesh(whole))
    restored = Checkpoints(workdir, config).restore(like)
    if restored is None:
        raise UserError(f"{workdir} holds no checkpoint yet")
    state = restored[0]
    params = state.params if ema < 0 else state.emas[ema]
    return config, weights.to_canonical(nnx.merge(graphdef, params), params)


def write_weights(workdir: str | os.PathLike, config, canonical) -> None:
    """Make a work directory whose step-0 checkpoint holds canonical weights {name: array}, EMAs included."""
    lock = resolve.open_workdir(workdir, config, "jax")
    mesh = local_mesh()  # whatever config.train.fsdp is: the run that resumes shards the state
    graphdef, state = create_state(config, mesh)
    params = weights.from_canonical(nnx.merge(graphdef, state.params), canonical)
    _, state = create_state(config, mesh, params)
    checkpoints = Checkpoints(workdir, config)
    checkpoints.save(state, {"loader": "", "window": []})
    checkpoints.close()
    lock.close()


def _restore(manager, step, like):
    abstract = {name: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding) for name, a in _named(like).items()}
    items = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), run=ocp.args.JsonRestore())
    restored = manager.restore(step, args=items)
    leaves = [restored.state[name] for name in _named(like)]
    return jax.tree.unflatten(jax.tree.structure(like), leaves), restored.run


def _named(state):
    """Return {dotted name: array}, so that a checkpoint is read without this project's classes."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _unused(path):
    """Return the path, or if it is taken, one like it that is not."""
    names = (path.with_name(f"{path.name}_{i}") for i in itertools.count(2))
    return next(p for p in itertools.chain([path], names) if not p.exists())


def _barrier(name):
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def _cannot_save(path, error):
    return UserError(f"cannot save a checkpoint in {path}: {_first_line(error)}.  Free the disk; older ones are whole")


def _first_line(error):
    return next(iter(str(error).splitlines()), type(error).__name__)
