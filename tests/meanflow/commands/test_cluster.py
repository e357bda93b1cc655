"""What SLURM, torchrun and CUDA say in the environment, given as dictionaries."""

import subprocess

import pytest

from meanflow.commands import cluster
from meanflow.errors import UserError


def task(local=0, per_node="8", **env):
    """Return the environment of a task that srun started."""
    counts = {"SLURM_STEP_TASKS_PER_NODE": per_node, "SLURM_TASKS_PER_NODE": "1(x9)"}
    return {"SLURM_PROCID": "0", "SLURM_NODEID": "0", "SLURM_LOCALID": str(local), **counts, **env}


@pytest.mark.parametrize(
    ("visible", "num"),
    [("0,1,2,3", 4), ("3", 1), ("", 0), ("NoDevFiles", 0), ("-1", 0), ("0, 1,-1,2", 2),
     ("GPU-8932f937-d72c,GPU-1", 2), ("MIG-GPU-1/1/0", 1)],
)  # fmt: skip
def test_gpus_that_cuda_may_use(visible, num):
    assert cluster.visible_gpus({"CUDA_VISIBLE_DEVICES": visible}) == num


def test_gpus_that_are_there(monkeypatch, tmp_path):
    """Asked of nvidia-smi, else of the kernel; none where neither knows any."""
    listed = (
        "GPU 0: NVIDIA A100 (UUID: GPU-1)\n  MIG 1g.5gb Device 0: (UUID: MIG-1)\nGPU 1: NVIDIA A100 (UUID: GPU-2)\n"
    )
    answers = [
        lambda: subprocess.CompletedProcess([], 0, listed, ""),
        lambda: subprocess.CompletedProcess([], 9, "NVIDIA-SMI has failed", ""),
    ]

    def answer(argv, **options):
        if not answers:
            raise FileNotFoundError(argv[0])
        return answers.pop(0)()

    monkeypatch.setattr(cluster.subprocess, "run", answer)
    monkeypatch.setattr(cluster.pathlib, "Path", lambda path: tmp_path)
    (tmp_path / "0000:01:00.0").mkdir()
    assert [cluster.visible_gpus({}) for _ in range(3)] == [2, 1, 1]
    (tmp_path / "0000:01:00.0").rmdir()
    assert cluster.visible_gpus({}) == 0


@pytest.mark.parametrize(
    ("env", "place"),
    [
        ({}, None),
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8"}, None),
        (task(3), (3, 8)),
        (task(0, "2(x3),1", SLURM_NODEID="2"), (0, 2)),
        (task(0, "2(x3),1", SLURM_NODEID="3"), (0, 1)),
        ({"SLURM_LOCALID": "1", "SLURM_TASKS_PER_NODE": "4"}, (1, 4)),
        ({"SLURM_LOCALID": "1"}, None),
        (task(0) | {"OMPI_MCA_orte_hnp_uri": "1.0;tcp://a:1", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
                    "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, (1, 2)),
    ],
)  # fmt: skip
def test_place_on_the_node(env, place):
    assert cluster.place_on_node(env) == place


@pytest.mark.parametrize(
    ("env", "visible", "expected"),
    [
        (task(0, "1"), 8, [0, 1, 2, 3, 4, 5, 6, 7]),  # one task on a node of eight: JAX itself takes GPU 0 alone
        (task(3, "8"), 8, [3]),
        (task(1, "2"), 8, [4, 5, 6, 7]),
        (task(3, "4(x2)", SLURM_GPUS_PER_TASK="1"), 1, [0]),  # numbered from 0 in each task: JAX itself takes GPU 3
        (task(3, "4", SLURM_GPUS_PER_TASK="a100:2"), 2, [0, 1]),
        (task(1, "2", SLURM_TRES_PER_TASK="cpu=8,gres/gpu:a100=4"), 4, [0, 1, 2, 3]),
        (task(1, "2", SLURM_TRES_PER_TASK="cpu=4,gres/gpu=8"), 4, [2, 3]),
        (task(1, "2", SLURM_GPU_BIND="per_task:2"), 2, [0, 1]),
        (task(1, "2", SLURM_GPU_BIND="map_gpu:0,1"), 1, [0]),
        (task(1, "4", SLURM_GPUS_PER_TASK="1", SLURM_GPU_BIND="none"), 4, [1]),
        (task(1, "4", SLURM_GPUS_PER_TASK="1", SLURM_TRES_BIND="gres/gpu:none"), 4, [1]),
        (task(0, "4"), 0, None),  # no GPUs
        ({}, 8, None),  # no scheduler
        (task(0, "1", JAX_LOCAL_DEVICE_IDS="2,3"), 8, None),  # the user has chosen
    ],
)
def test_gpus_of_a_task(env, visible, expected):
    assert cluster.gpus_of_task(env, visible) == expected


@pytest.mark.parametrize(
    ("env", "visible"),
    [(task(0, "3"), 8), (task(0, "8"), 4), (task(0, "2", SLURM_GPU_BIND="closest"), 4)],
)
def test_gpus_that_tasks_cannot_share_are_refused(env, visible):
    with pytest.raises(UserError, match=rf"cannot divide the {visible} GPUs .* one task per node or one per GPU"):
        cluster.gpus_of_task(env, visible)


def test_every_gpu_of_a_node_has_one_task():
    for num_tasks in (1, 2, 4, 8):
        taken = [gpu for i in range(num_tasks) for gpu in cluster.gpus_of_task(task(i, str(num_tasks)), 8) or []]
        assert taken == list(range(8))


@pytest.mark.parametrize(
    ("env", "visible", "gpu"),
    [
        ({}, 8, 0),
        ({"LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "8", "TORCHELASTIC_RUN_ID": "none"}, 8, 3),
        ({"LOCAL_RANK": "3"}, 1, 0),  # srun --gpus-per-task=1
        ({"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "8", "TORCHELASTIC_RUN_ID": "none"}, 1, 0),  # --virtual-local-rank
    ],
)
def test_gpu_of_a_pytorch_process(env, visible, gpu):
    assert cluster.gpu_of_rank(env, visible) == gpu


@pytest.mark.parametrize(("elastic", "visible"), [({"TORCHELASTIC_RUN_ID": "none"}, 1), ({}, 2)])
def test_more_processes_than_gpus_are_refused(elastic, visible):
    with pytest.raises(UserError, match=rf"process 3 on .* only {visible} .* --nproc_per_node={visible}"):
        cluster.gpu_of_rank({"LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "4", **elastic}, visible)


def test_idle_gpus_are_named_once_a_node(caplog):
    for rank in range(2):
        cluster.warn_of_idle_gpus({"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"}, 8)
    assert caplog.text.count("2 of the 8 GPUs on") == 1 and "torchrun --nproc_per_node=8 uses all" in caplog.text
    caplog.clear()
    cluster.warn_of_idle_gpus({}, 1)
    cluster.warn_of_idle_gpus({"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "8"}, 8)
    assert not caplog.records
    cluster.warn_of_idle_gpus({}, 8)
    assert "1 of the 8 GPUs on" in caplog.text


def test_tasks_that_do_not_know_of_each_other_are_refused():
    cluster.check_started_together({}, 1, "")
    cluster.check_started_together({"SLURM_NTASKS": "8"}, 1, "")  # an allocation: one process started by hand
    cluster.check_started_together(task(SLURM_STEP_NUM_TASKS="1"), 1, "")
    cluster.check_started_together(task(SLURM_STEP_NUM_TASKS="16"), 16, "")
    with pytest.raises(UserError, match="srun started 16 tasks .* all the work: add --distributed"):
        cluster.check_started_together(task(SLURM_STEP_NUM_TASKS="16"), 1, "add --distributed")


@pytest.mark.parametrize(
    ("env", "num"),
    [({}, 1), ({"WORLD_SIZE": "8"}, 8), ({"WORLD_SIZE": "16", "GROUP_WORLD_SIZE": "2"}, 2),
     ({"WORLD_SIZE": "8", "GROUP_WORLD_SIZE": "1"}, 1)],
)  # fmt: skip
def test_tasks_that_pytorch_has_joined(env, num):
    """The last is torchrun --standalone, which several tasks would each start on their own."""
    assert cluster.tasks_joined(env) == num


def test_gpus_of_a_node():
    assert cluster.gpus_of_node({}, 2) == 2
    assert cluster.gpus_of_node({"SLURM_GPUS_ON_NODE": "8"}, 1) == 8
