"""What the checkpoints of both frameworks share: which steps are stored, and which to read, delete or set aside.

A checkpoint is the directory CHECKPOINTS/STEP.  It is whole once its marker is there, the file written last; anything
else is a save that a kill cut short, and counts as no checkpoint.
"""

import itertools
import json
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from absl import logging

from meanflow import files
from meanflow.errors import UserError

STEP = re.compile("0|[1-9][0-9]*")  # names of checkpoints
UNFINISHED = re.compile(rf"({STEP.pattern})(\.orbax-checkpoint-tmp.*)?")  # or of saves under way
# What a missing file raises; any other OSError is the disk's or the network's, and no damage.
MISSING = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
START_AGAIN, CHOOSE_STEP = "to start again, choose another --workdir", "--step chooses another"  # ways out
Read = TypeVar("Read")


class Damaged(Exception):
    """A checkpoint has files that are missing, cut off or not what was written."""


def whole_steps(path: pathlib.Path, is_whole: Callable[[pathlib.Path], bool]) -> list[int]:
    """Return the steps, ascending, of the whole checkpoints in the directory `path`; none if there is no directory.

    is_whole: tells whether a checkpoint's directory holds the marker.  Raises UserError if `path` cannot be read.
    """
    try:
        found = [d for d in path.iterdir() if STEP.fullmatch(d.name) and is_whole(d)] if path.is_dir() else []
    except OSError as error:
        raise cannot_read(path, error) from error
    return sorted(int(d.name) for d in found)


def newest(
    steps: Iterable[int], read: Callable[[int], Read], path: pathlib.Path, way_out: str
) -> tuple[Read | None, list[int]]:
    """Return `read(step)` of the newest of `steps` that is not damaged, and the damaged ones that are newer.

    read: raises `Damaged`.  Each damaged checkpoint is named in a warning.  Returns None if there are no steps; raises
    UserError naming the `way_out` if all are damaged.
    """
    damaged = []
    for step in sorted(steps, reverse=True):
        try:
            return read(step), damaged
        except Damaged as error:
            logging.warning("cannot read checkpoint %s: %s", path / str(step), error)
            damaged.append(step)
    if damaged:
        raise UserError(f"no checkpoint in {path} could be read; {way_out}")
    return None, []


def can_resume(run: Any) -> bool:
    """Return whether what a checkpoint keeps beside its arrays, parsed JSON, is all that resuming needs.

    These are `loader`, its state as JSON text or "", and `window`, [step, {name: value}] for each step not logged yet.
    """
    try:
        places = [json.loads(run["loader"])["step"]] if run["loader"] else []
        steps, metrics = [step for step, _ in run["window"]], [scalars for _, scalars in run["window"]]
    except (LookupError, TypeError, ValueError):
        return False
    return all(type(step) is int for step in places + steps) and all(isinstance(scalars, dict) for scalars in metrics)


def expired(steps: list[int], c: Any) -> list[int]:
    """Return which of the ascending `steps` to delete: all but the newest and the milestones.  c: `config.train`."""
    return [step for step in steps[: -c.keep_checkpoints] if not (step and c.keep_every and step % c.keep_every == 0)]


def set_aside(path: pathlib.Path, steps: Iterable[int]) -> None:
    """Move damaged checkpoints out of the directory `path`, beside it."""
    for step in steps:
        aside = _unused(path.parent / f"{path.name}_damaged_{step}")
        (path / str(step)).rename(aside)
        logging.warning("moved the damaged checkpoint to %s; using the one before it", aside)


def delete(path: pathlib.Path, marker: str) -> None:
    """Delete a checkpoint, or whatever else has its name; the marker first, so half of one never counts as whole."""
    if path.is_dir():
        (path / marker).unlink(missing_ok=True)
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


def delete_unfinished(path: pathlib.Path, marker: str, is_whole: Callable[[pathlib.Path], bool]) -> None:
    """Delete the saves in the directory `path` that a kill cut short, if there are whole ones besides.

    marker, is_whole: as in `delete` and `whole_steps`.  Raises UserError if they cannot be deleted.
    """
    whole = {str(step) for step in whole_steps(path, is_whole)}
    try:
        others = [d for d in path.iterdir() if UNFINISHED.fullmatch(d.name) and d.name not in whole]
        for entry in others if whole else []:
            delete(entry, marker)
            logging.info("deleted %s, a save that was cut short", entry)
    except OSError as error:
        raise files.cannot_write(path, error) from error


def amend(path: pathlib.Path, changes: dict[str, Any]) -> None:
    """Change entries of a file that holds a JSON object, atomically.  Raises UserError if it cannot be done."""
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise cannot_read(path, error) from error
    files.replace_text(path, json.dumps(content | changes))


def make_directory(path: pathlib.Path) -> None:
    """Make the directory of the checkpoints.  Raises UserError if it cannot be made."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def cannot_read(path: str | os.PathLike, error: BaseException) -> UserError:
    """Return the error to raise where the disk, not the content, is why `path` could not be read."""
    return UserError(f"cannot read {path}: {first_line(error)}.  Nothing was changed; try again once that is solved")


def cannot_save(path: str | os.PathLike, error: BaseException) -> UserError:
    """Return the error to raise where a checkpoint in `path` could not be written."""
    return UserError(f"cannot save a checkpoint in {path}: {first_line(error)}.  Free the disk; older ones are whole")


def first_line(error: BaseException) -> str:
    """Return the first line of a message, the error's type if it has none."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _unused(path: pathlib.Path) -> pathlib.Path:
    """Return the path, or if it is taken, one like it that is not."""
    names = (path.with_name(f"{path.name}_{i}") for i in itertools.count(2))
    return next(p for p in itertools.chain([path], names) if not p.exists())
