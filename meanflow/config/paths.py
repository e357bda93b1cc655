"""User-supplied paths: expands `~` in every path flag, argument and option.

Shells do not expand the `~` in `--workdir=~/runs`, which would otherwise create a directory named `~`.
"""

import argparse
import os
import pathlib
import re
from collections.abc import Callable

from absl import flags

from meanflow.errors import UserError

# Config options that are, or may be, paths.
OPTIONS = (
    "data.name", "data.dir", "data.encoder", "latents.vae", "method.teacher", "train.load_from", "train.load_classes",
    "evaluation.dataset", "evaluation.reference", "evaluation.inception", "evaluation.dino",
)  # fmt: skip
REMOTE = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


def expand(path: str) -> str:
    """Return `path` with a leading `~` or `~user` expanded.  Raises UserError if there is no such home directory."""
    expanded = os.path.expanduser(path)
    if path.startswith("~") and expanded == path:
        raise UserError(f"there is no home directory {path.split('/')[0]}; if the name begins with ~, write ./{path}")
    return expanded


def expand_local(path: str) -> str:
    """Return `expand(path)` for a path to write.  Also raises UserError for a bucket or any other URL."""
    if REMOTE.match(path):
        raise UserError(f"{path} is not a local path: mount the bucket and name its directory, or copy the files later")
    return expand(path)


def check_directory(path: str, flag: str) -> str:
    """Return the absolute path of a directory, which need not exist yet.

    Raises UserError naming `flag` if the path exists but is not a directory, or cannot be one.
    """
    try:
        path = os.path.abspath(path)
    except FileNotFoundError as error:
        raise UserError(f"--{flag}={path} is relative, and the current directory is gone: cd to another") from error
    try:
        if not os.path.isdir(path) and os.stat(path):
            raise UserError(f"--{flag}={path} is a file: name a directory, new or of a run")
    except (FileNotFoundError, NotADirectoryError):
        pass  # reported by whatever reads or writes it
    except OSError as error:
        raise UserError(f"--{flag}={path}: {error.strerror}; name another directory") from error
    return path


class Parser(flags.ArgumentParser):
    """Parser of path flags: `flags.DEFINE(READ, name, default, help)`, or `WRITTEN` for paths a command writes."""

    syntactic_help = "a path"

    def __init__(self, convert: Callable[[str], str]):
        """convert: (path) -> path."""
        super().__init__()
        self.convert = convert

    def parse(self, argument: str) -> str:
        """Return the path to use.  UserError is a ValueError, which absl reports with the flag's name."""
        return self.convert(argument)

    def flag_type(self) -> str:
        """Return the type that --help shows."""
        return "path"


READ, WRITTEN = Parser(expand), Parser(expand_local)


def read(path: str) -> pathlib.Path:
    """Return the path of an argument to read; like `written`, a `type` for argparse."""
    return _argument(path, expand)


def source(path: str) -> pathlib.Path | str:
    """Return the path of weights to read, or their address on the hub, as it is."""
    return path if path.startswith("hf://") else read(path)


def dest(path: str) -> pathlib.Path | str:
    """Return the path to write, or an address on the hub as it is."""
    return path if path.startswith("hf://") else written(path)


def written(path: str) -> pathlib.Path:
    """Return the path of an argument to write."""
    return _argument(path, expand_local)


def expand_options(config) -> None:
    """Expand the `OPTIONS` of a config in place.  Raises UserError like `expand`."""
    for key in OPTIONS:
        section, name = key.split(".")
        if name in config[section] and config[section][name].startswith("~"):
            try:
                config[section][name] = expand(config[section][name])
            except UserError as error:
                raise UserError(f"config.{key}: {error}") from error


def _argument(path: str, convert: Callable[[str], str]) -> pathlib.Path:
    try:
        return pathlib.Path(convert(path))
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
