"""Runs a function as several processes would, in threads that gather among themselves."""

import contextlib
import functools
import threading
from concurrent import futures

from meanflow.process_group import ProcessGroup

TIMEOUT = 30.0  # seconds for one process to wait for the others


def run(num, function, everywhere=False):
    """Return what function(group) returns in each of `num` processes; an error in one ends them all.

    everywhere: what is gathered reaches all processes, not only the first.
    """
    barrier, parts = threading.Barrier(num, timeout=TIMEOUT), [b""] * num

    def gather(process, part):
        parts[process] = part
        barrier.wait()
        every = list(parts)
        barrier.wait()  # before anyone's next part
        return every if everywhere or not process else []

    def one(process):
        with contextlib.ExitStack() as unless_done:
            unless_done.callback(barrier.abort)
            result = function(ProcessGroup(process, num, functools.partial(gather, process)))
            unless_done.pop_all()
        return result

    with futures.ThreadPoolExecutor(num) as pool:
        return list(pool.map(one, range(num)))
