"""What tests share: the digits on disk, a tiny config, and a quick way to run the project's commands."""

import contextlib
import functools
import os
import pathlib
import runpy
import sys
from concurrent import futures

with contextlib.suppress(ImportError):  # a PyTorch for GPUs has it; it crashes if TensorFlow is loaded before it
    import triton  # noqa: F401  # pyright: ignore[reportMissingImports]

import commands
import compile_cache
import pytest

ROOT = pathlib.Path(__file__).parents[1]
# The files that take longest.  Workers of pytest-xdist get whole files, these first, so that both end together.
LONGEST = (
    "jax_impl/test_devices.py", "test_several_processes.py", "torch_impl/test_processes.py", "test_resume.py",
    "parity/test_mutations.py", "jax_impl/test_tape.py", "test_commands.py", "test_decoupled_commands.py",
    "test_latents_commands.py", "test_checkpoints.py", "benchmarks/test_benchmark_commands.py",
    "parity/golden/test_inception.py", "meanflow/data/test_loader.py",
)  # fmt: skip
TINY_IMPROVED = {"model.name": "imf_dit", "method.name": "improved"}
TINY_FLOW = {"model.name": "dit", "method.name": "flow"}
TINY_DECOUPLED = {"model.name": "dmf_dit", "method.name": "decoupled"}
TINY_RECTIFIED = {"model.name": "edm2", "method.name": "rectified"}

# Set before any test module imports these libraries, and inherited by the commands.
WORKER = "PYTEST_XDIST_WORKER" in os.environ
os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "CUDA_VISIBLE_DEVICES": os.environ.get("TEST_CUDA_DEVICES", ""),  # for the few tests that need one
    # Programs of tests run once: compiling them costs a third of the time without these passes.
    "XLA_FLAGS": "--xla_cpu_use_fusion_emitters=false --xla_backend_optimization_level=0 "
    "--xla_llvm_disable_expensive_passes=true",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    "OMP_NUM_THREADS": "1",  # the tiny networks of the tests gain nothing from two
    "OMP_WAIT_POLICY": "passive",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "TF_ENABLE_ONEDNN_OPTS": "0",
}


def pytest_configure(config):
    """Keep compiled JAX programs from one session to the next; workers of pytest-xdist and commands inherit this."""
    if not WORKER:
        directory = config.cache.mkdir("compiled_by_jax")
        compile_cache.prune(directory)
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(directory)


def pytest_xdist_auto_num_workers(config):
    """Two workers for all tests; none for those that are named on the command line, which seldom repay the start."""
    return 2 if config.args_source is config.ArgsSource.TESTPATHS else 0


def pytest_collection_modifyitems(items):
    """Sort the tests by file as `LONGEST` says, for the workers of pytest-xdist; all else keeps its place."""
    if WORKER:
        rank = {ROOT / "tests" / name: i for i, name in enumerate(LONGEST)}
        items.sort(key=lambda item: rank.get(item.path, len(rank)))


@pytest.fixture(scope="session")
def datasets_dir(tmp_path_factory):
    """Return a directory with the digits, prepared."""
    from meanflow.data import sources

    directory = str(tmp_path_factory.mktemp("datasets"))
    sources.open_source("digits", "train", directory)
    return directory


@pytest.fixture(scope="session")
def launcher(tmp_path_factory, datasets_dir):
    """Return the `Launcher` of the session."""
    launcher = commands.Launcher(tmp_path_factory.mktemp("commands"), {"TFDS_DATA_DIR": datasets_dir})
    yield launcher
    launcher.close()


@pytest.fixture(scope="session")
def tiny(datasets_dir):
    """Return a function (changes by dotted name) -> the config of a tiny run on the digits; see helpers/tiny.py.

    model.name and method.name among the changes choose its network and its method.
    """
    import tiny as recipe

    return lambda changes=(): recipe.make(*recipe.split({"data.dir": datasets_dir} | dict(changes)))


@pytest.fixture(scope="session")
def tiny_improved():
    """Return the changes that make the tiny run, of `tiny` and of `options`, one of improved MeanFlow."""
    return TINY_IMPROVED


@pytest.fixture(scope="session")
def tiny_flow():
    """Return the changes that make the tiny run one of flow matching, of the same network as `tiny_decoupled`."""
    return TINY_FLOW


@pytest.fixture(scope="session")
def tiny_decoupled():
    """Return the changes that make the tiny run one of decoupled MeanFlow."""
    return TINY_DECOUPLED


@pytest.fixture(scope="session")
def tiny_rectified(tmp_path_factory):
    """Return the changes that make the tiny run one of Re-MeanFlow in two stages, from couplings of no real teacher."""
    import numpy as np

    from meanflow.data import couplings

    directory = tmp_path_factory.mktemp("couplings") / "data"
    plan = couplings.Plan((8, 8, 1), 64, 10, 0, shard_size=32, batch_size=32)
    assert not couplings.make(directory, plan, lambda noise, y: np.tanh(noise), {})
    return TINY_RECTIFIED | {"data.name": str(directory)}


@pytest.fixture(scope="session")
def options(datasets_dir):
    """Return a function (changes by dotted name) -> the command-line arguments of the same config as `tiny`."""

    import tiny as recipe

    def make(changes=()):
        network, method, changes = recipe.split({"data.dir": datasets_dir} | dict(changes))
        file = f"--config={ROOT}/tests/helpers/tiny.py:{network},{method}"
        return [file, *(f"--config.{name}={value}" for name, value in changes.items())]

    return make


@pytest.fixture
def own_flags():
    """Forget the flags that a test defines, and their values."""
    import grain  # noqa: F401  it defines flags once, which must not go with those of a test; so does the next
    from absl import flags
    from absl.testing import flagsaver

    import meanflow.config.flags  # noqa: F401

    before, values = set(flags.FLAGS), flagsaver.save_flag_values()
    yield before
    for name in set(flags.FLAGS) - before:
        delattr(flags.FLAGS, name)
    flagsaver.restore_flag_values(values)


@pytest.fixture
def parse_flags(own_flags):
    """Return a function (define, *argv) that has `define()` define flags and parses them, for one test."""
    from absl import flags

    def parse(define, *argv):
        if set(flags.FLAGS) == own_flags:
            define()
        flags.FLAGS(["program", *argv])

    return parse


@pytest.fixture
def refused(own_flags, monkeypatch, capsys):
    """Return a function (program, *argv) -> the error with which a command, run in this process, ends with code 2."""
    import jax
    import torch.distributed as dist
    from absl import app

    from meanflow import console_log, torch_precision

    monkeypatch.setattr(app, "run", lambda main, flags_parser: main(flags_parser(sys.argv)))
    monkeypatch.setattr(console_log, "setup_logging", lambda: None)

    def run(program, *argv):
        monkeypatch.setattr(sys, "argv", [program, *map(str, argv)])
        start = runpy.run_path if program.endswith(".py") else functools.partial(runpy.run_module, alter_sys=True)
        with pytest.raises(SystemExit) as ended:
            start(program, run_name="__main__")
        written = capsys.readouterr().err
        assert ended.value.code == 2 and written.startswith("error: ") and written.count("\n") == 1, written
        return written

    before = {name: getattr(jax.config, name) for name in ("jax_default_matmul_precision", "jax_enable_x64")}
    with torch_precision.full_float32():
        yield run
    for name, value in before.items():
        jax.config.update(name, value)
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def optimize_less():
    """Let JAX compile in half the time, without XLA's expensive passes, in the tests of a module."""
    import jax

    name = "jax_disable_most_optimizations"
    before = jax.config.read(name)
    jax.config.update(name, True)
    yield
    jax.config.update(name, before)


@pytest.fixture(scope="session")
def in_both():
    """Return a function that calls a scenario(framework) for `jax` and `torch`, at once: each leaves a core idle.

    It returns {framework: what the scenario returned}.
    """

    def run(scenario):
        with futures.ThreadPoolExecutor() as pool:
            running = {framework: pool.submit(scenario, framework) for framework in ("jax", "torch")}
            return {framework: done.result() for framework, done in running.items()}

    return run
