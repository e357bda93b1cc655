"""Processes that a run starts: they survive the signals that ask it to end, but not the run itself."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from multiprocessing import connection, parent_process, resource_tracker, spawn

from meanflow.signals import STOP


@contextlib.contextmanager
def sheltered() -> Iterator[None]:
    """Block the signals, and Ctrl-C, in this thread, so that processes started inside inherit that.

    These do not import the main module, as spawned processes otherwise do: it would cost each the imports of a trainer.
    """
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, (*STOP, signal.SIGINT))
    prepare = spawn.get_preparation_data
    try:
        resource_tracker.ensure_running()  # a helper of multiprocessing; starting it unblocks SIGTERM and SIGINT
        signal.pthread_sigmask(signal.SIG_BLOCK, (*STOP, signal.SIGINT))
        spawn.get_preparation_data = lambda name: _without_main(prepare(name))
        yield
    finally:
        spawn.get_preparation_data = prepare
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def end_with_parent(*_: int) -> None:
    """End this process as soon as the one that started it ends, in whatever way.  Call in a child process."""
    parent = parent_process()
    if parent is not None:
        args = ([parent.sentinel],)
        threading.Thread(target=_end_after, args=args, name="end_with_parent", daemon=True).start()


def _without_main(preparation: dict) -> dict:
    return {key: value for key, value in preparation.items() if not key.startswith("init_main_from_")}


def _end_after(sentinels):
    connection.wait(sentinels)
    os._exit(1)
