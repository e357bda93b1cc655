"""What tests share: the digits on disk, a tiny config, and a quick way to run the project's commands."""

import atexit
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from concurrent import futures

import pytest

ROOT = pathlib.Path(__file__).parents[1]
TIMEOUT = 600.0  # seconds for one command; a loaded machine needs many
# The files that take longest.  Workers of pytest-xdist get whole files, these first, so that they end together.
LONGEST = (
    "test_several_processes.py",
    "torch_impl/test_processes.py", "test_commands.py", "test_resume.py", "jax_impl/test_devices.py",
    "test_decoupled_commands.py", "test_workdirs.py", "meanflow/data/test_loader.py", "test_reflow_commands.py",
    "jax_impl/test_step.py", "parity/test_mutations.py", "test_latents_commands.py", "parity/golden/test_inception.py",
    "benchmarks/test_benchmark_commands.py", "jax_impl/test_tape.py", "benchmarks/test_precision.py",
)  # fmt: skip
TINY = {
    "method.omega": 1.0, "method.kappa": 0.5, "model.depth": 1, "model.width": 16, "model.num_heads": 2,
    "train.batch_size": 16, "train.steps": 5, "train.learning_rate": 1e-3, "train.warmup_steps": 0,
    "train.schedule": "constant", "train.log_every": 1, "train.sample_every": 0, "train.compile": False,
    "train.ema_decays": (0.9, 0.99), "sample.batch_size": 10, "evaluation.num_samples": 20,
}  # fmt: skip
TINY_IMPROVED = {
    "model.name": "imf_dit", "method.name": "improved", "model.depth": 2, "model.head_depth": 1,
    "model.num_class_tokens": 1, "model.num_omega_tokens": 1, "model.num_interval_tokens": 1,
    "model.num_time_tokens": 1,
}  # fmt: skip
TINY_FLOW = {"model.interval_embedder": False, "method.name": "flow"}
TINY_RECTIFIED = {
    "model.name": "edm2", "model.width": 4, "model.channel_mult": (1, 1), "model.channel_mult_noise": 1,
    "model.channel_mult_emb": 2, "model.num_blocks": 1, "model.attn_resolutions": (), "method.name": "rectified",
    "method.time_sampler": "re2_truncate", "method.omega_sampler": "uniform", "method.omega_max": 2.5,
    "method.stage1_steps": 2, "train.clip_norm": 0.5, "train.clip_stage": "guided", "evaluation.dataset": "digits",
}  # fmt: skip
TINY_DECOUPLED = {"model.name": "dmf_dit", "model.dmf_depth": 1, "method.name": "decoupled"}

# Set before any test module imports these libraries, and inherited by the commands.  Compiled JAX functions are kept
# for the session, since most commands compile the same step; pytest-xdist's workers inherit their directory.
WORKER = "PYTEST_XDIST_WORKER" in os.environ
if not WORKER:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="meanflow_tests_")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "CUDA_VISIBLE_DEVICES": os.environ.get("TEST_CUDA_DEVICES", ""),  # for the few tests that need one
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    "OMP_NUM_THREADS": "1",  # the tiny networks of the tests gain nothing from two
    "OMP_WAIT_POLICY": "passive",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "TF_ENABLE_ONEDNN_OPTS": "0",
}


def pytest_xdist_auto_num_workers(config):
    """Two workers for all tests; none for those that are named on the command line, which seldom repay the start."""
    return 2 if config.args_source is config.ArgsSource.TESTPATHS else 0


def pytest_collection_modifyitems(items):
    """Sort the tests by file as `LONGEST` says, for the workers of pytest-xdist; all else keeps its place."""
    if WORKER:
        rank = {ROOT / "tests" / name: i for i, name in enumerate(LONGEST)}
        items.sort(key=lambda item: rank.get(item.path, len(rank)))


class Command:
    """A running command."""

    def __init__(self, launcher, pid, directory):
        self.pid, self._launcher, self._directory = pid, launcher, directory
        self._code = None

    def poll(self):
        """Return its exit code, -N if signal N ended it, None while it runs."""
        if self._code is None:
            self._code = self._launcher.ask(poll=self.pid)
        return self._code

    def wait(self):
        """Return its exit code once it has ended."""
        self.wait_until(lambda: self.poll() is not None)
        return self._code

    def wait_until(self, condition):
        """Return once `condition()` holds; the command is killed and the test fails if that takes too long."""
        deadline = time.monotonic() + TIMEOUT
        while not condition():
            if time.monotonic() > deadline:
                os.killpg(self.pid, signal.SIGKILL)
                pytest.fail(f"no end after {TIMEOUT} s:\n{self.stderr}")
            time.sleep(0.005)

    def wait_for(self, path):
        """Return once a file is there; the test fails if the command ends without it."""
        self.wait_until(lambda: path.exists() or self.poll() is not None)
        assert path.exists(), self.stderr

    def send(self, number):
        """Send it a signal."""
        os.kill(self.pid, number)

    @property
    def stdout(self):
        """What it has printed so far."""
        return (self._directory / "stdout").read_text()

    @property
    def stderr(self):
        """What it has written to stderr so far."""
        return (self._directory / "stderr").read_text()


class Launcher:
    """Starts commands; see launcher.py."""

    def __init__(self, directory, env):
        self._directory, self._count, self._lock = directory, 0, threading.RLock()
        script = [sys.executable, str(ROOT / "tests" / "launcher.py")]
        self._errors = open(directory / "launcher_stderr", "w")  # noqa: SIM115
        self._process = subprocess.Popen(
            script, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True, env=os.environ | env
        )
        assert self._answer() == "ready"

    def start(self, *argv, cwd=ROOT, **env):
        """Start a command: a script or a module, and its arguments."""
        with self._lock:
            directory = self._directory / str(self._count)
            self._count += 1
        directory.mkdir()
        argv, files = [str(a) for a in argv], {name: str(directory / name) for name in ("stdout", "stderr")}
        return Command(self, self.ask(argv=argv, env=env, cwd=str(cwd), **files), directory)

    def start_two(self, framework, *argv, own=((), ())):
        """Start a command in two processes, as torchrun does or by hand; return them.  own: more arguments of each."""
        with socket.socket() as server:
            server.bind(("localhost", 0))
            port = str(server.getsockname()[1])
        if framework == "torch":
            env = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
            return [self.start(*argv, *own[rank], **env, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(2)]
        joined = (f"--coordinator=localhost:{port}", "--num_processes=2")
        return [self.start(*argv, *own[process], *joined, f"--process={process}") for process in range(2)]

    def run(self, *argv, **env):
        """Run a command to its end; return it."""
        command = self.start(*argv, **env)
        command.wait()
        return command

    def ask(self, **request):
        """Return the answer to a request."""
        with self._lock:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            return self._answer()

    def close(self):
        """End."""
        self._process.stdin.close()
        self._process.wait()
        self._errors.close()

    def _answer(self):
        line = self._process.stdout.readline()
        assert line, (self._directory / "launcher_stderr").read_text()
        return json.loads(line)


@pytest.fixture(scope="session")
def datasets_dir(tmp_path_factory):
    """Return a directory with the digits, prepared."""
    from meanflow.data.images import tfds_images

    directory = str(tmp_path_factory.mktemp("datasets"))
    tfds_images.open_source("digits", "train", directory)
    return directory


@pytest.fixture(scope="session")
def launcher(tmp_path_factory, datasets_dir):
    """Return the `Launcher` of the session."""
    quick = {"XLA_FLAGS": "--xla_backend_optimization_level=0"}  # compiles in half the time
    launcher = Launcher(tmp_path_factory.mktemp("commands"), {"TFDS_DATA_DIR": datasets_dir} | quick)
    yield launcher
    launcher.close()


@pytest.fixture(scope="session")
def tiny(datasets_dir):
    """Return a function (**changes by dotted name) -> the config of a tiny run on the digits."""
    from configs import digits

    def make(changes=()):
        config = digits.get_config()
        config.update_from_flattened_dict(TINY | {"data.dir": datasets_dir} | dict(changes))
        return config

    return make


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

    def make(changes=()):
        settings = TINY | {"data.dir": datasets_dir} | dict(changes)
        return ["--config=configs/digits.py", *(f"--config.{name}={value}" for name, value in settings.items())]

    return make


@pytest.fixture
def parse_flags():
    """Return a function (define, *argv) that has `define()` define flags and parses them, for one test."""
    from absl import flags

    import meanflow.config.flags  # noqa: F401  it defines flags once, which must not go with those of a test

    before = set(flags.FLAGS)

    def parse(define, *argv):
        if set(flags.FLAGS) == before:
            define()
        flags.FLAGS(["program", *argv])

    yield parse
    for name in set(flags.FLAGS) - before:
        delattr(flags.FLAGS, name)


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
