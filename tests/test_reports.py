"""Reports on the way, such as evaluations, that fail or are not begun: they cost no checkpoint, and are made later."""

import json
import signal
import socket

import pytest

from jax_impl import checkpoints as jax_checkpoints
from torch_impl import checkpoints as torch_checkpoints

TRAINERS = {"jax": "jax_impl.main", "torch": "torch_impl/train.py"}
MARKERS = {"jax": jax_checkpoints.MARKER, "torch": torch_checkpoints.MARKER}
RUN = {"train.evaluate_every": 2, "evaluation.num_samples": 10, "train.log_every": 2, "method.guidance": False}


def logged(workdir):
    """Return (step, whether it is of the training) of each line of the log."""
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], "loss" in line) for line in lines]


def whole(steps, every):
    """Return the same of an unbroken run."""
    return [(step, of_training) for step in range(every, steps + 1, every) for of_training in (True, False)]


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_report_that_fails(in_both, launcher, options, tmp_path, processes):
    """Its step is saved all the same; the run goes on with all reports of that step, once the mistake is mended."""
    steps = {"train.steps": 4, "train.checkpoint_every": 2, "train.snapshot_every": 2}

    def scenario(framework):
        workdir = tmp_path / framework
        command = (TRAINERS[framework], *options(RUN | steps), f"--workdir={workdir}")
        workdir.mkdir()
        (workdir / "snapshots").touch()  # where their directory belongs
        first, *others = [launcher.start(*command)] if processes == 1 else launcher.start_two(framework, *command)
        assert first.wait() == 2 and "snapshots" in first.stderr.splitlines()[-1], first.stderr
        assert first.stderr.count("million parameters") == 1
        assert f"hosts      1, with processes: {socket.gethostname()} {processes}" in first.stderr
        for other in others:
            assert other.wait() == 1, other.stderr
            assert "million parameters" not in other.stderr  # the first process says what holds for all
        assert (workdir / "checkpoints" / framework / "2" / MARKERS[framework]).is_file(), first.stderr
        (workdir / "snapshots").unlink()
        again = launcher.run(*command)
        assert again.wait() == 0 and "resuming from step 2" in again.stderr, again.stderr
        assert logged(workdir) == whole(4, 2)
        assert sorted(path.name for path in (workdir / "snapshots").iterdir()) == ["2", "4"]
        before = (workdir / "metrics.jsonl").read_text()
        assert launcher.run(*command).wait() == 0
        assert (workdir / "metrics.jsonl").read_text() == before  # there is nothing left to do

    in_both(scenario)


@pytest.mark.slow
def test_a_run_that_is_stopped_leaves_its_reports_for_later(in_both, launcher, options, tmp_path):
    """There may be no time for an evaluation, even if one is due."""
    steps = {"train.steps": 40, "train.checkpoint_every": 1000, "train.log_every": 1, "train.evaluate_every": 1}

    def scenario(framework):
        workdir = tmp_path / framework
        command = (TRAINERS[framework], *options(RUN | steps), f"--workdir={workdir}")
        first = launcher.start(*command)
        first.wait_for(workdir / "metrics.jsonl")
        first.send(signal.SIGTERM)
        assert first.wait() == 0, first.stderr
        last = int(first.stderr.partition("asked to stop: saved step ")[2].split()[0])
        assert logged(workdir) == whole(last, 1)[:-1]
        assert launcher.run(*command).wait() == 0
        assert logged(workdir) == whole(40, 1)

    in_both(scenario)
