"""Writes files so that a reader never sees a partial one."""

import contextlib
import errno
import os
import pathlib
import stat
import tempfile
from collections.abc import Iterator

from meanflow.errors import UserError

ROOM = 2**16  # bytes that a disk must still take


def check_writable(path: str | os.PathLike) -> None:
    """Raise UserError if a file could not be written now; call it before the work whose result it holds.

    Leaves nothing behind and makes no directories.
    """
    path = pathlib.Path(path)
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        folder = next(folder for folder in path.absolute().parents if folder.exists())
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(ROOM))
            file.flush()
    except OSError as error:
        raise cannot_write(path, error) from error


def replace_text(path: str | os.PathLike, text: str) -> None:
    """Write `text` to `path` atomically, making parent directories.

    Raises UserError if the path cannot be written.
    """
    replace_bytes(path, text.encode())


def replace_bytes(path: str | os.PathLike, content: bytes) -> None:
    """Write `content` to `path` atomically, making parent directories.

    Raises UserError if the path cannot be written.
    """
    path = pathlib.Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as unfinished:
            unfinished.write_bytes(content)
    except OSError as error:
        raise cannot_write(path, error) from error


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Yield where to write a file that takes the place of `path` once the context ends, if it does without an error.

    Others may read it if they may read what was there, or else any new file; safetensors 0.8 would allow nobody else.
    """
    path = pathlib.Path(path)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        unfinished.touch()
        mode = (path if path.exists() else unfinished).stat().st_mode
        yield unfinished
        with open(unfinished, "r+b") as file:
            os.fsync(file.fileno())  # otherwise a power loss could leave an empty file
        unfinished.chmod(stat.S_IMODE(mode))
        os.replace(unfinished, path)
    finally:
        with contextlib.suppress(OSError):  # it is gone, or was never there
            unfinished.unlink()


def cannot_write(path: str | os.PathLike, error: OSError) -> UserError:
    """Return the UserError for a `path` that could not be written."""
    return UserError(f"cannot write {path}: {error.strerror or error}.  Free the disk, or choose a path you can write.")
