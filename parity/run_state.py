"""Carries a run from one framework to the other: its whole training state, and the log of its steps so far."""

import pathlib
import shutil

from jax_impl import checkpoints as jax_checkpoints
from meanflow import files
from meanflow.commands.logs import FILE_NAME as METRICS
from meanflow.config.workdir import FILE_NAME, FRAMEWORKS
from torch_impl import checkpoints as torch_checkpoints

CHECKPOINTS = {"jax": jax_checkpoints, "torch": torch_checkpoints}


def framework_of(source: str | pathlib.Path) -> str | None:
    """Return the framework that a work directory's checkpoints belong to; None if there are none."""
    path = pathlib.Path(source)
    found = [name for name, module in CHECKPOINTS.items() if (path / module.DIRECTORY).is_dir()]
    return found[0] if found and (path / FILE_NAME).is_file() else None


def carry(source: pathlib.Path, dest: pathlib.Path, to: str, step: int | None = None) -> tuple[str, int]:
    """Make `dest` a work directory of framework `to` which goes on from a checkpoint of the run `source`.

    step: of the checkpoint; the newest readable one if None.  Needs memory for the training state twice.  The log is
    copied, which the trainer shortens to the step; snapshots and older checkpoints stay where they are.
    Returns what was read and the number of arrays.  Raises UserError if there is no such checkpoint.
    """
    framework = framework_of(source)
    assert framework is not None
    config, state = CHECKPOINTS[framework].read_state(source, step)
    where = f"{FRAMEWORKS[framework]} until step {state.step} ({source})"
    earlier = state.progress.get("origin", "")
    state.progress["origin"] = f"{earlier}, {where}" if earlier else where
    CHECKPOINTS[to].write_state(dest, config, state)
    try:
        if (source / METRICS).is_file():
            shutil.copyfile(source / METRICS, dest / METRICS)
        # Last, with the digests of what its paths hold: without it nothing goes on from what was interrupted.
        shutil.copyfile(source / FILE_NAME, dest / FILE_NAME)
    except OSError as error:
        raise files.cannot_write(dest, error) from error
    arrays = (state.params, state.first_moments, state.second_moments, *state.emas)
    return f"{FRAMEWORKS[framework]} work directory, its whole state at step {state.step}", sum(map(len, arrays))
