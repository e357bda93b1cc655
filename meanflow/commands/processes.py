"""The processes of one command: if one fails, all end immediately, without waiting for each other."""

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
GRACE_SECONDS = 2.0  # for the failed process to end first, so that launchers name it
KEEPER_SECONDS = 60.0  # the board's keeper waits for the others; a compiling process reads a note late


class Board(NamedTuple):
    """Where a failing process leaves a note for the others.  No function waits for another process.

    All raise OSError or RuntimeError if the board is gone.
    """

    process: int  # index of this process
    post: Callable[[str], None]
    read: Callable[[], str]  # the note, empty if there is none
    end: Callable[[], None]  # announces that this process ends
    all_end: Callable[[], bool]  # whether every process has announced it
    keeper: bool  # the board ends with this process, so it ends last


@contextlib.contextmanager
def ending_together(board: Board | None, finish: Callable[[], None]) -> Iterator[None]:
    """Run a command as one of several processes.

    board: None for a single process, for which this does nothing.  finish: waits for all processes, on success.
    If this process fails, it prints its error, leaves a note and ends with exit code 2 for a `UserError`, else 1.  If
    another one fails, this one prints one line and ends with exit code 1, even while waiting in a collective.
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
    except BaseException as error:  # of any kind: the others must not wait for this process
        if over.is_set():
            watch.join()  # it is ending this process
        over.set()
        _end(board, error)
    over.set()
    watch.join()


def _watch(board, over):
    """Read the board until this process is over; end it if there is a note."""
    while not over.wait(POLL_SECONDS):
        note = _look(board)
        if note and not over.wait(GRACE_SECONDS):
            over.set()
            _leave(board, f"error: {note}", 1)


def _look(board):
    """Return the note on the board, empty if there is none."""
    try:
        return board.read()
    except (OSError, RuntimeError):
        return "the process that coordinates this run has ended, so this one ends too"


def _end(board, error):
    """End this process after an error of its own, or one caused by the failure of another process."""
    note = _look(board)
    if note and not isinstance(error, UserError):  # a collective broke because its partner is gone
        _leave(board, f"error: {note}", 1)
    code, text = 1, "".join(traceback.format_exception(error))
    if isinstance(error, UserError):
        code, text = 2, f"error: {error}"
    if isinstance(error, SystemExit):
        code, text = error.code if isinstance(error.code, int) else 1, str(error.code)
    with contextlib.suppress(OSError, RuntimeError):
        board.post(f"process {board.process} failed, see its message; this one ends too")
    _leave(board, text, code)


def _leave(board, text, code):
    """Print and end, the keeper last, skipping Python's exit handlers, which may wait for other processes."""
    print(text.rstrip(), file=sys.stderr, flush=True)
    sys.stdout.flush()
    deadline = time.monotonic() + KEEPER_SECONDS
    with contextlib.suppress(OSError, RuntimeError):
        board.end()
        while board.keeper and time.monotonic() < deadline and not board.all_end():
            time.sleep(POLL_SECONDS)
    if board.keeper:
        time.sleep(POLL_SECONDS)  # from the announcement to the end
    os._exit(code)
