"""Runs a command on several processes: if one fails, all exit immediately without waiting for each other."""

import contextlib
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import NamedTuple

from meanflow.errors import UserError

POLL_SECONDS = 0.5  # between reads of the board
GRACE_SECONDS = 2.0  # lets the failed process exit first, so that launchers report that one
KEEPER_SECONDS = 60.0  # how long the keeper waits for the others; a process that is compiling reads late


class Board(NamedTuple):
    """A message board where a failing process leaves a note for the others.

    Its functions never wait for other processes.  They raise OSError or RuntimeError if the board is gone.
    """

    process: int  # index of this process
    post: Callable[[str], None]  # leaves a note
    read: Callable[[], str]  # returns the note, or "" if there is none
    end: Callable[[], None]  # announces that this process is exiting
    all_end: Callable[[], bool]  # returns whether every process has announced its exit
    keeper: bool  # whether this process hosts the board, and so must exit last


@contextlib.contextmanager
def ending_together(board: Board | None, finish: Callable[[], None]) -> Iterator[None]:
    """Run a command as one of several processes.

    board: None for a single process, in which case this does nothing.  finish: waits for all processes, on success.
    If this process fails, it prints its error, leaves a note and exits with code 2 for a `UserError`, otherwise 1.  If
    another process fails, this one prints one line and exits with code 1, even while blocked in a collective.
    """
    if board is None:
        yield
        return
    over = threading.Event()
    watch = threading.Thread(target=_watch, args=(board, over), name="watch", daemon=True)
    watch.start()
    try:
        yield
        finish()
    except BaseException as error:  # any kind: the others must not wait for this process
        if over.is_set():
            watch.join()  # it is about to exit this process
        over.set()
        _end(board, error)
    over.set()
    watch.join()


def _watch(board, over):
    """Poll the board until this process is done; exit it if there is a note."""
    while not over.wait(POLL_SECONDS):
        note = _look(board)
        if note and not over.wait(GRACE_SECONDS):
            over.set()
            _leave(board, f"error: {note}", 1)


def _look(board):
    """Return the note on the board, or "" if there is none."""
    try:
        return board.read()
    except (OSError, RuntimeError):
        return "the process that coordinates this run has exited; stopping this one too"


def _end(board, error):
    """Exit this process after an error of its own, or one caused by another process's failure."""
    note = _look(board)
    if note and not isinstance(error, UserError):  # a collective broke because its partner is gone
        _leave(board, f"error: {note}", 1)
    code, text = 1, "".join(traceback.format_exception(error))
    if isinstance(error, UserError):
        code, text = 2, f"error: {error}"
    if isinstance(error, SystemExit):
        code, text = error.code if isinstance(error.code, int) else 1, str(error.code)
    with contextlib.suppress(OSError, RuntimeError):
        board.post(f"process {board.process} failed, see its message; stopping this one too")
    _leave(board, text, code)


def _leave(board, text, code):
    """Print and exit, the keeper last.  Skips Python's exit handlers, which may wait for other processes."""
    print(text.rstrip(), file=sys.stderr, flush=True)
    sys.stdout.flush()
    deadline = time.monotonic() + KEEPER_SECONDS
    with contextlib.suppress(OSError, RuntimeError):
        board.end()
        while board.keeper and time.monotonic() < deadline and not board.all_end():
            time.sleep(POLL_SECONDS)
    if board.keeper:
        time.sleep(POLL_SECONDS)  # lets the others exit after their announcement
    os._exit(code)
