"""Processes started under shelter survive the signals that stop a run, and do not import its main module."""

import multiprocessing
import signal
import subprocess
import sys
from multiprocessing import spawn

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
