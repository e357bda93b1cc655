"""What a command says of its work, and in which processes."""

import pytest
from absl import logging

from meanflow import console_log


@pytest.fixture
def verbosity(monkeypatch):
    """Leave the log as it was."""
    before = logging.get_verbosity()
    monkeypatch.setattr(console_log, "_silent", [])
    yield
    logging.set_verbosity(before)


def test_one_process_of_a_run_speaks(verbosity, capsys):
    console_log.say("left out a head")
    console_log.show_only_warnings()
    console_log.say("left out a head")
    assert capsys.readouterr().err == "left out a head\n"
