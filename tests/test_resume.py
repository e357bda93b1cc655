"""A run that is killed, stopped or damaged goes on to the result of an unbroken one, bit for bit, in both trainers."""

import json
import random
import re
import shutil
import signal
import time

import jax
import numpy as np
import pytest
import torch

from jax_impl import checkpoints as jax_checkpoints
from meanflow.config.workdir import read_workdir
from torch_impl import checkpoints as torch_checkpoints
from torch_impl import step as torch_step
from torch_impl import weights as torch_weights

TRAINERS = {"jax": "jax_impl.main", "torch": "torch_impl/train.py"}
MARKERS = {"jax": jax_checkpoints.MARKER, "torch": torch_checkpoints.MARKER}
RUN = {
    "train.steps": 60, "train.checkpoint_every": 10, "train.keep_checkpoints": 3, "train.log_every": 2,
    "train.optimizer": "adamw",
}  # fmt: skip


@pytest.fixture(scope="module")
def unbroken(launcher, options, tmp_path_factory):
    """Return {framework: work directory of a run without interruption}."""
    directory = tmp_path_factory.mktemp("unbroken")
    commands = [launcher.start(TRAINERS[f], *options(RUN), f"--workdir={directory / f}") for f in TRAINERS]
    for command in commands:
        assert command.wait() == 0, command.stderr
    return {framework: directory / framework for framework in TRAINERS}


@pytest.fixture
def start(launcher, options, tmp_path):
    """Return a function (framework) that starts the same run in tmp_path/framework."""
    return lambda framework: launcher.start(
        TRAINERS[framework], *options(RUN), f"--workdir={tmp_path / framework}"
    )  # fmt: skip


def copy_of(workdir, destination):
    """Copy a work directory.  Returns {step: checkpoint}."""
    shutil.copytree(workdir, destination, dirs_exist_ok=True)
    (checkpoints,) = (destination / "checkpoints").iterdir()
    return {int(path.name): path for path in checkpoints.iterdir()}


def state_of(framework, workdir):
    """Return {name: array} of everything in the newest checkpoint."""
    config = read_workdir(workdir)
    if framework == "jax":
        from jax_impl import checkpoints, step

        _, like = step.create_state(config, step.make_mesh(config))
        state, progress = checkpoints.Checkpoints(workdir, config).restore(like)
        arrays = checkpoints._named(state)
    else:
        from torch_impl import checkpoints, step

        like = step.create_state(config, None, torch.device("cpu"))
        state, progress = checkpoints.Checkpoints(workdir, config).restore(like)
        arrays = {jax.tree_util.keystr(path): a for path, a in jax.tree.leaves_with_path(checkpoints._named(state))}
    return {name: np.asarray(a) for name, a in arrays.items()} | {"step": state.step, "loader": progress["loader"]}


def assert_same_run(framework, found, expected):
    """Compare the newest checkpoints and the logs, exactly."""
    one, other = state_of(framework, found), state_of(framework, expected)
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)
    assert (found / "metrics.jsonl").read_text() == (expected / "metrics.jsonl").read_text()


def assert_goes_on(framework, start, workdir, expected):
    """Start the run again; it must end as the unbroken one.  Returns the step from which it went on, and its stderr."""
    command = start(framework)
    assert command.wait() == 0, command.stderr
    assert_same_run(framework, workdir, expected)
    return int(re.search(r"resuming from step (\d+)", command.stderr)[1]), command.stderr


def wait_for_lines(command, path, num):
    """Return once a log has `num` lines."""
    command.wait_for(path)
    command.wait_until(lambda: len(path.read_text().splitlines()) >= num or command.poll() is not None)


@pytest.mark.slow
def test_kill_9(in_both, start, unbroken, tmp_path):
    """After the second checkpoint has begun."""

    def scenario(framework):
        workdir = tmp_path / framework
        command = start(framework)
        wait_for_lines(command, workdir / "metrics.jsonl", 13)
        command.send(signal.SIGKILL)
        assert command.wait() == -signal.SIGKILL
        step, _ = assert_goes_on(framework, start, workdir, unbroken[framework])
        assert step in (10, 20, 30, 40, 50)

    in_both(scenario)


def test_kill_9_while_saving(in_both, start, unbroken, tmp_path):
    """As soon as an entry for step 30 appears, long before it is whole."""

    def scenario(framework):
        workdir = tmp_path / framework
        directory = workdir / "checkpoints" / framework
        command = start(framework)
        command.wait_for(directory)
        while not any(path.name.startswith("30") for path in directory.iterdir()):
            time.sleep(0.001)  # else it takes a core from the commands
        command.send(signal.SIGKILL)
        assert command.wait() == -signal.SIGKILL
        step, _ = assert_goes_on(framework, start, workdir, unbroken[framework])
        assert step <= 30

    in_both(scenario)


KILLS = 20
KILLED = {
    "train.steps": 120, "train.checkpoint_every": 3, "train.log_every": 2, "train.optimizer": "adamw",
}  # fmt: skip


def random_moment(rng, command, workdir, framework):
    """Return at a random moment of a run: as it starts, as it saves or as it trains.  Returns which of them it was."""
    checkpoints, log = workdir / "checkpoints" / framework, workdir / "metrics.jsonl"

    def wait_for_more(count, num):
        enough = count() + num
        command.wait_until(lambda: count() >= enough or command.poll() is not None)

    moment = rng.choice(["starting", "saving", "training"])
    if moment == "saving":
        seen = set()

        def saves():
            seen.update(path.name for path in checkpoints.glob("*"))
            return len(seen)

        wait_for_more(saves, rng.randint(1, 3))
        time.sleep(rng.uniform(0, 0.02))
    elif moment == "training":
        wait_for_more(lambda: len(log.read_text().splitlines()) if log.exists() else 0, rng.randint(1, 6))
    else:
        time.sleep(rng.uniform(0, 2))
    return moment


@pytest.mark.slow
def test_twenty_kills(in_both, launcher, options, tiny, tmp_path):
    """At random moments of a run that starts from other weights: it ends bit for bit as one that was never killed."""
    config = tiny()
    net = torch_step.build_net(config)
    start_from = torch_weights.to_canonical(net, dict(net.named_parameters()))
    start_from["final_layer.linear.bias"] += 1
    torch_weights.save(tmp_path / "start.safetensors", start_from, {})
    flags = options(KILLED | {"train.load_from": tmp_path / "start.safetensors"})

    def scenario(framework):
        rng, moments, resumed, unfinished = random.Random(framework), [], [], 0
        start = lambda workdir: launcher.start(TRAINERS[framework], *flags, f"--workdir={workdir}")  # noqa: E731
        expected, workdir = tmp_path / f"{framework}_unbroken", tmp_path / framework
        unbroken = start(expected)
        assert unbroken.wait() == 0, unbroken.stderr
        for _ in range(KILLS):
            command = start(workdir)
            moments.append(random_moment(rng, command, workdir, framework))
            command.send(signal.SIGKILL)
            assert command.wait() == -signal.SIGKILL, command.stderr
            resumed += re.findall(r"resuming from step (\d+)", command.stderr)
            unfinished += any(not (p / MARKERS[framework]).exists() or "tmp" in p.name
                              for p in (workdir / "checkpoints").glob("*/*"))  # fmt: skip
        command = start(workdir)
        assert command.wait() == 0, command.stderr
        assert_same_run(framework, workdir, expected)
        resumed += re.findall(r"resuming from step (\d+)", command.stderr)
        print(framework, {m: moments.count(m) for m in moments}, "unfinished saves:", unfinished, "resumed:", *resumed)

    in_both(scenario)


def test_a_signal_saves_the_step_it_has_reached(in_both, start, unbroken, tmp_path):
    """Between two log lines or not: the second half of a window is logged with its first half."""

    def scenario(framework):
        workdir = tmp_path / framework
        command = start(framework)
        wait_for_lines(command, workdir / "metrics.jsonl", 10)
        command.send({"jax": signal.SIGTERM, "torch": signal.SIGUSR1}[framework])
        assert command.wait() == 0, command.stderr
        saved = int(re.search(r"asked to stop: saved step (\d+)", command.stderr)[1])
        assert 20 <= saved < RUN["train.steps"]
        step, _ = assert_goes_on(framework, start, workdir, unbroken[framework])
        assert step == saved

    in_both(scenario)


def test_a_truncated_newest_checkpoint(in_both, start, unbroken, tmp_path):
    def scenario(framework):
        workdir = tmp_path / framework
        checkpoints = copy_of(unbroken[framework], workdir)
        assert sorted(checkpoints) == [40, 50, 60]
        for path in checkpoints[60].rglob("*"):
            if path.is_file() and (path.suffix == ".distcp" or path.parent.name == "d"):  # the files of the arrays
                path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        step, stderr = assert_goes_on(framework, start, workdir, unbroken[framework])
        assert step == 50
        assert f"cannot read checkpoint {checkpoints[60]}: " in stderr
        assert f"{framework}_damaged_60; using the one before it" in stderr
        assert (workdir / "checkpoints" / f"{framework}_damaged_60").is_dir()

    in_both(scenario)


@pytest.mark.slow
def test_foreign_things_in_the_place_of_checkpoints(in_both, start, unbroken, tmp_path):
    """A text file, and a directory of rubbish."""

    def scenario(framework):
        workdir = tmp_path / framework
        checkpoints = copy_of(unbroken[framework], workdir)
        for step in (50, 60):
            shutil.rmtree(checkpoints[step])
        checkpoints[60].write_text("rubbish")
        checkpoints[50].mkdir()
        (checkpoints[50] / MARKERS[framework]).write_text("rubbish")
        (checkpoints[50] / "notes.txt").write_text("rubbish")
        step, stderr = assert_goes_on(framework, start, workdir, unbroken[framework])
        assert step == 40
        assert f"cannot read checkpoint {checkpoints[50]}: " in stderr

    in_both(scenario)


def test_all_checkpoints_damaged(in_both, start, unbroken, tmp_path):
    """Twice: nothing may be moved, or the second start would begin a new run over the old one."""

    def scenario(framework):
        workdir = tmp_path / framework
        checkpoints = copy_of(unbroken[framework], workdir)
        log = (workdir / "metrics.jsonl").read_text()
        for path in (workdir / "checkpoints").rglob("*"):
            if path.is_file():
                path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        for _ in range(2):
            command = start(framework)
            assert command.wait() == 2, command.stderr
            assert "Traceback" not in command.stderr
            assert f"error: no checkpoint in {checkpoints[60].parent} could be read" in command.stderr
            assert all(f"cannot read checkpoint {path}: " in command.stderr for path in checkpoints.values())
        assert (workdir / "metrics.jsonl").read_text() == log

    in_both(scenario)


def test_a_full_disk(in_both, launcher, options, tmp_path):
    """Ends with one line; the first save fails, while training goes on."""
    small = {"train.steps": 8, "train.checkpoint_every": 2, "train.log_every": 2}
    limited = ("tests/helpers/full_disk.py", 30_000)  # bytes; the arrays are a tenfold of that

    def scenario(framework):
        flags = (*options(small), f"--workdir={tmp_path / framework}")
        command = launcher.start(*limited, TRAINERS[framework], *flags, JAX_ENABLE_COMPILATION_CACHE="0")
        assert command.wait() == 2, command.stderr
        assert "Traceback" not in command.stderr
        assert len(re.findall("^error: ", command.stderr, re.MULTILINE)) == 1
        last = command.stderr.splitlines()[-1]
        assert last.startswith(
            f"error: cannot save a checkpoint in {tmp_path / framework / 'checkpoints' / framework}: "
        )
        assert framework == "torch" or "File too large" in last  # PyTorch's file format forgets the reason

    in_both(scenario)


READ_WEIGHTS = {"jax": jax_checkpoints.read_weights, "torch": torch_checkpoints.read_weights}
UNET = {
    "model.name": "unet", "model.dropout": 0.2, "data.augment.prob": 0.5,
    "method.flow_fraction": 1.0,  # the JVP is in the other runs: this graph compiles sooner
    "train.ema_every": 2, "train.checkpoint_every": 3, "train.evaluate_every": 5, "evaluation.every_ema": True,
    "evaluation.num_samples": 10,
}  # fmt: skip


@pytest.mark.slow
def test_a_run_with_dropout_and_augmentation(in_both, launcher, options, tmp_path):
    """From step 3, between two updates of the EMAs, which every evaluation judges each."""
    flags = options(UNET)

    def scenario(framework):
        start = lambda _: launcher.start(TRAINERS[framework], *flags, f"--workdir={workdir}")  # noqa: E731
        workdir = unbroken = tmp_path / f"{framework}_unbroken"
        command = start(framework)
        assert command.wait() == 0, command.stderr
        assert re.search(r"unet: 0\.0\d million parameters", command.stderr)
        workdir = tmp_path / framework
        shutil.rmtree(copy_of(unbroken, workdir)[5])
        command = start(framework)
        assert command.wait() == 0, command.stderr
        assert "resuming from step 3" in command.stderr
        for ema in (-1, 0, 1):
            (_, one), (_, other) = (READ_WEIGHTS[framework](path, ema) for path in (workdir, unbroken))
            assert one.keys() == other.keys()
            assert all(np.array_equal(one[name], other[name]) for name in one)
        assert (workdir / "metrics.jsonl").read_text() == (unbroken / "metrics.jsonl").read_text()
        lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
        last = {name: value for line in lines if line["step"] == 5 for name, value in line.items()}
        chosen, quick, slow = (last[f"frechet_distance_pixels{ema}"] for ema in ("", "_ema_0.9", "_ema_0.99"))
        assert chosen == quick != slow

    in_both(scenario)
