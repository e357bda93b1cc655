"""Checkpoints of both frameworks: which directories count as one, who reads what of them, and who may change them."""

import shutil

import numpy as np
import pytest
import torch
from flax import nnx

from configs.errors import UserError
from jax_impl import checkpoints as jax_checkpoints
from jax_impl import step as jax_step
from jax_impl import train as jax_train
from jax_impl import weights as jax_weights
from torch_impl import checkpoints as torch_checkpoints
from torch_impl import step as torch_step
from torch_impl import train as torch_train
from torch_impl import weights as torch_weights

MODULES = {"jax": jax_checkpoints, "torch": torch_checkpoints}
FRAMEWORKS = pytest.mark.parametrize("framework", MODULES)
NAME = "final_layer.linear.bias"


@pytest.fixture(scope="module")
def config(tiny):
    return tiny()


def canonical(config, value):
    """Return canonical weights whose last bias is `value`, which no fresh network has."""
    net = torch_step.build_net(config)
    weights = torch_weights.to_canonical(net, dict(net.named_parameters()))
    return weights | {NAME: np.full_like(weights[NAME], value)}


@pytest.fixture(scope="module")
def written(config, tmp_path_factory):
    """Return {framework: work directory with a checkpoint at step 0, of last bias 1}."""
    directory = tmp_path_factory.mktemp("written")
    for framework, module in MODULES.items():
        module.write_weights(directory / framework, config, canonical(config, 1))
    return {framework: directory / framework for framework in MODULES}


@pytest.fixture
def run_of(written, tmp_path):
    """Return a function (framework, *steps) -> a work directory with checkpoints of these steps."""

    def make(framework, *steps):
        workdir, source = tmp_path / framework, written[framework]
        workdir.mkdir()
        shutil.copy(source / "config.json", workdir)
        for step in steps:
            shutil.copytree(source / MODULES[framework].DIRECTORY / "0", workdir / path_of(framework, step))
        return workdir

    return make


def path_of(framework, step):
    return f"{MODULES[framework].DIRECTORY}/{step}"


def start(framework, config, workdir):
    """Start a run there, as its trainer does.  Returns the last bias, and whether it was resumed."""
    checkpoints = MODULES[framework].Checkpoints(workdir, config)
    if framework == "jax":
        graphdef, state, progress = jax_train.start_state(config, jax_step.make_mesh(config), checkpoints)
        weights = jax_weights.to_canonical(nnx.merge(graphdef, state.params), state.params)
    else:
        state, progress = torch_train.start_state(config, None, torch.device("cpu"), checkpoints)
        weights = torch_weights.to_canonical(state.net, dict(state.net.named_parameters()))
    checkpoints.open()
    return weights[NAME].ravel()[0], progress is not None


def files_of(framework, kind):
    return {"state": {"jax": "state", "torch": "__0_0.distcp"}, "run": {"jax": "run", "torch": "run.json"}}[kind][
        framework
    ]


def remove(path):
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def empty(framework, directory):
    shutil.rmtree(directory)
    directory.mkdir()


CUTS = {
    "no_marker": lambda framework, directory: (directory / MODULES[framework].MARKER).unlink(),
    "empty": empty,
    "only_run": lambda framework, directory: [
        remove(p) for p in directory.iterdir() if p.name != files_of(framework, "run")
    ],
    "temporary_name": lambda _, directory: directory.rename(f"{directory}.orbax-checkpoint-tmp"),
    "a_file": lambda _, directory: (shutil.rmtree(directory), directory.write_text("3")),
}
DAMAGES = {
    "no_run": lambda framework, directory: remove(directory / files_of(framework, "run")),
    "no_arrays": lambda framework, directory: remove(directory / files_of(framework, "state")),
}


@FRAMEWORKS
@pytest.mark.parametrize("cut", CUTS)
def test_an_unfinished_first_save_is_no_checkpoint(framework, cut, config, run_of, tmp_path):
    """The run starts from train.load_from, as it did before it was killed."""
    workdir = run_of(framework, 3)
    CUTS[cut](framework, workdir / path_of(framework, 3))
    torch_weights.save(tmp_path / "start.safetensors", canonical(config, 2), {})
    config = config.copy_and_resolve_references()
    config.train.load_from = str(tmp_path / "start.safetensors")
    assert start(framework, config, workdir) == (2, False)


@FRAMEWORKS
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_first_checkpoint_is_no_reason_to_start_again(framework, damage, config, run_of, tmp_path):
    workdir = run_of(framework, 3)
    DAMAGES[damage](framework, workdir / path_of(framework, 3))
    torch_weights.save(tmp_path / "start.safetensors", canonical(config, 2), {})
    config = config.copy_and_resolve_references()
    config.train.load_from = str(tmp_path / "start.safetensors")
    with pytest.raises(UserError, match="no checkpoint in .* could be read"):
        start(framework, config, workdir)


@FRAMEWORKS
def test_a_resumed_run_needs_no_model_to_start_from(framework, config, run_of, tmp_path):
    config = config.copy_and_resolve_references()
    config.train.load_from = str(tmp_path / "gone.safetensors")
    assert start(framework, config, run_of(framework, 3)) == (1, True)


@FRAMEWORKS
def test_a_model_to_start_from_that_is_gone_is_an_error(framework, config, run_of, tmp_path):
    config = config.copy_and_resolve_references()
    config.train.load_from = str(tmp_path / "gone.safetensors")
    with pytest.raises(UserError, match="gone.safetensors"):
        start(framework, config, run_of(framework))


@FRAMEWORKS
def test_only_a_trainer_sets_a_damaged_checkpoint_aside(framework, config, run_of, caplog):
    workdir = run_of(framework, 3, 6)
    DAMAGES["no_arrays"](framework, workdir / path_of(framework, 6))
    assert start(framework, config, workdir) == (1, True)
    assert "cannot read checkpoint" in caplog.text
    checkpoints = workdir / MODULES[framework].DIRECTORY
    assert {p.name for p in checkpoints.iterdir()} == {"3"}
    assert (checkpoints.parent / f"{framework}_damaged_6").is_dir()


def listing(directory):
    """Return {path: when it changed} of everything in a directory."""
    return {str(p.relative_to(directory)): p.stat().st_mtime_ns for p in [directory, *directory.rglob("*")]}


@FRAMEWORKS
def test_readers_change_nothing(framework, run_of, caplog):
    """Neither with a damaged newest checkpoint nor with an unfinished one, in a directory that cannot be written."""
    workdir = run_of(framework, 3, 6, 9)
    DAMAGES["no_arrays"](framework, workdir / path_of(framework, 6))
    CUTS["no_marker"](framework, workdir / path_of(framework, 9))
    before = listing(workdir)
    for path in [workdir, *workdir.rglob("*")]:
        path.chmod(path.stat().st_mode & ~0o222)
    for ema in (-1, 1):
        _, weights = MODULES[framework].read_weights(workdir, ema)
        assert weights[NAME].ravel()[0] == 1
    assert listing(workdir) == before
    assert "cannot read checkpoint" in caplog.text and "/6" in caplog.text
    for path in [workdir, *workdir.rglob("*")]:
        path.chmod(path.stat().st_mode | 0o200)
