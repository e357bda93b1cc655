"""A work directory belongs to one run at a time, and to none once its process is dead."""

import contextlib
import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from configs import digits
from meanflow.config import locks
from meanflow.config.workdir import check_workdir, open_workdir
from meanflow.errors import UserError

HOLD = """
import os, sys, time
from meanflow.config import locks
lock = locks.Lock(sys.argv[1])
if sys.argv[2] == "fork" and os.fork() == 0:
    print(os.getpid(), flush=True)
    time.sleep(100)
    os._exit(0)
if sys.argv[2] == "alone":
    print(os.getpid(), flush=True)
time.sleep(100)
"""


@pytest.fixture
def hold(tmp_path):
    """Return a function (how) that starts a process which holds the lock of tmp_path; it returns a process id."""
    started = []

    def start(how):
        command = [sys.executable, "-c", HOLD, str(tmp_path), how]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True))
        return started[-1], int(started[-1].stdout.readline())

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def take(directory):
    """Return the message if the lock is held, "" otherwise; the lock is released again."""
    try:
        locks.Lock(directory).close()
    except UserError as error:
        return str(error)
    return ""


def test_a_second_process_is_refused_and_told_of_the_first(tmp_path, hold):
    process, pid = hold("alone")
    message = take(tmp_path)
    assert f"in use by another run (process {pid} on {os.uname().nodename}, since 20" in message
    assert "\n" not in message
    assert take(tmp_path) == message  # asking does not release it
    process.kill()
    process.wait()
    assert not take(tmp_path)


def test_a_forked_child_that_outlives_the_run_does_not_hold_the_lock(tmp_path, hold):
    process, child = hold("fork")
    assert take(tmp_path)
    process.kill()
    process.wait()
    os.kill(child, 0)  # it is still there
    assert not take(tmp_path)


def test_a_child_that_ends_does_not_release_the_lock(tmp_path, hold):
    _, child = hold("fork")
    os.kill(child, signal.SIGKILL)
    time.sleep(0.1)
    assert take(tmp_path)


def test_the_same_process_is_refused_too(tmp_path):
    with locks.Lock(tmp_path):
        assert "is already in use by this process" in take(tmp_path)
        assert "is already in use by this process" in take(tmp_path)
    assert not take(tmp_path)


def test_a_lock_that_cannot_be_written(tmp_path):
    (tmp_path / ".lock").mkdir()
    assert "cannot write" in take(tmp_path) and "Choose a directory you can write" in take(tmp_path)


def test_a_damaged_file_still_locks(tmp_path, hold):
    hold("alone")
    (tmp_path / ".lock").write_bytes(b"\xff{")
    assert "in use by another run (another process)" in take(tmp_path)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_file_systems_without_locks(tmp_path, monkeypatch, number, caplog):
    def fail(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "lockf", fail)
    with locks.Lock(tmp_path), locks.Lock(tmp_path):
        pass
    assert not take(tmp_path)


def test_open_workdir_takes_the_lock_before_it_writes(tmp_path, hold):
    hold("alone")
    with pytest.raises(UserError, match="in use by another run"):
        open_workdir(tmp_path, digits.get_config(), "jax")
    assert not (tmp_path / "config.json").exists()
    with pytest.raises(UserError, match="in use by another run"):
        check_workdir(tmp_path, digits.get_config(), "jax", alone=True)
    check_workdir(tmp_path, digits.get_config(), "jax")  # this process may be of the same run


def test_a_refused_config_releases_the_lock(tmp_path):
    config = digits.get_config()
    open_workdir(tmp_path, config, "torch").close()
    with open_workdir(tmp_path, config, "torch") as lock:
        holder = json.loads((tmp_path / ".lock").read_text())
        assert lock.path == tmp_path / ".lock" and holder["pid"] == os.getpid()
    config.model.depth = 7
    with pytest.raises(UserError, match="another config"):
        open_workdir(tmp_path, config, "torch")
    assert not take(tmp_path)
