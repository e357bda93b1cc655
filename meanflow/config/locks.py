"""A directory lock for a single writing process, held until that process exits.

A POSIX record lock: the kernel drops it when the process dies, even by SIGKILL, and forked children, such as loader
workers that outlive their parent, do not inherit it, as they would `flock`.  The catch: closing any descriptor of the
file drops the lock, so the process that holds it must not open the file again; `_held` prevents that.
"""

import datetime
import errno
import fcntl
import json
import os
import pathlib
import socket

from absl import logging

from meanflow.errors import UserError

FILE_NAME = ".lock"
UNSUPPORTED = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)  # errors of file systems without locks
_held: set[tuple[int, int]] = set()  # device and inode of each file this process has locked


class Lock:
    """The lock of a directory, released by `close` or when the process exits.

    Raises UserError if another process (which it names) or this one already holds it, or if the lock file cannot be
    written.  On a file system without locks it locks nothing and logs a warning.
    """

    def __init__(self, directory: str | os.PathLike):
        """directory: must exist."""
        self.path, self._file, self._key = pathlib.Path(directory) / FILE_NAME, None, None
        if self.path.exists() and _key(os.stat(self.path)) in _held:
            raise UserError(f"{directory} is already in use by this process")
        try:
            file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror}.  Choose a directory you can write") from error
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(file, 1000)
            os.close(file)
            if error.errno not in UNSUPPORTED:
                raise UserError(_in_use(directory, holder)) from error
            logging.warning(
                "%s is on a file system without locks (%s): make sure that no other run uses it", directory, error
            )
            return
        since = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
        holder = {"host": socket.gethostname(), "pid": os.getpid(), "since": since}
        os.ftruncate(file, 0)
        os.write(file, (json.dumps(holder) + "\n").encode())
        self._file, self._key = file, _key(os.fstat(file))
        _held.add(self._key)

    def close(self) -> None:
        """Release the lock.  The file stays: if it were removed, two other processes could each hold a lock."""
        if self._file is not None:
            os.close(self._file)
            _held.discard(self._key)
            self._file = None

    def __enter__(self) -> "Lock":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


def _key(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _in_use(directory: str | os.PathLike, holder: bytes) -> str:
    try:
        content = json.loads(holder)
        who = f"process {content['pid']} on {content['host']}, since {content['since']}"
    except (ValueError, KeyError, TypeError):  # the holder has not written its name yet, or its disk is full
        who = "another process"
    return f"{directory} is in use by another run ({who}): wait for it, stop it, or choose another directory"
