"""Detects hosts, tasks and GPUs from the environment, and checks which devices share a sharded copy of the state."""

import itertools
import pathlib
import re
import socket
import subprocess
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence

from absl import logging

from meanflow.errors import UserError

Environment = Mapping[str, str]
OWN_GPUS = ("per_task", "single", "map", "mask")  # kinds of SLURM's --gpu-bind that give each task its own GPUs


def visible_gpus(env: Environment) -> int:
    """Return how many NVIDIA GPUs this process may use, without initialising any; 0 if unknown."""
    if "CUDA_VISIBLE_DEVICES" in env:  # CUDA itself stops at the first invalid entry
        entries = (entry.strip() for entry in env["CUDA_VISIBLE_DEVICES"].split(","))
        return len(list(itertools.takewhile(re.compile(r"\d+$|GPU-|MIG-").match, entries)))
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        listed = None
    if listed is not None and listed.returncode == 0:
        return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())
    return len(list(pathlib.Path("/proc/driver/nvidia/gpus").glob("*")))


def gpus_of_node(env: Environment, visible: int) -> int:
    """Return how many GPUs this job has on this node.  visible: how many of them this process sees."""
    allocated = env.get("SLURM_GPUS_ON_NODE", "")
    return max(visible, int(allocated) if allocated.isdigit() else 0)


def tasks_of_step(env: Environment) -> int:
    """Return how many tasks `srun` started, including this one; 1 without `srun`."""
    return int(env.get("SLURM_STEP_NUM_TASKS", 1)) if "SLURM_PROCID" in env else 1


def place_on_node(env: Environment) -> tuple[int, int] | None:
    """Return the index of this task on its node and the number of tasks there; None without a scheduler.

    Open MPI takes precedence over SLURM, as in `jax.distributed`.
    """
    if "OMPI_MCA_orte_hnp_uri" in env:
        return int(env["OMPI_COMM_WORLD_LOCAL_RANK"]), int(env["OMPI_COMM_WORLD_LOCAL_SIZE"])
    tasks = env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_TASKS_PER_NODE")
    if "SLURM_LOCALID" not in env or not tasks:
        return None
    counts = []  # tasks per node: 4(x2),1 means 4, 4, 1
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", tasks):
        counts += [int(count)] * int(times or 1)
    return int(env["SLURM_LOCALID"]), counts[int(env.get("SLURM_NODEID", 0))]


def gpus_of_task(env: Environment, visible: int) -> list[int] | None:
    """Return which of the `visible` GPUs this task of a scheduler uses; None leaves the choice to JAX.

    By default JAX uses one GPU per task, so one task on an eight-GPU node would leave seven idle.  Here a task uses all
    GPUs that SLURM bound to it alone; otherwise the tasks of a node divide the GPUs they all see.
    Raises UserError if the GPUs cannot be divided evenly.
    """
    place = place_on_node(env)
    if not visible or place is None or "JAX_LOCAL_DEVICE_IDS" in env:
        return None
    task, num_tasks = place
    if num_tasks == 1 or visible == 1 or _has_own_gpus(env, visible):
        return list(range(visible))
    if visible % num_tasks or "closest" in _gpu_binding(env):
        raise UserError(
            f"{num_tasks} tasks on {socket.gethostname()} cannot divide the {visible} GPUs that each of them sees: "
            "start one task per node or one per GPU, with srun --gpu-bind=none"
        )
    share = visible // num_tasks
    return list(range(task * share, (task + 1) * share))


def _has_own_gpus(env, visible):
    binding = _gpu_binding(env)
    if "none" in binding:
        return False
    return _gpus_per_task(env) == visible or any(kind in binding for kind in OWN_GPUS)


def _gpus_per_task(env):
    """Return the GPUs requested by --gpus-per-task (2, a100:2) or --tres-per-task (cpu=4,gres/gpu:a100=2), else 0."""
    found = re.search(r"^(?:\w+:)?(\d+)$", env.get("SLURM_GPUS_PER_TASK", "")) or re.search(
        r"gres[/:]gpu(?::[a-z]\w*)?[=:](\d+)", env.get("SLURM_TRES_PER_TASK", "")
    )
    return int(found[1]) if found else 0


def _gpu_binding(env):
    return env.get("SLURM_GPU_BIND", "") + env.get("SLURM_TRES_BIND", "")


def tasks_joined(env: Environment) -> int:
    """Return how many scheduler tasks have joined: one per torchrun, or one per rank without torchrun."""
    return int(env.get("GROUP_WORLD_SIZE") or env.get("WORLD_SIZE") or 1)


def gpu_of_rank(env: Environment, visible: int) -> int:
    """Return which of the `visible` GPUs a PyTorch process uses: the one numbered LOCAL_RANK.

    Without torchrun, a process that sees a single GPU uses that one, since SLURM numbers the GPUs of each task from 0.
    Raises UserError if there are more processes than GPUs.
    """
    rank = int(env.get("LOCAL_RANK", 0))
    if rank >= visible:
        if visible == 1 and "TORCHELASTIC_RUN_ID" not in env:
            return 0
        raise UserError(
            f"process {rank} on {socket.gethostname()} has no GPU: only {visible} can be used there.  Start "
            f"torchrun with --nproc_per_node={visible}, or hide the GPUs by CUDA_VISIBLE_DEVICES= to compute on the CPU"
        )
    return rank


def warn_of_idle_gpus(env: Environment, visible: int) -> None:
    """Log a warning, once per host, if it runs fewer PyTorch processes than it has `visible` GPUs."""
    rank, num_ranks = int(env.get("LOCAL_RANK", 0)), int(env.get("LOCAL_WORLD_SIZE", 1))
    if rank == 0 and num_ranks < visible:
        logging.warning(
            "%d of the %d GPUs on %s are used; torchrun --nproc_per_node=%d uses all",
            num_ranks, visible, socket.gethostname(), visible,
        )  # fmt: skip


def check_started_together(env: Environment, joined: int, remedy: str) -> None:
    """Raise UserError if `srun` started more tasks than have `joined`, since the others would repeat the work.

    remedy: how to start them instead, for the message.
    """
    if tasks_of_step(env) > joined:
        raise UserError(
            f"srun started {tasks_of_step(env)} tasks that have not joined each other, "
            f"so each would do all the work: {remedy}"
        )


def check_groups(hosts: Sequence[Hashable], fsdp: int, kind: str) -> None:
    """Raise UserError unless `train.fsdp` divides the devices into groups, each within a host or of whole hosts.

    hosts: the host of each device, in grouping order.  kind: what the message calls devices.
    Logs a warning if groups span hosts, because parameters then cross the network in every step.
    """
    if not _keeps_hosts(hosts, fsdp):
        sizes = [size for size in range(1, len(hosts) + 1) if _keeps_hosts(hosts, size)]
        into = " into groups within a host or of whole hosts" if len(set(hosts)) > 1 else ""
        raise UserError(
            f"config.train.fsdp {fsdp} does not divide the {len(hosts)} {kind}{into}: choose one of "
            f"{', '.join(map(str, sizes))}{_advice(hosts)}"
        )
    spanned = len(set(hosts[:fsdp]))
    if spanned > 1:
        logging.warning(
            "config.train.fsdp %d spans %d hosts: every step gathers the parameters over the network.  %d stays within "
            "a host, if its memory suffices", fsdp, spanned, min(Counter(hosts).values()),
        )  # fmt: skip


def _advice(hosts):
    changes = sum(one != other for one, other in itertools.pairwise(hosts))
    if changes < len(set(hosts)):
        return ""
    return ", or number the processes of a host consecutively (srun --distribution=block)"


def _keeps_hosts(hosts, size):
    total = Counter(hosts)
    groups = [Counter(hosts[first : first + size]) for first in range(0, len(hosts), size)]
    return len(hosts) % size == 0 and all(len(g) == 1 or all(g[host] == total[host] for host in g) for g in groups)
