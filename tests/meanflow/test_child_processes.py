"""Processes started under shelter survive the signals that stop a run, and do not import its main module."""

import multiprocessing
import pathlib
import signal
import subprocess
import sys
import time
from multiprocessing import spawn

import pytest

from meanflow import child_processes, signals


def test_processes_under_shelter_survive_ctrl_c_too():
    with child_processes.sheltered():
        code = "import sys; print(flush=True); sys.stdin.read()"  # until its input ends
        process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        process.stdout.readline()  # pyright: ignore
    process.send_signal(signal.SIGINT)
    process.communicate()
    assert process.returncode == 0
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()) & {signal.SIGINT, *signals.STOP}


def test_processes_under_shelter_do_not_import_the_main_module(monkeypatch, tmp_path):
    """Which would fail here."""
    main = tmp_path / "main.py"
    main.write_text("raise SystemExit(3)")
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    monkeypatch.setattr(sys.modules["__main__"], "__file__", str(main), raising=False)
    process = multiprocessing.get_context("spawn").Process(target=sum, args=((),))
    with child_processes.sheltered():
        process.start()
    process.join()
    assert process.exitcode == 0
    assert spawn.get_preparation_data("other")["init_main_from_path"] == str(main)


@pytest.mark.parametrize("end", ["os.kill(os.getpid(), signal.SIGKILL)", "os._exit(0)"])
def test_children_end_with_the_process_that_started_them(end):
    """However it ended: a kill leaves no orphans."""
    code = f"""
import multiprocessing, os, signal, time
from meanflow import child_processes
def sleep():
    child_processes.end_with_parent()
    time.sleep(60)
process = multiprocessing.get_context("fork").Process(target=sleep)
process.start()
print(process.pid, flush=True)
{end}
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        child = int(parent.stdout.readline())  # pyright: ignore
        assert parent.wait() in (0, -signal.SIGKILL)
        start = time.monotonic()
        while is_running(child):
            assert time.monotonic() - start < 30
            time.sleep(0.01)


def is_running(pid):
    """Return whether there is such a process, excluding ended ones that nobody has waited for."""
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
