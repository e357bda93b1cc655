"""Processes that run jobs: every job once, groups kept together, and what becomes of errors, kills and interrupts."""

import os
import signal
import threading
import time

import jobs
import pytest

from meanflow.errors import UserError
from parity import workers


def test_a_queue_prefers_the_same_group_then_a_new_one_then_the_largest():
    queue = workers.Queue({"a": ["a1", "a2", "a3", "a4"], "b": ["b1", "b2"], "c": ["c1"]})
    assert queue.take() == ("a", "a1")
    assert queue.take() == ("b", "b1")
    assert queue.take("a") == ("a", "a2")
    assert queue.take() == ("c", "c1")
    assert queue.take("c") == ("a", "a3")
    assert [queue.take("b"), queue.take("b"), queue.take("b")] == [("b", "b2"), ("a", "a4"), None]


def test_every_job_runs_once_in_another_process_on_one_thread(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    done = list(workers.run({"a": ["x", "y"], "b": ["z"]}, 2, jobs.prepare, str(tmp_path)))
    assert {d.name: d.result[0] for d in done} == {"x": "X", "y": "Y", "z": "Z"} and len(done) == 3
    assert os.getpid() not in {d.result[1] for d in done} and {d.result[2] for d in done} == {"1"}
    assert os.environ["OMP_NUM_THREADS"] == "5" and all(d.seconds >= 0 for d in done)


def test_an_error_names_its_job(tmp_path, capfd):
    with pytest.raises(RuntimeError, match="^raises raised in its process"):
        list(workers.run({"a": ["raises", "x"]}, 1, jobs.prepare, str(tmp_path)))
    assert "ZeroDivisionError: of the job" in capfd.readouterr().err


def test_a_killed_process_names_its_job(tmp_path):
    with pytest.raises(UserError, match="^signal 9 killed the process of killed; .* fewer --jobs"):
        list(workers.run({"a": ["killed"], "b": ["x"]}, 2, jobs.prepare, str(tmp_path)))


def test_an_interrupt_ends_every_process(tmp_path):
    def interrupt():
        while not any(tmp_path.iterdir()):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        list(workers.run({"a": ["waits"]}, 1, jobs.prepare, str(tmp_path)))
    [file] = tmp_path.iterdir()
    with pytest.raises(ProcessLookupError):
        os.kill(int(file.name), 0)
