"""The launchers: their syntax, and what the one of SLURM runs, with stand-ins for SLURM's own commands."""

import pathlib
import signal
import subprocess
import time

import pytest

ROOT = pathlib.Path(__file__).parents[1]
LAUNCHERS = sorted(ROOT.glob("launch/*.sh"))
JOB = {
    "SLURM_JOB_ID": "40007", "SLURM_JOB_NODELIST": "gpu[03-04]", "SLURM_NNODES": "2", "SLURM_NTASKS_PER_NODE": "4",
    "SLURM_CPUS_PER_TASK": "6",
}  # fmt: skip
SRUN = """#!/bin/bash
printf '%s\\n' "$@" > srun
env | grep ^PET_ > env
if [ "${WAIT:-}" ]; then
    trap 'echo saved > signal; exit "$WAIT"' USR1
    touch started
    for _ in {1..600}; do sleep 0.05; done
fi
exit "${CODE:-0}"
"""
SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then printf 'gpu03\\ngpu04\\n'; else echo "$@" > scontrol; fi
"""


@pytest.mark.parametrize("path", LAUNCHERS, ids=lambda path: path.name)
def test_syntax(path):
    assert path.stat().st_mode & 0o111, "not executable"
    subprocess.run(["bash", "-n", path], check=True)


@pytest.fixture
def start(tmp_path):
    """Return a function (arguments, env) that starts the script as SLURM would, in the directory of the test."""
    for name, text in {"srun": SRUN, "scontrol": SCONTROL}.items():
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)

    def start(framework, *arguments, **env):
        env = {"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin", "SLURM_SUBMIT_DIR": str(tmp_path), **JOB, **env}
        script = ROOT / f"launch/slurm_{framework}.sh"
        (tmp_path / "launch").symlink_to(ROOT / "launch")
        return subprocess.Popen(["bash", script, *arguments], env=env, cwd="/", stderr=-1, text=True)

    return start


def wait_for(path):
    deadline = time.monotonic() + 60
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.01)


def test_jax_has_a_task_for_each_gpu(start, tmp_path):
    assert start("jax", "configs/digits.py", "runs/a b", "--config.seed=1").wait() == 0
    assert (tmp_path / "srun").read_text().splitlines() == [
        "--gpu-bind=none", "--cpus-per-task=6", ".venv/bin/python", "-m", "jax_impl.main", "--distributed",
        "--config=configs/digits.py", "--workdir=runs/a b", "--config.seed=1",
    ]  # fmt: skip
    assert not (tmp_path / "scontrol").exists()


def test_pytorch_has_torchrun_on_each_node(start, tmp_path):
    assert start("torch", "configs/digits.py", "runs/a", CODE="3").wait() == 3
    assert (tmp_path / "srun").read_text().splitlines() == [
        "--ntasks=2", "--ntasks-per-node=1", "--gpu-bind=none", "--cpus-per-task=24", ".venv/bin/torchrun",
        "--nnodes=2", "--nproc_per_node=4", "--rdzv_backend=c10d", "--rdzv_id=40007", "--rdzv_endpoint=gpu03:20007",
        "torch_impl/train.py", "--config=configs/digits.py", "--workdir=runs/a",
    ]  # fmt: skip
    assert not (tmp_path / "scontrol").exists()


def test_torchrun_takes_the_signal_and_the_time_to_save(start, tmp_path, monkeypatch):
    from torch.distributed.run import get_args_parser

    assert start("torch", "configs/digits.py", "runs/a").wait() == 0
    for line in (tmp_path / "env").read_text().splitlines():
        monkeypatch.setenv(*line.split("="))
    found = get_args_parser().parse_args((tmp_path / "srun").read_text().splitlines()[5:])
    assert found.shutdown_timeout == 270 and found.signals_to_handle.split(",")[-1] == "SIGUSR1"
    assert (found.training_script, found.nproc_per_node) == ("torch_impl/train.py", "4")


@pytest.mark.parametrize("code", ["0", "1"])  # torchrun itself fails when it has been stopped
def test_a_job_whose_time_is_up_saves_and_is_queued_again(start, tmp_path, code):
    job = start("jax", "configs/digits.py", "runs/a", WAIT=code)
    wait_for(tmp_path / "started")
    job.send_signal(signal.SIGUSR1)
    assert job.wait(60) in (int(code), 128 + signal.SIGUSR1)
    assert (tmp_path / "signal").read_text() == "saved\n"
    assert (tmp_path / "scontrol").read_text() == "requeue 40007\n"


@pytest.mark.parametrize("framework", ["jax", "torch"])
def test_a_job_that_is_preempted_waits_for_its_processes(start, tmp_path, framework):
    """SLURM sends SIGTERM to the script and to the processes, and requeues the job itself."""
    job = start(framework, "configs/digits.py", "runs/a", WAIT="0")
    wait_for(tmp_path / "started")
    job.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    assert job.poll() is None
    job.send_signal(signal.SIGUSR1)  # ends the stand-in
    assert job.wait(60) == 0 and (tmp_path / "signal").exists()


@pytest.mark.parametrize("framework", ["jax", "torch"])
@pytest.mark.parametrize(("given", "message"), [((), "config file"), (("a",), "work directory")])
def test_mistakes(start, framework, given, message):
    job = start(framework, *given)
    assert job.wait() != 0 and message in job.stderr.read()
