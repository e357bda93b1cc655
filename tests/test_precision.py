"""Every command sets the precision of the config before it computes, and a run in float64 stays in float64."""

import importlib
import inspect
import pathlib
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import torch
from absl import flags
from safetensors.numpy import load_file

from meanflow import torch_precision
from meanflow.config import store
from meanflow.weights import reading
from parity.adapters import frameworks

ROOT = pathlib.Path(__file__).parents[1]
BOTH = ("jax", "torch")
PACKAGES = ("jax_impl", "torch_impl", "benchmarks", "parity", "meanflow")
FLOW = ("--config=configs/digits.py:flow",)
# The commands of both frameworks, and arguments with which they begin.
FLAGS = {
    "train": ("--config=configs/digits.py", "--workdir=none"),
    "sample": ("--config=configs/digits.py", "--weights=none.safetensors", "--output=none"),
    "evaluate": ("--workdir={workdir}",),
    "encode": ("--source=none", "--dest=none"),
    "reflow": (*FLOW, "--teacher=none.safetensors", "--output=none", "--num_samples=8"),
    "time_embedding": (
        "--config=configs/digits.py:edm2_flow", "--teacher=none.safetensors", "--output=none.safetensors",
    ),
}  # fmt: skip
TINY = ("--set", "model.depth=1", "model.width=16", "model.num_heads=2")
# Commands that take a list of arguments, or positional ones, and the frameworks that they are of.
OTHERS = {
    "benchmarks/step.py": lambda framework, path: [[f"--framework={framework}", "--batch=8", *TINY]],
    "benchmarks/sample.py": lambda framework, path: [[f"--framework={framework}", "--batch=8", *TINY]],
    "benchmarks/memory.py": lambda framework, path: [framework, store.from_json(pathlib.Path(path).read_text())],
    "benchmarks/jax_steps.py": lambda framework, path: [path, 1, 1] if framework == "jax" else None,
    "benchmarks/torch_steps.py": lambda framework, path: [path, 1, 1] if framework == "torch" else None,
    "benchmarks/on_gpu/timed.py": lambda framework, path: [framework, "configs/digits.py", "8"],
    "parity/full_step.py": lambda framework, path: [["--config=configs/digits.py"]],
}
# Commands that set no precision, and why.
WITHOUT = {
    "benchmarks/gpu.py": "starts those of benchmarks/on_gpu",
    "benchmarks/on_gpu/attention.py": "compares kernels in bfloat16 with float32 that it makes exact itself",
    "benchmarks/on_gpu/digits.py": "starts trainers",
    "benchmarks/on_gpu/resume.py": "starts trainers",
    "benchmarks/on_gpu/two.py": "starts trainers",
    "benchmarks/presets.py": "starts those of benchmarks/rehearsal",
    "benchmarks/precision.py": "compares precisions, each set around what is computed in it",
    "benchmarks/rehearse.py": "starts those of benchmarks/rehearsal",
    "benchmarks/rehearsal/jax_step.py": "compiles and computes nothing",
    "benchmarks/rehearsal/torch_step.py": "computes nothing",
    "benchmarks/weights.py": "jax_impl.load and torch_impl.load set it",
    "benchmarks/scaling.py": "starts jax_steps.py or torch_steps.py",
    "parity/check.py": "full_precision, tested below",
    "parity/compare.py": "compares files",
    "parity/train.py": "`trainers.set_precision` sets that of both, or tests/parity/test_train.py would see float32",
    "parity/convert.py": "computes nothing; float64 is tested below",
    "meanflow/commands/import_couplings.py": "moves files",
    "meanflow/commands/import_latents.py": "moves files",
}


class Called(Exception):
    """The precision is set."""


def program(framework, command):
    return f"{framework}_impl/{'main' if (framework, command) == ('jax', 'train') else command}.py"


PROGRAMS = {program(framework, command): (framework, command) for framework in BOTH for command in FLAGS}


@pytest.fixture
def stop_there(monkeypatch):
    """Return a function that makes `set_precision` of a framework note its config and raise `Called`."""
    heard = []

    def called(config):
        heard.append(config)
        raise Called

    def patch(framework):
        original = importlib.import_module(f"{framework}_impl.devices").set_precision
        for module in list(sys.modules.values()):
            if getattr(module, "set_precision", None) is original:
                monkeypatch.setattr(module, "set_precision", called)
        return heard

    return patch


def test_no_command_is_forgotten():
    found = {
        str(path.relative_to(ROOT))
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
        if 'if __name__ == "__main__"' in path.read_text()
    }
    assert found == {*PROGRAMS, *OTHERS, *WITHOUT}


@pytest.fixture
def imported():
    """Import all commands, so that flags of libraries do not go with those of a test."""
    for path in PROGRAMS:
        importlib.import_module(path[:-3].replace("/", "."))


@pytest.fixture
def parse_all(imported, parse_flags):
    """Return `parse_flags`; --config and --workdir are forgotten too."""
    for name in ("config", "workdir"):
        flags.FLAGS[name].unparse()
    yield parse_flags
    for name in ("config", "workdir"):
        flags.FLAGS[name].unparse()


@pytest.mark.parametrize("path", PROGRAMS)
def test_commands_set_the_precision(path, stop_there, parse_all, tiny, tmp_path, monkeypatch):
    framework, command = PROGRAMS[path]
    module = importlib.import_module(path[:-3].replace("/", "."))
    shared = [getattr(module, name, None) for name in ("evaluate", "encode", "reflow", "time_embedding")]

    def define():
        for part in filter(inspect.ismodule, shared):
            part.define_flags()
        if command == "sample":
            module.sampling.define_sample_flags()
            monkeypatch.setattr(module.sampling, "read_weights", lambda path, config: (config, {}))
        if command in ("reflow", "time_embedding"):
            monkeypatch.setattr(
                reading, "network", lambda _, config, *__: reading.Network(config, {}, "weights", False)
            )
        if hasattr(module, "define_flags"):
            module.define_flags()

    (tmp_path / "config.json").write_text(store.to_json(tiny()))
    argv = [flag.format(workdir=tmp_path) for flag in FLAGS[command]]
    monkeypatch.setattr("sys.argv", ["program", *argv])
    monkeypatch.setattr(module, "setup_logging", lambda: None)
    parse_all(define, *argv)
    heard = stop_there(framework)
    with pytest.raises(Called):
        module.main()
    assert heard[0].train.matmul_precision == "highest"


@pytest.mark.parametrize("framework", BOTH)
@pytest.mark.parametrize("path", OTHERS)
def test_benchmarks_and_checks_set_the_precision(path, framework, stop_there, tiny, tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(store.to_json(tiny()))
    arguments = OTHERS[path](framework, str(tmp_path / "config.json"))
    if arguments is not None:
        module = importlib.import_module(path[:-3].replace("/", "."))
        importlib.import_module(f"benchmarks.{framework}_steps")
        stop_there(framework)
        if path == "benchmarks/jax_steps.py":  # JAX would refuse to split the CPU once it has been used
            monkeypatch.setattr(module, "jax", SimpleNamespace(config=SimpleNamespace(update=lambda *_: None)))
        with pytest.raises(Called):
            (module.measure if path == "benchmarks/memory.py" else module.main)(*arguments)


@pytest.fixture
def restored():
    """Leave both frameworks as they were."""
    names = ("jax_default_matmul_precision", "jax_enable_x64")
    before = {name: getattr(jax.config, name) for name in names}
    with torch_precision.full_float32():
        yield
    for name, value in before.items():
        jax.config.update(name, value)


def state():
    """Return the precisions of JAX and PyTorch: of matmuls, of convolutions in PyTorch, and whether float64 is on."""
    conv = torch.backends.cudnn.conv.fp32_precision  # pyright: ignore  # what PyTorch's newer setting says of the same
    return (
        jax.config.jax_default_matmul_precision, jax.config.jax_enable_x64,  # pyright: ignore
        torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32, conv == "tf32",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("precision", "dtype", "expected"),
    [("highest", "float64", ("highest", True, "highest", False, False)),
     ("default", "float32", ("default", False, "high", True, True))],
)  # fmt: skip
def test_matmuls_and_convolutions_follow_the_config(precision, dtype, expected, tiny, restored):
    config = tiny({"train.matmul_precision": precision, "model.compute_dtype": dtype})
    for framework in BOTH:
        importlib.import_module(f"{framework}_impl.devices").set_precision(config)
    assert state() == expected
    with frameworks.full_precision():
        assert state() == ("highest", True, "highest", False, False)
    assert state() == expected


def test_convolutions_in_jax_follow_the_same_setting(restored):
    image, kernel = np.ones((1, 1, 8, 8), np.float32), np.ones((1, 1, 3, 3), np.float32)

    def convolve(x):
        return jax.lax.conv(x, jax.numpy.asarray(kernel), (1, 1), "SAME")

    for precision in ("highest", "default"):
        jax.config.update("jax_default_matmul_precision", precision)
        assert ("HIGHEST" in jax.jit(convolve).lower(image).as_text()) == (precision == "highest")


@pytest.fixture(scope="module")
def wide(tiny, tiny_flow, tmp_path_factory):
    """Return a directory with the config of a flow model in float64 on eight devices, and weights zero nowhere."""
    from torch_impl import step, weights

    directory = tmp_path_factory.mktemp("wide")
    config = tiny(tiny_flow | {"model.compute_dtype": "float64", "train.fsdp": 8})
    (directory / "config.json").write_text(store.to_json(config))
    net, rng = step.build_net(config), np.random.default_rng(0)
    canonical = weights.to_canonical(net, dict(net.named_parameters()))
    for name in sorted(canonical.keys() - net.tables().keys()):
        canonical[name] = canonical[name] + rng.normal(0, 0.1, canonical[name].shape)
    weights.save(directory / "weights.safetensors", canonical, {})
    return directory


@pytest.mark.slow
def test_one_device_reads_what_eight_wrote_in_float64(wide, launcher, options, tiny_decoupled, in_both):
    """Converted to a work directory and back, sampled, judged, taught from, coupled and started from."""

    def scenario(framework):
        directory = wide / framework
        run, convert = directory / "run", "parity/convert.py"
        directory.mkdir()

        def command(name, *argv):
            path = name if name == convert else program(framework, name)
            path = path[:-3].replace("/", ".") if path.startswith("jax_impl") else path
            done = launcher.run(path, *argv)
            assert done.wait() == 0, done.stderr

        command(convert, wide / "weights.safetensors", run, "--to", framework, "--config", wide / "config.json")
        command(convert, run, directory / "back.safetensors")
        command("sample", f"--workdir={run}", "--num_samples=10", "--steps=2")
        command("evaluate", f"--workdir={run}", "--num_samples=10")
        command("reflow", f"--teacher={run}", "--num_samples=8", "--steps=2", f"--output={directory / 'couplings'}")
        float64 = {"model.compute_dtype": "float64", "train.steps": 1}
        taught = {"method.guidance_type": "distill", "method.teacher": run, "train.load_from": run}
        command("train", *options(tiny_decoupled | float64 | taught), f"--workdir={directory / 'taught'}")
        with np.load(run / "samples" / "samples.npz") as samples:
            return load_file(directory / "back.safetensors"), samples["images"]

    given = load_file(wide / "weights.safetensors")
    found = in_both(scenario)
    for back, _ in found.values():
        assert back.keys() == given.keys()
        assert all(back[name].dtype == a.dtype and np.array_equal(back[name], a) for name, a in given.items())
    (_, images), (_, images_torch) = found.values()
    assert images.dtype == images_torch.dtype
    np.testing.assert_allclose(images, images_torch, rtol=0, atol=1e-12)
