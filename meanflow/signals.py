"""Signals that ask a run to save and end: SIGTERM from schedulers and torchrun, SIGUSR1 from SLURM's --signal.

Many send them to every process of a job; `child_processes` keeps loader processes alive until the run has saved.
"""

import contextlib
import signal
import threading
from collections.abc import Iterator

STOP = (signal.SIGTERM, signal.SIGUSR1)

_received = threading.Event()


@contextlib.contextmanager
def caught() -> Iterator[None]:
    """Record signals received inside, see `asked`.  Call in the main thread, around a whole run.

    They stay blocked in this thread and, by inheritance, in its children.  A run that was asked to end ignores them
    afterwards, so that a second signal does not kill it on its way out.
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
        _received.clear()


def asked() -> bool:
    """Return whether one of the signals has come, inside `caught`."""
    return _received.is_set() or not signal.sigpending().isdisjoint(STOP)
