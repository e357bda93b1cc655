"""The command line: what is wrong on it becomes one line and exit code 2."""

import os
import shutil
import subprocess
import sys

import pytest

PROGRAM = """
'''A program.'''
from meanflow.config import checks, flags
def main():
    c = checks.check(flags.config())
    print(c.train.steps, c.sample.times, flags.workdir())
flags.run(main)
"""
CONFIG = "--config=configs/digits.py"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("flags") / "program.py"
    path.write_text(PROGRAM)

    def run(*argv, **env):
        command = [sys.executable, path, *argv]
        return subprocess.run(command, capture_output=True, text=True, timeout=100, env=os.environ | env)

    return run


def test_overrides_reach_the_config(run):
    result = run(CONFIG, "--config.train.steps=7", "--config.sample.times=(1.0,0.5,0.0)", "--workdir=/x/y")
    assert result.stdout == "7 (1.0, 0.5, 0.0) /x/y\n"
    assert result.returncode == 0


@pytest.mark.parametrize("argv", [["--config=~/a.py:unet"], ["--config", "~/a.py:unet"], ["-config=~/a.py:unet"]])
def test_a_config_file_in_the_home_directory(run, argv, tmp_path):
    shutil.copy("configs/digits.py", tmp_path / "a.py")
    result = run(*argv, "--workdir=~/x", HOME=str(tmp_path))
    assert result.stdout == f"500 () {tmp_path}/x\n", result.stderr


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "--config is missing"),
        ([CONFIG], "--workdir is missing"),
        (["--config=configs/no.py"], "there is no config file configs/no.py"),
        ([CONFIG, "--config.train.stepz=7"], "there is no option config.train.stepz"),
        ([CONFIG, "--config.train.steps=many"], "config.train.steps=many"),
        (["--config=configs/meanflow_imagenet.py:b5"], "no variant 'b5'"),
        (["--config", "configs/no.py"], "there is no config file configs/no.py"),
        (["--config=configs/digits.py:unet:x"], "no variant 'unet:x'"),
        (["--config=README.md"], "--config=README.md is not a config file"),
        (["--config=~nobody_of_this_name/x.py"], "no home directory ~nobody_of_this_name"),
        ([CONFIG, "--workdir=gs://bucket/x"], "is not a local path"),
        ([CONFIG, "--workdir=README.md"], "is a file"),
        ([CONFIG, "--config"], "there is no config file"),
        ([CONFIG, "--colour=blue"], "Unknown command line flag 'colour'"),
        ([CONFIG, "train"], "unexpected argument 'train'"),
    ],
)
def test_mistakes_are_named_without_a_traceback(run, argv, message):
    result = run(*argv)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert len([line for line in result.stderr.splitlines() if line.startswith("error: ")]) == 1


def test_help_tells_the_flags(run):
    result = run("--help")
    assert result.returncode == 0
    assert "A program." in result.stdout and "--workdir" in result.stdout and "--config" in result.stdout


def test_a_config_file_that_python_cannot_read(run, tmp_path):
    (tmp_path / "a.py").write_text("x = 1\ndef get_config(:\n")
    result = run(f"--config={tmp_path}/a.py")
    assert result.returncode == 2 and result.stderr == f"error: {tmp_path}/a.py, line 2: invalid syntax\n"
