"""The work directory of a run: its config, and whether the run can continue with another config."""

import os
import pathlib

from absl import logging

from meanflow.config import locks, options
from meanflow.config.store import flatten, read_content, read_file, to_json
from meanflow.errors import UserError

# A run may be resumed with other values of these options, and of whole sections.
FREE = {
    "name", "sample", "evaluation", "latents.vae",  # reports, and how finished weights are used
    "train.log_every", "train.sample_every", "train.evaluate_every",
    "train.checkpoint_every", "train.keep_checkpoints", "train.keep_every", "train.checkpoint_at_start",
    "train.snapshot_every",  # what is kept
    "train.steps", "train.schedule_steps",  # its length; `schedule_length` guards the learning rates of past steps
    "data.dir", "data.name", "data.encoder", "method.teacher",  # paths; `CONTENTS` are compared by content
    "data.num_workers", "data.prefetch", "train.num_threads", "train.accumulate", "train.fsdp",  # division of work
    "train.remat", "train.compile", "train.compile_backend", "model.attention", "model.attention_jvp",  # rounding
    "train.load_from",  # only read before the first checkpoint
}  # fmt: skip
CONTENTS = ("data.name", "data.encoder", "method.teacher")  # compared by digest, if one was stored
FILE_NAME = "config.json"
FRAMEWORKS = {"jax": "JAX", "torch": "PyTorch"}


def open_workdir(
    workdir: str | os.PathLike, config: options.Config, framework: str, contents: dict[str, str] | None = None
) -> locks.Lock:
    """Make the work directory of a run, write its config there and return the lock on it; close that when the run ends.

    framework: `jax` or `torch`, which writes its checkpoints.  contents: {option: digest} of what `CONTENTS` name.
    An existing run continues if its config is the same except for `FREE` options and the digests are the same.
    Raises UserError naming what differs, if another run uses the directory, if it belongs to the other framework, or if
    it cannot be written.
    """
    path, contents = pathlib.Path(workdir) / FILE_NAME, contents or {}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = locks.Lock(path.parent)
        try:
            check_workdir(workdir, config, framework)
            if path.exists():
                _check_contents(workdir, config, contents)
                contents = read_content(path) | contents
            unfinished = path.with_suffix(f".{os.getpid()}")
            with open(unfinished, "w", encoding="utf-8") as file:
                file.write(to_json(config, contents))
                file.flush()
                os.fsync(file.fileno())  # else a power loss may leave an empty file
            unfinished.replace(path)
        except BaseException:
            lock.close()
            raise
    except OSError as error:
        raise UserError(f"cannot write {path.parent}: {error.strerror}.  Choose another --workdir") from error
    return lock


def check_workdir(workdir: str | os.PathLike, config: options.Config, framework: str, alone: bool = False) -> None:
    """Raise UserError unless the run in a work directory, if any, can continue with `config`.  Writes nothing.

    alone: this process is the whole run, so if the directory is locked, another run has it.
    """
    path = pathlib.Path(workdir) / FILE_NAME
    if alone and (path.parent / locks.FILE_NAME).exists():
        locks.Lock(path.parent).close()
    for other in FRAMEWORKS.keys() - {framework}:
        if (path.parent / "checkpoints" / other).is_dir():
            raise UserError(
                f"{workdir} is the work directory of a run in {FRAMEWORKS[other]}, this is {FRAMEWORKS[framework]}.  "
                "Choose another --workdir; python -m parity.convert carries weights over"
            )
    if not path.exists():
        return
    there = read_workdir(workdir)
    old, new = flatten(there), flatten(config)
    both = [key for key in new if key in old]  # those of another network or method differ, but so does its name
    differing = [key for key in both if new[key] != old[key] and not {key, key.split(".")[0]} & FREE]
    if differing:
        shown = ", ".join(f"{key} ({old[key]!r} there, {new[key]!r} here)" for key in differing)
        raise UserError(
            f"{workdir} was written by another config: {shown}.  Set them back, or choose another --workdir"
        )
    lengths = schedule_length(there), schedule_length(config)
    if lengths[0] != lengths[1]:
        raise UserError(
            f"{workdir} has a cosine schedule of {lengths[0]} steps, and this config one of {lengths[1]}, under which "
            f"the steps done would have had other learning rates.  To go on at its last rate, set "
            f"--config.train.schedule_steps={lengths[0]}; for another schedule, choose another --workdir and "
            "--config.train.load_from"
        )
    if old["train.load_from"] != new["train.load_from"]:
        logging.info("config.train.load_from %r: a run with a checkpoint goes on from that", new["train.load_from"])


def schedule_length(config: options.Config) -> int | None:
    """Return the length of the learning-rate schedule in steps; None if the rate does not depend on it."""
    c = config.train
    return None if c.schedule == "constant" else c.schedule_steps or c.steps


def _check_contents(workdir: str | os.PathLike, config: options.Config, contents: dict[str, str]) -> None:
    """Raise UserError if the content of a path in the config differs from that of the existing run."""
    path = pathlib.Path(workdir) / FILE_NAME
    stored, old, new = read_content(path), flatten(read_file(path)), flatten(config)
    for key in filter(new.__contains__, CONTENTS):
        known = key in stored and key in contents  # otherwise the run is from before digests were stored
        differs = stored[key] != contents[key] if known else old[key] != new[key]
        if differs:
            moved = f"{new[key]!r}, and that" if old[key] != new[key] else "the same path, which by now"
            raise UserError(
                f"{workdir} is of config.{key} {old[key]!r}; this config names {moved} holds something else.  Set it "
                "back, or choose another --workdir"
            )


def read_workdir(workdir: str | os.PathLike) -> options.Config:
    """Return the config that a run left in its work directory.  Raises UserError if there is none."""
    path = pathlib.Path(workdir) / FILE_NAME
    if not path.exists():
        raise UserError(
            f"{workdir} is not the work directory of a run: there is no {path}.  If it holds other weights, "
            "python -m parity.convert reads them"
        )
    return read_file(path)
