"""A process that fails: in which order it leaves its note, prints and ends."""

import contextlib
import threading

import pytest

from meanflow.commands import processes
from meanflow.errors import UserError


class Ended(BaseException):
    """In place of the end of the process."""


@pytest.fixture
def board(monkeypatch):
    """Return a function (keeper, note) -> a board, and the list of what happened."""
    events, answers = [], iter([False, False, True])

    def end(code):
        events.append(f"exit {code}")
        raise Ended

    def make(keeper, note=""):
        def all_end():
            events.append("asked")
            return next(answers)

        return processes.Board(
            0, lambda note: events.append("posted"), lambda: note, lambda: events.append("ends"), all_end, keeper
        )

    monkeypatch.setattr(processes.os, "_exit", end)
    monkeypatch.setattr(processes, "POLL_SECONDS", 0.01)
    return make, events


def fail(board):
    with pytest.raises(Ended), processes.ending_together(board, lambda: None):
        raise UserError("bad")


def test_the_keeper_of_the_board_ends_last(board):
    """A process that compiles sees the note late, and JAX aborts it if the coordinator is gone by then."""
    make, events = board
    fail(make(keeper=True))
    assert events == ["posted", "ends", "asked", "asked", "asked", "exit 2"]


def test_any_other_process_ends_at_once(board, capsys):
    make, events = board
    fail(make(keeper=False))
    assert events == ["posted", "ends", "exit 2"]
    assert capsys.readouterr().err == "error: bad\n"


def test_the_keeper_waits_no_longer_than_it_must(board, monkeypatch):
    make, events = board
    monkeypatch.setattr(processes, "KEEPER_SECONDS", 0.0)
    fail(make(keeper=True))
    assert events == ["posted", "ends", "exit 2"]


def test_an_error_that_another_process_caused_is_not_shown(board, capsys):
    make, events = board
    with pytest.raises(Ended), processes.ending_together(make(keeper=False, note="process 1 failed"), lambda: None):
        raise RuntimeError("connection reset")
    assert events == ["ends", "exit 1"]
    assert capsys.readouterr().err == "error: process 1 failed\n"


def test_two_processes_end_in_order(monkeypatch):
    """JAX aborts a process whose coordinator is gone, so that it neither prints its line nor ends with exit code 1."""
    notes, ends, left = [], set(), []

    def leave(code):
        left.append(code)
        raise SystemExit

    monkeypatch.setattr(processes, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(processes, "GRACE_SECONDS", 0.2)
    monkeypatch.setattr(processes.os, "_exit", leave)
    boards = [
        processes.Board(
            i, notes.append, lambda: "".join(notes), lambda i=i: ends.add(i), lambda: len(ends) == 2, keeper=i == 0
        )
        for i in range(2)
    ]

    def run_other():
        with contextlib.suppress(SystemExit):
            processes._watch(boards[1], threading.Event())

    watch = threading.Thread(target=run_other)
    watch.start()
    with pytest.raises(SystemExit):
        processes._end(boards[0], UserError("it failed"))
    watch.join()
    assert left == [1, 2]
