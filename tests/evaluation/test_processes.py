"""Processes that end together: who leaves first."""

import contextlib
import threading

import pytest

from configs.errors import UserError
from evaluation import processes


def test_the_one_that_keeps_the_board_leaves_last(monkeypatch):
    """JAX aborts a process whose coordinator is gone, so that it neither prints its line nor ends with exit code 1."""
    notes, left = [], []

    def leave(code):
        left.append(code)
        raise SystemExit

    monkeypatch.setattr(processes, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(processes, "GRACE_SECONDS", 0.2)
    monkeypatch.setattr(processes.os, "_exit", leave)
    boards = [processes.Board(i, notes.append, lambda: "".join(notes), keeper=i == 0) for i in range(2)]

    def run_other():
        with contextlib.suppress(SystemExit):
            processes._watch(boards[1], threading.Event())

    watch = threading.Thread(target=run_other)
    watch.start()
    with pytest.raises(SystemExit):
        processes._end(boards[0], UserError("it failed"))
    watch.join()
    assert left == [1, 2]
