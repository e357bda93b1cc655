"""Signals are noted inside `caught`, by the run alone and not by its children."""

import os
import signal
import subprocess
import sys

import pytest

from meanflow import signals

SLEEP = [sys.executable, "-c", "import sys; print(flush=True); sys.stdin.read()"]  # until its input ends


@pytest.fixture(autouse=True)
def own_handlers():
    """Put back the handlers of the tests."""
    handlers = {number: signal.getsignal(number) for number in signals.STOP}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def child():
    """Start a process and wait until it runs."""
    process = subprocess.Popen(SLEEP, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    process.stdout.readline()  # pyright: ignore
    return process


@pytest.mark.parametrize("number", signals.STOP, ids=["SIGTERM", "SIGUSR1"])
def test_a_run_is_asked_and_its_children_live_on(number):
    with signals.caught():
        process = child()
        process.send_signal(number)
        assert not signals.asked()
        os.kill(os.getpid(), number)
        assert signals.asked()
        process.communicate()
        assert process.returncode == 0
    os.kill(os.getpid(), number)  # a second one, on its way out
    assert signal.getsignal(number) == signal.SIG_IGN
    assert not signals.asked()  # the next run in this process was not


def test_a_run_that_is_not_asked_leaves_the_handlers_as_they_were():
    before = [signal.getsignal(number) for number in signals.STOP]
    with signals.caught():
        pass
    assert [signal.getsignal(number) for number in signals.STOP] == before
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()) & set(signals.STOP)
