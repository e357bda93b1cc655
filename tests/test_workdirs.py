"""Runs and their work directories, as commands: one run at a time, wherever it is."""

import shutil
import signal

import pytest

from meanflow.config.workdir import read_workdir
from meanflow.data import couplings

TRAINERS = {"jax": "jax_impl.main", "torch": "torch_impl/train.py"}


@pytest.mark.slow
def test_a_second_run_in_the_same_directory_is_refused(in_both, launcher, options, tmp_path):
    """Alone or in two processes, none of which waits for another; the first goes on."""
    run = options({"train.steps": 100_000, "train.log_every": 10})

    def scenario(framework):
        workdir = tmp_path / framework
        argv = TRAINERS[framework], *run, f"--workdir={workdir}"
        first = launcher.start(*argv)
        first.wait_for(workdir / "metrics.jsonl")
        for second in (launcher.start(*argv), *launcher.start_two(framework, *argv)):
            assert second.wait() == 2, second.stderr
            assert f"{workdir} is in use by another run (process {first.pid} on " in second.stderr.splitlines()[-1]
            assert "Traceback" not in second.stderr
        assert first.poll() is None
        first.send(signal.SIGTERM)
        assert first.wait() == 0, first.stderr
        assert launcher.run(*argv[:-1], "--config.train.steps=1", argv[-1]).poll() == 0

    in_both(scenario)


@pytest.mark.parametrize("name", ["~/runs/x", pytest.param("x[1]", marks=pytest.mark.slow), "übung/a b=c,d*"])
def test_names_of_directories(launcher, options, tmp_path, name, datasets_dir):
    """In PyTorch; what JAX does with them is tested with its checkpoints."""
    flag = f"--workdir={name if name[0] == '~' else tmp_path / name}"
    command = launcher.run("torch_impl/train.py", *options({"train.steps": 1}), flag, HOME=str(tmp_path))
    assert command.poll() == 0, command.stderr
    assert read_workdir(tmp_path / name.removeprefix("~/")).train.steps == 1
    command = launcher.run("torch_impl/sample.py", flag, "--num_samples=2", HOME=str(tmp_path))
    assert command.poll() == 0, command.stderr


@pytest.mark.slow
def test_data_that_moved(in_both, launcher, options, datasets_dir, tmp_path):
    """A run goes on with the same dataset elsewhere, and with no other in its place."""

    def scenario(framework):
        one, other, workdir = (tmp_path / framework / name for name in ("one", "other", "run"))
        shutil.copytree(f"{datasets_dir}/digits/1.0.0", one)

        def train(steps, data):
            changes = {"train.steps": steps, "data.name": data, "evaluation.dataset": "digits"}
            return launcher.run(TRAINERS[framework], *options(changes), f"--workdir={workdir}")

        command = train(1, one)
        assert command.poll() == 0, command.stderr
        one.rename(other)
        command = train(2, other)
        assert command.poll() == 0 and "resuming from step 1" in command.stderr, command.stderr
        tiny = couplings.Plan((8, 8, 1), 1437, 10, 0, shard_size=2000, batch_size=1437)
        couplings.make(one, tiny, lambda noise, labels: noise, {})
        command = train(3, one)
        assert command.poll() == 2
        line = command.stderr.splitlines()[-1]
        assert f"{workdir} was written with config.data.name '{other}'; this config names '{one}', which holds" in line

    in_both(scenario)
