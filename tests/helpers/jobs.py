"""What the tests of parity's processes run in them; a module that they can import, and that imports nothing."""

import contextlib
import os
import pathlib
import signal
import time


@contextlib.contextmanager
def prepare(directory):
    """Give a function of jobs: NAME raises, is killed, waits, or returns what it knows of its process."""

    def run(name):
        if name == "raises":
            raise ZeroDivisionError("of the job")
        if name == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if name == "waits":
            pathlib.Path(directory, str(os.getpid())).touch()
            time.sleep(600)
        return name.upper(), os.getpid(), os.environ["OMP_NUM_THREADS"]

    yield run
