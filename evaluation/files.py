"""Writes files so that a reader never sees half of one."""

import os
import pathlib

from configs.errors import UserError


def replace_text(path: str | os.PathLike, text: str) -> None:
    """Make `text` the content of `path`, atomically; parent directories are made.

    Raises UserError if the path cannot be written.
    """
    replace_bytes(path, text.encode())


def replace_bytes(path: str | os.PathLike, content: bytes) -> None:
    """Make `content` that of `path`, atomically; parent directories are made.

    Raises UserError if the path cannot be written.
    """
    path = pathlib.Path(path)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_bytes(content)
        os.replace(unfinished, path)
    except OSError as error:
        raise cannot_write(path, error) from error


def cannot_write(path: str | os.PathLike, error: OSError) -> UserError:
    """Return the error to raise where `path` could not be written."""
    return UserError(f"cannot write {path}: {error.strerror or error}.  Free the disk, or choose a path you can write.")
