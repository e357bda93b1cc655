"""Runs the commands of this project as processes of their own, forked from one that has imported the libraries."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

ROOT = pathlib.Path(__file__).parents[2]
TIMEOUT = 600.0  # seconds for one command; a loaded machine needs many


class Command:
    """A running command."""

    def __init__(self, launcher, pid, directory):
        self.pid, self._launcher, self._directory = pid, launcher, directory
        self._code = None

    def poll(self):
        """Return its exit code, -N if signal N ended it, None while it runs."""
        if self._code is None:
            self._code = self._launcher.ask(poll=self.pid)
        return self._code

    def wait(self):
        """Return its exit code once it has ended."""
        self.wait_until(lambda: self.poll() is not None)
        return self._code

    def wait_until(self, condition):
        """Return once `condition()` holds; the command is killed and the test fails if that takes too long."""
        deadline = time.monotonic() + TIMEOUT
        while not condition():
            if time.monotonic() > deadline:
                os.killpg(self.pid, signal.SIGKILL)
                pytest.fail(f"no end after {TIMEOUT} s:\n{self.stderr}")
            time.sleep(0.01)

    def wait_for(self, path):
        """Return once a file is there; the test fails if the command ends without it."""
        self.wait_until(lambda: path.exists() or self.poll() is not None)
        assert path.exists(), self.stderr

    def send(self, number):
        """Send it a signal."""
        os.kill(self.pid, number)

    @property
    def stdout(self):
        """What it has printed so far."""
        return (self._directory / "stdout").read_text()

    @property
    def stderr(self):
        """What it has written to stderr so far."""
        return (self._directory / "stderr").read_text()


class Launcher:
    """Starts commands; launcher.py forks for each."""

    def __init__(self, directory, env):
        self._directory, self._count, self._lock = directory, 0, threading.RLock()
        script = [sys.executable, str(ROOT / "tests" / "helpers" / "launcher.py")]
        self._errors = open(directory / "launcher_stderr", "w")  # noqa: SIM115
        self._process = subprocess.Popen(
            script, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True, env=os.environ | env
        )
        assert self._answer() == "ready"

    def start(self, *argv, cwd=ROOT, **env):
        """Start a command: a script or a module, and its arguments."""
        with self._lock:
            directory = self._directory / str(self._count)
            self._count += 1
        directory.mkdir()
        argv, files = [str(a) for a in argv], {name: str(directory / name) for name in ("stdout", "stderr")}
        return Command(self, self.ask(argv=argv, env=env, cwd=str(cwd), **files), directory)

    def start_two(self, framework, *argv, own=((), ())):
        """Start a command in two processes, as torchrun does or by hand; return them.  own: more arguments of each."""
        return self.start_processes(framework, 2, *argv, own=own)

    def start_processes(self, framework, num, *argv, own=()):
        """Do the same in `num` processes."""
        with socket.socket() as server:
            server.bind(("localhost", 0))
            port, own = str(server.getsockname()[1]), own or [()] * num
        if framework == "torch":
            env = {"WORLD_SIZE": str(num), "MASTER_ADDR": "localhost", "MASTER_PORT": port}
            return [self.start(*argv, *own[rank], **env, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(num)]
        joined = (f"--coordinator=localhost:{port}", f"--num_processes={num}")
        return [self.start(*argv, *own[process], *joined, f"--process={process}") for process in range(num)]

    def run(self, *argv, **env):
        """Run a command to its end; return it."""
        command = self.start(*argv, **env)
        command.wait()
        return command

    def ask(self, **request):
        """Return the answer to a request."""
        with self._lock:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            return self._answer()

    def close(self):
        """End."""
        self._process.stdin.close()
        self._process.wait()
        self._errors.close()

    def _answer(self):
        line = self._process.stdout.readline()
        assert line, (self._directory / "launcher_stderr").read_text()
        return json.loads(line)
