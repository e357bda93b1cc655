"""Signals that ask a run to save and end, and child processes that outlive them.

SIGTERM comes from schedulers and torchrun, SIGUSR1 from SLURM's --signal.  Many send them to every process of a job,
so children must not die of them before the run has saved.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from multiprocessing import connection, parent_process, resource_tracker

STOP = (signal.SIGTERM, signal.SIGUSR1)

_received = threading.Event()


@contextlib.contextmanager
def caught() -> Iterator[None]:
    """Take note of the signals inside, see `asked`.  Call in the main thread, around a whole run.

    They stay blocked in this thread, which its children inherit.  A run that was asked to end ignores them afterwards,
    so that a second signal does not kill it on its way out.
    """
    _received.clear()
    handlers = {number: signal.signal(number, lambda *_: _received.set()) for number in STOP}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in handlers.items():
            ended = signal.SIG_IGN if _received.is_set() else handler
            signal.signal(number, signal.SIG_DFL if ended is None else ended)


def asked() -> bool:
    """Return whether one of the signals has come, inside `caught`."""
    return _received.is_set() or not signal.sigpending().isdisjoint(STOP)


@contextlib.contextmanager
def sheltered() -> Iterator[None]:
    """Block the signals, and Ctrl-C, in this thread, so that processes started inside inherit that."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, (*STOP, signal.SIGINT))
    try:
        resource_tracker.ensure_running()  # a helper of multiprocessing; to start it unblocks SIGTERM and SIGINT
        signal.pthread_sigmask(signal.SIG_BLOCK, (*STOP, signal.SIGINT))
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def end_with_parent(*_: int) -> None:
    """End this process as soon as the one that started it has, however that was.  Call in a child process."""
    parent = parent_process()
    if parent is not None:
        args = ([parent.sentinel],)
        threading.Thread(target=_end_after, args=args, name="end_with_parent", daemon=True).start()


def _end_after(sentinels):
    connection.wait(sentinels)
    os._exit(1)
