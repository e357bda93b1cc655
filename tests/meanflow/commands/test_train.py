"""The loop of both trainers, with a stand-in for each thing that it works with."""

import math

import pytest

from meanflow.commands import train
from meanflow.commands.train import Run, Termination, Window, closing, loop
from meanflow.config import options
from meanflow.errors import UserError


class StandIns:
    """Everything a run works with; it records what is called, in order."""

    def __init__(self):
        self.calls, self.active = [], False
        self.loader = self.checkpoints = self.log = self

    def __next__(self):
        return "batch"

    def get_state(self):
        return "position"

    def save(self, state, progress):
        self.calls.append(("save", state, progress["pending"]))

    def wait(self):
        self.calls.append("wait")

    def note(self, step, **changes):
        self.calls.append(("note", step, changes))

    def write_notes(self):
        self.calls.append("write_notes")

    def rewind(self, step, wanted):
        self.calls.append(("rewind", step, wanted))

    def write(self, step, values):
        self.calls.append(("write", step, values))

    def close(self):
        self.calls.append("close")


@pytest.fixture
def stand_ins():
    return StandIns()


def run_loop(stand_ins, reports=(), progress=None, step=0, post=None, **changes):
    """Run the loop of a state that is its step's number; returns the last one."""
    config = options.get_config()
    config.train.update({"steps": 4, "checkpoint_every": 2, "log_every": 100, "checkpoint_at_start": False} | changes)
    run = Run(config, stand_ins, stand_ins, stand_ins, Window(list), list(reports), None)
    run.resume(step, progress)
    stand_ins.calls.clear()

    def train_step(state, batch, stage):
        assert batch == "batch"
        return state + 1, {"loss": 1.0, "grad_norm": 0.5}

    return loop(run, train_step, step, step, Termination(post), lambda metrics: None)


def test_reports_are_made_while_the_state_is_written(stand_ins):
    """Nothing waits for the save, whose checkpoint says that its reports are pending until they are done."""
    reports = [(2, lambda step, state, log: stand_ins.calls.append(("report", step, state)))]
    assert run_loop(stand_ins, reports) == 4
    assert [call for call in stand_ins.calls if call != "write_notes"] == [
        ("save", 2, True), ("report", 2, 2), ("note", 2, {"pending": False}),
        ("save", 4, True), ("report", 4, 4), ("note", 4, {"pending": False}),
    ]  # fmt: skip
    assert stand_ins.calls.count("write_notes") == 4  # one a step: a save may end at any time


def test_a_report_that_fails_waits_for_the_save(stand_ins):
    """Also in one of several processes, where nothing is closed after an error."""

    def fail(step, state, log):
        raise UserError("no room")

    with pytest.raises(UserError, match="no room"):
        run_loop(stand_ins, [(2, fail)])
    assert stand_ins.calls == ["write_notes", ("save", 2, True), "wait"]


def test_pending_reports_are_made_first(stand_ins):
    made = []
    progress = {"loader": "", "window": [], "pending": True}
    run_loop(stand_ins, [(2, lambda step, *_: made.append(step)), (3, lambda *_: made.append("no"))], progress, step=2,
             steps=2)  # fmt: skip
    assert made == [2] and stand_ins.calls == [("note", 2, {"pending": False})]


def test_a_run_that_is_asked_to_stop_saves_and_leaves_its_reports(stand_ins):
    answers = iter([False, True, True, True])
    reports = [(1, lambda step, *_: stand_ins.calls.append(("report", step)))]
    state = run_loop(stand_ins, reports, post=lambda asked: lambda: next(answers), checkpoint_every=100)
    assert state == 3  # all read after step 3 what was posted after step 2
    assert stand_ins.calls[-1] == ("save", 3, True) and ("report", 2) in stand_ins.calls
    assert ("report", 3) not in stand_ins.calls


@pytest.mark.parametrize(("alone", "closed"), [(True, True), (False, False)])
def test_what_is_closed_after_an_error(stand_ins, alone, closed):
    run = Run(options.get_config(), stand_ins, stand_ins, stand_ins, Window(list), [], None)
    with pytest.raises(ValueError, match="the step"), closing(run, alone):
        raise ValueError("the step")
    assert ("close" in stand_ins.calls) == closed


def test_a_window_means_and_begins_anew():
    window = Window(lambda metrics: [{name: float(a) for name, a in m.items()} for m in metrics])
    for step, loss in ((1, "1.0"), (2, "3.0")):
        window.add(step, {"loss": loss, "grad_norm": "2.0"})
    assert window.close() == {"loss": 2.0, "grad_norm": 2.0} and window.steps == []


@pytest.mark.parametrize("name", ["loss", "grad_norm"])
def test_a_window_names_the_first_step_that_is_not_finite(name):
    window = Window(list)
    for step in (1, 2, 3):
        window.add(step, {"loss": 1.0, "grad_norm": 1.0} | ({name: math.nan} if step > 1 else {}))
    with pytest.raises(UserError, match="the loss of step 2 is .*; the latest checkpoint predates it"):
        window.check()


def test_one_process_asks_its_own_signals(monkeypatch):
    monkeypatch.setattr(train.signals, "asked", lambda: True)
    assert Termination(None).requested()
