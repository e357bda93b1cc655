"""Runs and their work directories, as commands: one run at a time, wherever it is."""

import signal

import pytest

from configs.resolve import read_workdir

TRAINERS = {"jax": "jax_impl.main", "torch": "torch_impl/train.py"}


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


@pytest.mark.parametrize("name", ["~/runs/x", "x[1]", "übung/a b=c,d*"])
def test_names_of_directories(launcher, options, tmp_path, name, datasets_dir):
    """In PyTorch; what JAX does with them is tested with its checkpoints."""
    flag = f"--workdir={name if name[0] == '~' else tmp_path / name}"
    command = launcher.run("torch_impl/train.py", *options({"train.steps": 1}), flag, HOME=str(tmp_path))
    assert command.poll() == 0, command.stderr
    assert read_workdir(tmp_path / name.removeprefix("~/")).train.steps == 1
    command = launcher.run("torch_impl/sample.py", flag, "--num_samples=2", HOME=str(tmp_path))
    assert command.poll() == 0, command.stderr
