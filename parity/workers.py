"""Runs named jobs in worker processes.

Unlike `concurrent.futures`, it reports which job a process died in, and keeps a process on one group of jobs, which
share what it has compiled.  Imports are light, as every process repeats them.
"""

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from meanflow.errors import UserError

# One thread per process, as the processes already fill the cores; and none takes the whole memory of a GPU.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false",
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
}  # fmt: skip


class Done(NamedTuple):
    """A finished job."""

    name: str
    result: Any
    seconds: float


class Queue:
    """Jobs by group."""

    def __init__(self, groups: dict[str, list[str]]):
        self._waiting = {group: list(names) for group, names in groups.items() if names}
        self._untouched = set(self._waiting)

    def take(self, group: str | None = None) -> tuple[str, str] | None:
        """Return (group, name) of the next job: of `group`, else of the largest untouched group, else of the largest.

        None if there is none left.
        """
        if group not in self._waiting:
            candidates = [g for g in self._waiting if g in self._untouched] or list(self._waiting)
            if not candidates:
                return None
            group = max(candidates, key=lambda g: len(self._waiting[g]))
        self._untouched.discard(group)
        names = self._waiting[group]
        name = names.pop(0)
        if not names:
            del self._waiting[group]
        return group, name


class Worker:
    """A process and its current job."""

    def __init__(self, context, prepare: Callable, arguments: tuple):
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, prepare, arguments), daemon=True)
        self.process.start()
        theirs.close()
        self.group, self.name = None, ""

    def give(self, queue: Queue) -> bool:
        """Hand it the next job; return whether there was one."""
        job = queue.take(self.group)
        if job is not None:
            self.group, self.name = job
            self.connection.send(self.name)
        return job is not None

    def receive(self) -> Done:
        """Wait for the job and return it.  Raises UserError if it was killed, RuntimeError if the job raised."""
        try:
            return Done(self.name, *self.connection.recv())
        except (EOFError, ConnectionError) as gone:
            self.process.join()
            code = self.process.exitcode
            if code is not None and code < 0:
                raise UserError(
                    f"signal {-code} killed the process of {self.name}; if memory ran out, run with fewer --jobs"
                ) from gone
            raise RuntimeError(f"{self.name} raised in its process; the traceback is above") from gone


def run(groups: dict[str, list[str]], num_workers: int, prepare: Callable, *arguments) -> Iterator[Done]:
    """Run every job, and yield it as it ends.

    groups: names of jobs by group.  prepare: a context manager at the top of a module; every process enters
    prepare(*arguments) once and calls what it yields, (name) -> result, for each of its jobs.
    Raises UserError if a process is killed, RuntimeError if a job raises.  No process outlives the iteration.
    """
    context, queue, workers = multiprocessing.get_context("spawn"), Queue(groups), []
    try:
        with for_children():
            workers += [Worker(context, prepare, arguments) for _ in range(num_workers)]
        busy = {worker.connection: worker for worker in workers if worker.give(queue)}
        while busy:
            for connection in multiprocessing.connection.wait(list(busy)):
                worker = busy.pop(connection)
                done = worker.receive()
                if worker.give(queue):
                    busy[connection] = worker
                yield done
    finally:
        for worker in workers:
            worker.process.terminate()
        for worker in workers:
            worker.process.join()


@contextlib.contextmanager
def for_children() -> Iterator[None]:
    """Set what processes started in this context inherit: the environment, and leaving interrupts to the parent."""
    before = {name: os.environ.get(name) for name in ENVIRONMENT}
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ |= ENVIRONMENT | {"XLA_FLAGS": f"{before['XLA_FLAGS'] or ''} {ENVIRONMENT['XLA_FLAGS']}"}
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def serve(connection, prepare: Callable, arguments: tuple) -> None:
    """Run jobs as they arrive, until the other end closes."""
    with prepare(*arguments) as call:
        while True:
            try:
                name = connection.recv()
            except EOFError:
                return
            began = time.perf_counter()
            result = call(name)
            connection.send((result, time.perf_counter() - began))
