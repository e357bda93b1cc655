"""The work directory of a run: its config, and whether the run can resume with a changed config."""

import os
import pathlib

from absl import logging

from meanflow.config import locks, options
from meanflow.config.store import flatten, read_content, read_file, to_json
from meanflow.errors import UserError

# Options, and whole sections, that may change when a run is resumed.
FREE = {
    "name", "sample", "evaluation", "latents.vae",  # reporting, and use of finished weights
    "train.log_every", "train.sample_every", "train.evaluate_every",
    "train.checkpoint_every", "train.keep_checkpoints", "train.keep_every", "train.checkpoint_at_start",
    "train.snapshot_every",  # what is saved and kept
    "train.steps", "train.schedule_steps",  # run length; `schedule_length` guards the learning rates of past steps
    "data.dir", "data.name", "data.encoder", "method.teacher",  # paths; `CONTENTS` are compared by content
    "data.num_workers", "data.prefetch", "train.num_threads", "train.accumulate", "train.fsdp",  # how work is divided
    "train.remat", "train.compile", "train.compile_backend", "model.attention", "model.attention_jvp",  # only rounding
    "train.load_from", "train.load_classes",  # read only before the first checkpoint
}  # fmt: skip
CONTENTS = ("data.name", "data.encoder", "method.teacher")  # compared by digest, if one was stored
FILE_NAME = "config.json"
FRAMEWORKS = {"jax": "JAX", "torch": "PyTorch"}


def open_workdir(
    workdir: str | os.PathLike, config: options.Config, framework: str, contents: dict[str, str] | None = None
) -> locks.Lock:
    """Create a run's work directory, write its config there and return the directory's lock; close it after the run.

    framework: the one that writes checkpoints, `jax` or `torch`.  contents: {option: digest} for the `CONTENTS` paths.
    An existing run resumes if its digests match and its config differs only in `FREE` options.
    Raises UserError naming any other difference, or if the directory is in use, belongs to a run in the other
    framework, or cannot be written.
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
                os.fsync(file.fileno())  # otherwise a power loss may leave an empty file
            unfinished.replace(path)
        except BaseException:
            lock.close()
            raise
    except OSError as error:
        raise UserError(f"cannot write {path.parent}: {error.strerror}.  Choose another --workdir") from error
    return lock


def config_of(given: options.Config | None, workdir: str | os.PathLike) -> options.Config | None:
    """Return the given config, or that of the run in the work directory if there is none.

    Returns None without either.  Raises UserError if the directory's cannot be read.
    """
    return read_workdir(workdir) if given is None and (pathlib.Path(workdir) / FILE_NAME).exists() else given


def check_workdir(workdir: str | os.PathLike, config: options.Config, framework: str, alone: bool = False) -> None:
    """Raise UserError if the work directory holds a run that cannot resume with `config`.  Writes nothing.

    alone: True if this process is the whole run, so that a locked directory means another run is using it.
    """
    path = pathlib.Path(workdir) / FILE_NAME
    if alone and (path.parent / locks.FILE_NAME).exists():
        locks.Lock(path.parent).close()
    for other in FRAMEWORKS.keys() - {framework}:
        if (path.parent / "checkpoints" / other).is_dir():
            raise UserError(
                f"{workdir} is the work directory of a run in {FRAMEWORKS[other]}, this is {FRAMEWORKS[framework]}.  "
                f"To go on with it here: python -m parity.convert {workdir} ANOTHER --to {framework}"
            )
    if not path.exists():
        return
    there = read_workdir(workdir)
    old, new = flatten(there), flatten(config)
    both = [key for key in new if key in old]  # another network or method has other options, but its name differs too
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
    """Return the length of the learning-rate schedule in steps; None if the schedule is constant."""
    c = config.train
    return None if c.schedule == "constant" else c.schedule_steps or c.steps


def _check_contents(workdir: str | os.PathLike, config: options.Config, contents: dict[str, str]) -> None:
    """Raise UserError if a path in the config holds other data than it did for the existing run."""
    path = pathlib.Path(workdir) / FILE_NAME
    stored, old, new = read_content(path), flatten(read_file(path)), flatten(config)
    for key in filter(new.__contains__, CONTENTS):
        known = key in stored and key in contents  # otherwise the run predates stored digests
        differs = stored[key] != contents[key] if known else old[key] != new[key]
        if differs:
            moved = f"{new[key]!r}, which" if old[key] != new[key] else "the same path, which now"
            raise UserError(
                f"{workdir} was written with config.{key} {old[key]!r}; this config names {moved} holds other "
                "data.  Set it back, or choose another --workdir"
            )


def read_workdir(workdir: str | os.PathLike) -> options.Config:
    """Read the config of the run in a work directory.  Raises UserError if there is none."""
    path = pathlib.Path(workdir) / FILE_NAME
    if not path.exists():
        raise UserError(
            f"{workdir} is not the work directory of a run: there is no {path}.  If it holds other weights, "
            "python -m parity.convert reads them"
        )
    return read_file(path)
