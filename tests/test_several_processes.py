"""Several processes of one run: signals to all of them, and one that fails."""

import os
import pathlib
import re
import signal
import time

import numpy as np
import pytest

from jax_impl import checkpoints as jax_checkpoints
from torch_impl import checkpoints as torch_checkpoints

SCRIPT = pathlib.Path(__file__).with_name("fail_at.py")
TRAINERS = {"jax": "jax_impl.main", "torch": "torch_impl/train.py"}
READ_WEIGHTS = {"jax": jax_checkpoints.read_weights, "torch": torch_checkpoints.read_weights}
SIGNALS = {"jax": signal.SIGUSR1, "torch": signal.SIGTERM}  # test_resume.py has them the other way round
RUN = {"train.steps": 150, "train.checkpoint_every": 1000, "train.log_every": 7, "method.guidance": False}
TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc_per_node=2", "--shutdown-timeout=300")
SECONDS = 20.0  # in which all processes have ended after one failed; on a machine that is busy with other tests


@pytest.fixture
def start(launcher, options, tmp_path):
    """Return a function (framework, title, changes) -> the commands of two processes, under torchrun in PyTorch."""

    def run(framework, title, **changes):
        flags = (TRAINERS[framework], *options(RUN | changes), f"--workdir={tmp_path / framework / title}")
        if framework == "torch":
            return [launcher.start(*TORCHRUN, *flags)]
        return launcher.start_two(framework, *flags)

    return run


def family(pid):
    """Return a process and all that it started, and those started."""
    children = []
    for stat in pathlib.Path("/proc").glob("[0-9]*/stat"):
        try:
            own, parent = int(stat.parent.name), int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if parent == pid:
            children += family(own)
    return [pid, *children]


def assert_success(commands):
    for command in commands:
        assert command.wait() == 0, command.stderr


@pytest.mark.slow
def test_a_signal_to_every_process_of_a_run_saves(in_both, start, tmp_path):
    """In the middle of a log window, with processes that load data.  The run goes on as one without interruption."""

    def scenario(framework):
        unbroken, broken = tmp_path / framework / "unbroken", tmp_path / framework / "broken"
        assert_success(start(framework, "unbroken"))
        commands = start(framework, "broken", **{"data.num_workers": 2})
        log = broken / "metrics.jsonl"
        commands[0].wait_for(log)
        commands[0].wait_until(lambda: len(log.read_text().splitlines()) >= 2 or commands[0].poll() is not None)
        for pid in [pid for command in commands for pid in family(command.pid)]:
            os.kill(pid, SIGNALS[framework])
        for command in commands:
            assert framework == "torch" or command.wait() == 0, command.stderr
            assert command.wait() is not None and "via 9" not in command.stderr, command.stderr  # torchrun's words
        saved = {int(step) for command in commands for step in re.findall(r"saved step (\d+)", command.stderr)}
        assert len(saved) == 1 and 14 <= min(saved) < RUN["train.steps"], commands[0].stderr
        commands = start(framework, "broken")
        assert_success(commands)
        assert f"resuming from step {min(saved)}" in commands[0].stderr
        assert log.read_text() == (unbroken / "metrics.jsonl").read_text()
        for ema in (-1, 0, 1):
            one, other = (READ_WEIGHTS[framework](workdir, ema)[1] for workdir in (broken, unbroken))
            for name in one:
                np.testing.assert_array_equal(one[name], other[name], err_msg=name)

    in_both(scenario)


@pytest.mark.parametrize("kind", ["user", pytest.param("other", marks=pytest.mark.slow)])
def test_a_process_that_fails_ends_all(in_both, launcher, options, tmp_path, kind):
    """In the third batch of process 1, after a save that is still under way.  The others do not hide its message."""

    def scenario(framework):
        flags = options(RUN | {"train.checkpoint_every": 1, "data.prefetch": 0})
        arguments = (SCRIPT, framework, 1, 4, kind, *flags, f"--workdir={tmp_path / framework}")
        first, second = launcher.start_two(framework, *arguments)
        assert second.wait() == (2 if kind == "user" else 1), second.stderr
        began = time.monotonic()
        assert first.wait() == 1, first.stderr
        assert time.monotonic() - began < SECONDS
        expected = "error: this batch is bad" if kind == "user" else "ValueError: this step is bad"
        assert second.stderr.splitlines()[-1] == expected
        assert first.stderr.splitlines()[-1] == "error: process 1 failed, see its message; stopping this one too"
        assert "Traceback" not in first.stderr + (second.stderr if kind == "user" else "")

    in_both(scenario)


@pytest.mark.slow
def test_a_process_that_fails_at_the_start_ends_all(in_both, launcher, options, tmp_path):
    """Process 0, which keeps the store of all, while the other waits for it."""

    def scenario(framework):
        flags = (TRAINERS[framework], *options(RUN), f"--workdir={tmp_path / framework}")
        missing = ["--config.train.load_from=missing.safetensors"]
        first, second = launcher.start_two(framework, *flags, own=(missing, []))
        assert first.wait() == 2, first.stderr
        began = time.monotonic()
        assert second.wait() == 1, second.stderr
        assert time.monotonic() - began < SECONDS
        assert first.stderr.splitlines()[-1].startswith("error: there is no missing.safetensors")
        assert second.stderr.splitlines()[-1] == "error: process 0 failed, see its message; stopping this one too"
        assert "Traceback" not in first.stderr + second.stderr

    in_both(scenario)


@pytest.mark.slow
def test_a_process_that_fails_ends_an_evaluation(in_both, launcher, options, tmp_path):
    """The other waits for its samples."""
    commands = {"jax": "jax_impl.evaluate", "torch": "torch_impl/evaluate.py"}

    def scenario(framework):
        workdir = f"--workdir={tmp_path / framework}"
        assert_success([launcher.start(TRAINERS[framework], *options(RUN | {"train.steps": 1}), workdir)])
        first, second = launcher.start_two(framework, commands[framework], workdir, own=((), ("--omegas=1,2",)))
        assert second.wait() == 2, second.stderr
        began = time.monotonic()
        assert first.wait() == 1, first.stderr
        assert time.monotonic() - began < SECONDS
        assert first.stderr.splitlines()[-1] == "error: process 1 failed, see its message; stopping this one too"
        assert "Traceback" not in first.stderr + second.stderr

    in_both(scenario)
