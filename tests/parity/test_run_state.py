"""Runs carried to the other framework: nothing is lost, and the next steps are those of a run that stayed."""

import json
import pathlib
import signal

import numpy as np
import pytest

from jax_impl import checkpoints as jax_checkpoints
from jax_impl import portable as jax_portable
from jax_impl import weights as jax_weights
from meanflow.config import store
from meanflow.config.workdir import FRAMEWORKS
from meanflow.errors import UserError
from meanflow.weights.training_state import TrainingState
from parity import convert, run_state
from torch_impl import checkpoints as torch_checkpoints
from torch_impl import step as torch_step
from torch_impl import weights

READ = {"jax": jax_checkpoints.read_state, "torch": torch_checkpoints.read_state}
WRITE = {"jax": jax_checkpoints.write_state, "torch": torch_checkpoints.write_state}
OTHER = {"jax": "torch", "torch": "jax"}
TRAINERS = {"jax": "jax_impl.main", "torch": "torch_impl/train.py"}
SYSTEMS = {
    "dit": "meanflow", "unet": "meanflow", "imf_dit": "improved", "dmf_dit": "decoupled", "edm2": "flow",
}  # fmt: skip
# Each network one way, the first both ways; the other test has all.
ONE_WAY = [("dit", "jax"), *((network, ("torch", "jax")[i % 2]) for i, network in enumerate(SYSTEMS))]
STEPS = {"train.steps": 6, "train.checkpoint_every": 3, "train.log_every": 2}
FAIL_AT = pathlib.Path(__file__).parents[1] / "fail_at.py"
BOUND = 1e-5  # relative, in float32 after three steps


@pytest.fixture
def train(launcher, options):
    """Return a function that trains in a directory, with the flags given or else with nothing but its config."""

    def run(framework, workdir, changes=None):
        flags = options(STEPS | changes) if changes is not None else ()
        command = launcher.run(TRAINERS[framework], *flags, f"--workdir={workdir}")
        assert command.wait() == 0, command.stderr
        return command.stderr

    return run


def parts(state):
    """Return all arrays of a state by dotted name."""
    emas = {f"ema{i}": ema for i, ema in enumerate(state.emas)}
    trees = {"params": state.params, "first": state.first_moments, "second": state.second_moments} | emas
    return {f"{part}.{name}": a for part, tree in trees.items() for name, a in tree.items()}


def assert_same(one, other):
    """Assert that two states are the same, bit for bit."""
    assert one.step == other.step
    assert {n: a for n, a in one.progress.items() if n != "origin"} == {
        n: a for n, a in other.progress.items() if n != "origin"
    }
    one, other = parts(one), parts(other)
    assert one.keys() == other.keys()
    for name, a in one.items():
        assert a.dtype == other[name].dtype
        np.testing.assert_array_equal(a, other[name], err_msg=name)


def distance(one, other):
    """Return the largest relative error of a part, and its name."""
    found = {name: np.linalg.norm(a - other[name]) / max(np.linalg.norm(a), 1e-8) for name, a in one.items()}
    return max((error, name) for name, error in found.items())


@pytest.mark.slow
@pytest.mark.parametrize("framework", READ)
@pytest.mark.parametrize("network", SYSTEMS)
def test_a_run_goes_on_in_the_other_framework(network, framework, train, tmp_path):
    """From step 3, in the middle of a window of the log; there and back is bitwise."""
    changes = {"model.name": network, "method.name": SYSTEMS[network]}
    stayed, moved, back = (tmp_path / name for name in ("stayed", "moved", "back"))
    train(framework, stayed, changes)
    convert.main([str(stayed), str(moved), "--to", OTHER[framework], "--step", "3"])
    start = READ[framework](stayed, 3)[1]
    assert_same(start, READ[OTHER[framework]](moved)[1])
    assert start.progress["window"] and json.loads(start.progress["loader"])["step"] == 3
    convert.main([str(moved), str(back), "--to", framework])
    assert_same(start, READ[framework](back)[1])
    said = train(OTHER[framework], moved)
    assert f"resuming from step 3; trained by {FRAMEWORKS[framework]} until step 3 ({stayed})" in said
    expected, found = READ[framework](stayed)[1], READ[OTHER[framework]](moved)[1]
    assert found.step == expected.step == 6
    error, name = distance(parts(expected), parts(found))
    assert error < BOUND, name
    logs = [[json.loads(line) for line in (d / "metrics.jsonl").read_text().splitlines()] for d in (stayed, moved)]
    assert [line["step"] for line in logs[0]] == [line["step"] for line in logs[1]] == [2, 4, 6]
    for one, two in zip(*logs, strict=True):
        assert one["raw_error"] == pytest.approx(two["raw_error"], rel=1e-4)


@pytest.mark.parametrize("framework", READ)
def test_float64(framework, tiny, tmp_path):
    """Random moments and EMAs, which all differ, with -0, infinity and a subnormal number among them."""
    config = tiny({"model.name": "imf_dit", "method.name": "improved", "model.compute_dtype": "float64"})
    net, rng = torch_step.build_net(config), np.random.default_rng(0)
    tables = net.tables()

    def tree():
        shapes = {name: a.shape for name, a in weights.to_canonical(net, dict(net.named_parameters())).items()}
        arrays = {name: tables.get(name, rng.standard_normal(shape)) for name, shape in shapes.items()}
        for name in arrays.keys() - tables.keys():
            arrays[name].flat[0] = rng.choice([-0.0, np.inf, np.finfo(np.float64).smallest_subnormal])
        return arrays

    progress = {"loader": "", "window": [[6, {"loss": 1.5}]], "pending": True}
    state = TrainingState(7, tree(), tree(), tree(), (tree(), tree()), progress)
    first, second, third = (tmp_path / name for name in "abc")
    WRITE[framework](first, config, state)
    (first / "config.json").write_text(store.to_json(config))
    convert.main([str(first), str(second), "--to", OTHER[framework]])
    convert.main([str(second), str(third), "--to", framework])
    for reader, workdir in ((framework, first), (OTHER[framework], second), (framework, third)):
        assert_same(READ[reader](workdir)[1], state)


@pytest.mark.slow
@pytest.mark.parametrize(("network", "framework"), ONE_WAY)
def test_a_run_that_is_killed_before_and_after_it_moves_is_the_same(
    network, framework, train, launcher, options, tmp_path
):
    """Right before the switch, after step 3, and right after it, after the first step in the other framework."""
    stayed, begun, moved = (tmp_path / name for name in ("stayed", "begun", "moved"))
    changes = {"model.name": network, "method.name": SYSTEMS[network], "data.prefetch": 0}
    changes |= {"train.steps": 8, "train.checkpoint_every": 2, "train.keep_checkpoints": 9}
    train(framework, stayed, changes)

    def kill(framework, batch, *flags):
        command = launcher.run(FAIL_AT, framework, 0, batch, "kill", *flags)
        assert command.wait() == -signal.SIGKILL, command.stderr

    kill(framework, 4, *options(STEPS | changes), f"--workdir={begun}")
    train(framework, begun, changes)
    convert.main([str(begun), str(moved), "--to", OTHER[framework], "--step", "4"])
    kill(OTHER[framework], 2, f"--workdir={moved}")
    train(OTHER[framework], moved)
    expected, found = READ[framework](stayed)[1], READ[OTHER[framework]](moved)[1]
    assert found.step == expected.step == 8
    error, name = distance(parts(expected), parts(found))
    assert error < BOUND, name


MUTATIONS = {
    "a moment that is not transposed": lambda s: s._replace(
        second_moments={n: a.T.reshape(a.shape) if "attn" in n else a for n, a in s.second_moments.items()}
    ),
    "an EMA left behind": lambda s: s._replace(emas=(s.params, *s.emas[1:])),
    "a moment left behind": lambda s: s._replace(
        first_moments={n: a if "pos_embed" in n else 0 * a for n, a in s.first_moments.items()}
    ),
    "a step off by one": lambda s: s._replace(step=s.step + 1),
}


@pytest.mark.slow
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_what_is_lost_is_seen(mutation, train, tmp_path, monkeypatch):
    train("jax", tmp_path / "stayed", {})
    right = jax_portable.export
    monkeypatch.setattr(jax_portable, "export", lambda *args: MUTATIONS[mutation](right(*args)))
    convert.main([str(tmp_path / "stayed"), str(tmp_path / "moved"), "--to", "torch", "--step", "3"])
    monkeypatch.undo()
    with pytest.raises(AssertionError):
        assert_same(READ["jax"](tmp_path / "stayed", 3)[1], READ["torch"](tmp_path / "moved")[1])
    train("torch", tmp_path / "moved")
    expected, found = READ["jax"](tmp_path / "stayed")[1], READ["torch"](tmp_path / "moved")[1]
    assert found.step == 6 and distance(parts(expected), parts(found))[0] > 10 * BOUND


@pytest.mark.parametrize("framework", READ)
def test_the_source_stays_as_it_is(framework, train, tmp_path, monkeypatch):
    """Checkpoints too that the run would delete next; and what is interrupted has no config to go on with."""
    run = tmp_path / "run"
    train(framework, run, {"train.checkpoint_every": 2, "train.keep_checkpoints": 9})
    text = (run / "config.json").read_text().replace('"keep_checkpoints": 9', '"keep_checkpoints": 1')
    assert '"keep_checkpoints": 1' in text
    (run / "config.json").write_text(text)

    def files():
        return {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}

    before = files()
    convert.main([str(run), str(tmp_path / "moved"), "--to", OTHER[framework], "--step", "2"])
    assert files() == before and len(list((run / "checkpoints" / framework).iterdir())) == 3
    monkeypatch.setattr(run_state.CHECKPOINTS[OTHER[framework]], "write_state", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        convert.main([str(run), str(tmp_path / "interrupted"), "--to", OTHER[framework]])
    assert not (tmp_path / "interrupted/config.json").exists()


def test_weights_alone_and_options_that_do_not_apply(train, tmp_path):
    run, alone = tmp_path / "run", tmp_path / "alone"
    train("jax", run, {"train.steps": 3})
    convert.main([str(run), str(alone), "--to", "torch", "--weights_only", "--ema", "1"])
    assert (alone / "model.safetensors").is_file() and not (alone / "checkpoints").exists()
    with pytest.raises(UserError, match="--ema does not apply.*--weights_only"):
        convert.main([str(run), str(tmp_path / "x"), "--to", "torch", "--ema", "1"])
    with pytest.raises(UserError, match="no checkpoint of step 7, only of 3"):
        convert.main([str(run), str(tmp_path / "x"), "--to", "torch", "--step", "7"])
    with pytest.raises(UserError, match="exists already"):
        convert.main([str(run), str(alone), "--to", "torch"])
    assert not (tmp_path / "x").exists()
    assert jax_weights.load(alone / "model.safetensors")
