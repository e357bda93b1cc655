"""The launchers on a real SLURM of two nodes on this machine: jobs that are preempted end like undisturbed ones.

Needs root and the packages slurm-wlm and munge (`make slurm-test`).  Debian's build runs one slurmd per host name, so
each daemon has a host name of its own, by namespaces of Linux.
"""

import importlib
import os
import pathlib
import re
import shutil
import socket
import subprocess
import time

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[1]
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "unshare")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        os.geteuid() != 0 or not all(map(shutil.which, PROGRAMS)),
        reason="needs root and SLURM: apt-get install slurm-wlm munge",
    ),
]
NODES = ("node1", "node2")
CONF = """
ClusterName=test
SlurmctldHost=node1(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={dir}/munge.sock,cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SlurmdParameters=config_overrides
SwitchType=switch/none
MpiDefault=none
StateSaveLocation={dir}
SlurmdSpoolDir={dir}/spool-%n
SlurmctldPidFile={dir}/slurmctld.pid
SlurmdPidFile={dir}/slurmd-%n.pid
KillWait=60
NodeName=node1 NodeAddr=127.0.0.1 Port={ports[1]} CPUs=4
NodeName=node2 NodeAddr=127.0.0.2 Port={ports[2]} CPUs=4
PartitionName=main Nodes=ALL Default=YES
"""  # requeued jobs wait until the credentials of their steps have expired
ON_NODE = 'mount --bind "$0" /etc/hosts && hostname "$1" && shift && exec "$@"'
STEPS = 200
RUN = {
    "model.depth": 2, "model.width": 32, "model.num_heads": 2, "train.batch_size": 16, "train.steps": STEPS,
    "train.log_every": 2, "train.sample_every": 0, "train.checkpoint_every": STEPS, "train.compile": False,
}  # fmt: skip


class Cluster:
    """A SLURM of two nodes, in a directory."""

    def __init__(self, directory):
        self.dir, self.daemons = directory, []
        self.env = os.environ | {
            "SLURM_CONF": f"{directory}/slurm.conf",
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": str(ROOT),
        }
        (directory / "slurm.conf").write_text(CONF.format(dir=directory, ports=free_ports(3)))
        (directory / "hosts").write_text("127.0.0.1 localhost node1\n127.0.0.2 node2\n")
        (directory / "munge.key").write_bytes(os.urandom(1024))
        (directory / "munge.key").chmod(0o400)
        directory.chmod(0o755)

    def start(self):
        """Start the daemons and wait until both nodes are idle."""
        files = {"key-file": "key", "socket": "sock", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        self._start("munged", "--foreground", "--force", *(f"--{k}={self.dir}/munge.{v}" for k, v in files.items()))
        wait(lambda: (self.dir / "munge.sock").exists())
        for name, daemon in ((NODES[0], "slurmctld"), *((node, "slurmd") for node in NODES)):
            namespaces = ("unshare", "--mount", "--uts", "sh", "-c", ON_NODE, f"{self.dir}/hosts", name)
            self._start(*namespaces, daemon, "-D", "-f", f"{self.dir}/slurm.conf")
        wait(lambda: self.run("sinfo", "--noheader", "--format=%D %T", check=False).strip() == "2 idle", 60)

    def _start(self, *command):
        with open(self.dir / "daemons.log", "ab") as log:
            self.daemons.append(subprocess.Popen(command, env=self.env, stdout=log, stderr=log))

    def run(self, *command, check=True):
        """Return what a command of SLURM prints."""
        return subprocess.run(command, env=self.env, cwd=ROOT, check=check, stdout=-1, text=True, timeout=60).stdout

    def submit(self, framework, workdir):
        """Submit a job with a task on each node and return its number."""
        resources = ("--nodes=2", "--gpus-per-node=0", "--ntasks-per-node=1", "--cpus-per-task=1")
        options = [f"--config.{name}={value}" for name, value in RUN.items()]
        script = (f"launch/slurm_{framework}.sh", "configs/digits.py", str(workdir), *options)
        return self.run("sbatch", "--parsable", f"--output={workdir}.log", *resources, *script).strip()

    def state(self, job):
        """Return the state of a job, such as RUNNING, PENDING or COMPLETED."""
        return self.run("scontrol", "show", "job", job).partition("JobState=")[2].split()[0]

    def wait_for_lines(self, job, path, num):
        """Wait until a running job has logged more than `num` lines."""

        def logged():
            assert self.state(job) not in ("FAILED", "COMPLETED"), path.parent.with_suffix(".log").read_text()
            return num_lines(path) > num

        wait(logged)

    def stop(self):
        """Cancel all jobs and end the daemons."""
        self.run("scancel", "--user=root", check=False)
        for daemon in reversed(self.daemons):
            daemon.terminate()
        for daemon in self.daemons:
            daemon.wait(60)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


def free_ports(num):
    sockets = [socket.create_server(("", 0)) for _ in range(num)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def wait(done, seconds=300.0):
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)


def num_lines(path):
    return path.read_text().count("\n") if path.exists() else 0


@pytest.mark.parametrize("framework", ["jax", "torch"])
def test_a_job_that_is_preempted_ends_like_an_undisturbed_one(cluster, tmp_path, framework):
    whole = cluster.submit(framework, tmp_path / "whole")
    job, metrics = cluster.submit(framework, tmp_path / "broken"), tmp_path / "broken/metrics.jsonl"
    log = tmp_path / "broken.log"
    stop = {  # preemption; and the signal that SLURM sends before the time limit
        1: ("scontrol", "requeue", job), 2: ("scancel", "--batch", "--signal=USR1", job),
    }  # fmt: skip
    for time_stopped, command in stop.items():
        cluster.wait_for_lines(job, metrics, num_lines(metrics) + 2)
        cluster.run(*command)
        wait(lambda n=time_stopped: log.read_text().count("asked to stop: saved step") == n, 90)
    for each in (job, whole):
        wait(lambda each=each: cluster.state(each) not in ("PENDING", "RUNNING", "COMPLETING"), 600)
        assert cluster.state(each) == "COMPLETED", log.read_text()
    saved, resumed = (re.findall(rf"{words} step (\d+)", log.read_text()) for words in ("stop: saved", "resuming from"))
    assert saved == resumed and 0 < int(saved[0]) < int(saved[1]) < STEPS
    assert metrics.read_bytes() == (tmp_path / "whole/metrics.jsonl").read_bytes()
    read = importlib.import_module(f"{framework}_impl.checkpoints").read_weights
    found, expected = (read(str(tmp_path / name), -1)[1] for name in ("broken", "whole"))
    assert found.keys() == expected.keys() and found
    difference = max(np.abs(np.asarray(found[name]) - np.asarray(expected[name])).max() for name in found)
    print(f"{framework}: stopped at steps {saved}; largest difference of the final weights {difference}")
    assert difference == 0
