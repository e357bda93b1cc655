"""Checkpoint handling shared by both frameworks: which steps are on disk, and which to read, delete or set aside.

A checkpoint is a directory CHECKPOINTS/STEP.  It is whole once it contains its marker, the file written last; without
the marker it is an interrupted save and does not count as a checkpoint.
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
from meanflow.config import options
from meanflow.errors import UserError

STEP = re.compile("0|[1-9][0-9]*")  # checkpoint names
UNFINISHED = re.compile(rf"({STEP.pattern})(\.orbax-checkpoint-tmp.*)?")  # names of checkpoints and unfinished saves
# Raised for missing files.  Any other OSError is a disk or network problem, not a damaged checkpoint.
MISSING = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
START_AGAIN, CHOOSE_STEP = "to start again, choose another --workdir", "--step chooses another"  # ways out
Read = TypeVar("Read")


class Damaged(Exception):
    """Files of a checkpoint are missing, truncated or corrupt."""


class CheckpointDirectory:
    """The checkpoint files of one run: what both frameworks do before and after saving and restoring."""

    def __init__(self, path: pathlib.Path, config: options.Config, marker: str, run_file: str, active: bool):
        """run_file: the JSON file of a checkpoint with its progress.  active: whether this process writes."""
        self.path, self.config, self.active = path, config, active
        self.marker, self.run_file = marker, run_file
        self.damaged: list[int] = []
        self.notes: dict[int, dict[str, Any]] = {}

    def open(self) -> None:
        """Create the directory, set aside checkpoints that `restore` found damaged, and delete interrupted saves.

        Raises UserError if the directory cannot be written.
        """
        make_directory(self.path)
        if self.active:
            set_aside(self.path, self.damaged)
            delete_unfinished(self.path, self.marker)
        self.damaged = []

    def steps(self) -> list[int]:
        """Return the steps of the whole checkpoints, ascending.  Raises UserError if they cannot be listed."""
        return whole_steps(self.path, self.marker)

    def tidy(self) -> None:
        """Write notes and delete expired checkpoints; call after a save."""
        self.write_notes()
        for step in expired(self.steps(), self.config.train) if self.active else ():
            delete(self.path / str(step), self.marker)

    def note(self, step: int, **changes) -> None:
        """Change progress entries of a step's checkpoint: now if it is on disk, otherwise in `write_notes` once it is.

        Raises UserError if they cannot be written.
        """
        self.notes[step] = changes
        self.write_notes()

    def write_notes(self) -> None:
        """Write the notes of steps now on disk.  Raises UserError if they cannot be written."""
        for step in [step for step in self.notes if is_whole(self.path / str(step), self.marker)]:
            changes = self.notes.pop(step)
            if self.active:
                amend(self.path / str(step) / self.run_file, changes)


def is_whole(directory: pathlib.Path, marker: str) -> bool:
    """Return whether a checkpoint is complete."""
    return (directory / marker).is_file()


def whole_steps(path: pathlib.Path, marker: str) -> list[int]:
    """Return the steps of the whole checkpoints in the directory `path`, ascending; empty if it does not exist.

    Raises UserError if `path` cannot be read.
    """
    try:
        found = [d for d in path.iterdir() if STEP.fullmatch(d.name) and is_whole(d, marker)] if path.is_dir() else []
    except OSError as error:
        raise cannot_read(path, error) from error
    return sorted(int(d.name) for d in found)


def newest(
    steps: Iterable[int], read: Callable[[int], Read], path: pathlib.Path, way_out: str
) -> tuple[Read | None, list[int]]:
    """Return `read(step)` for the newest undamaged step, and the list of newer, damaged steps.

    read: raises `Damaged`.  Logs a warning per damaged checkpoint.  Returns (None, []) if there are no steps.  Raises
    UserError with the `way_out` if all are damaged.
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
    """Return whether the JSON object stored with a checkpoint's arrays has everything needed to resume.

    That is `loader`, its state as JSON text or "", and `window`, [step, {name: value}] for each step not yet logged.
    """
    try:
        positions = [json.loads(run["loader"])["step"]] if run["loader"] else []
        steps, metrics = [step for step, _ in run["window"]], [scalars for _, scalars in run["window"]]
    except (LookupError, TypeError, ValueError):
        return False
    return all(type(step) is int for step in positions + steps) and all(
        isinstance(scalars, dict) for scalars in metrics
    )


def progress_of(run: dict[str, Any]) -> dict[str, Any]:
    """Return of the JSON object stored with a checkpoint's arrays what goes on in another framework; see `Run`."""
    return {name: run[name] for name in ("loader", "window", "pending", "origin") if name in run}


def expired(steps: list[int], c: Any) -> list[int]:
    """Return which `steps` (ascending) to delete: all but the newest and the milestones.  c: `config.train`."""
    return [step for step in steps[: -c.keep_checkpoints] if not (step and c.keep_every and step % c.keep_every == 0)]


def set_aside(path: pathlib.Path, steps: Iterable[int]) -> None:
    """Move damaged checkpoints out of the directory `path` to siblings of it."""
    for step in steps:
        aside = _unused(path.parent / f"{path.name}_damaged_{step}")
        (path / str(step)).rename(aside)
        logging.warning("moved the damaged checkpoint to %s; using the one before it", aside)


def delete(path: pathlib.Path, marker: str) -> None:
    """Delete a checkpoint or anything with its name; the marker goes first, so a partial one never counts as whole."""
    if path.is_dir():
        (path / marker).unlink(missing_ok=True)
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


def delete_unfinished(path: pathlib.Path, marker: str) -> None:
    """Delete interrupted saves in the directory `path`, provided it also has whole checkpoints.

    Raises UserError if they cannot be deleted.
    """
    whole = {str(step) for step in whole_steps(path, marker)}
    try:
        others = [d for d in path.iterdir() if UNFINISHED.fullmatch(d.name) and d.name not in whole]
        for entry in others if whole else []:
            delete(entry, marker)
            logging.info("deleted %s, an interrupted save", entry)
    except OSError as error:
        raise files.cannot_write(path, error) from error


def amend(path: pathlib.Path, changes: dict[str, Any]) -> None:
    """Atomically change entries of a JSON object in a file.  Raises UserError if that fails."""
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise cannot_read(path, error) from error
    files.replace_text(path, json.dumps(content | changes))


def make_directory(path: pathlib.Path) -> None:
    """Create the checkpoint directory.  Raises UserError if that fails."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def cannot_read(path: str | os.PathLike, error: BaseException) -> UserError:
    """Return the error for a `path` that could not be read because of the disk, not its content."""
    return UserError(f"cannot read {path}: {first_line(error)}.  Nothing was changed; try again once that is solved")


def cannot_save(path: str | os.PathLike, error: BaseException) -> UserError:
    """Return the error for a checkpoint in `path` that could not be written."""
    return UserError(f"cannot save a checkpoint in {path}: {first_line(error)}.  Free the disk; older ones are whole")


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type if there is none."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _unused(path: pathlib.Path) -> pathlib.Path:
    """Return the path, with a number appended if it already exists."""
    names = (path.with_name(f"{path.name}_{i}") for i in itertools.count(2))
    return next(p for p in itertools.chain([path], names) if not p.exists())
