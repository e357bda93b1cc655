"""Processes on several hosts, which torchrun numbers host by host: their mesh, and the GPU of each."""

from types import SimpleNamespace

import pytest
import torch

from meanflow.commands import train as training
from meanflow.errors import UserError
from torch_impl import devices, step, train

CPU = torch.device("cpu")


@pytest.fixture
def processes(monkeypatch):
    """Return a function that pretends that there are `world` processes, `per_host` on a host."""

    def pretend(world, per_host):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(per_host))
        monkeypatch.setattr(step.dist, "is_initialized", lambda: True)
        monkeypatch.setattr(step.dist, "get_world_size", lambda: world)
        monkeypatch.setattr(step, "init_device_mesh", lambda kind, shape, mesh_dim_names: shape)

    return pretend


@pytest.mark.parametrize(("fsdp", "shape"), [(1, (16, 1)), (2, (8, 2)), (8, (2, 8)), (16, (1, 16))])
def test_groups_within_a_host_or_of_whole_hosts(tiny, processes, fsdp, shape, caplog):
    processes(16, 8)
    assert step.make_mesh(tiny({"train.fsdp": fsdp}), CPU) == shape
    assert ("config.train.fsdp 16 spans 2 hosts" in caplog.text) == (fsdp == 16)


@pytest.mark.parametrize(("world", "per_host", "fsdp"), [(12, 6, 4), (16, 8, 3), (16, 8, 32)])
def test_groups_that_split_hosts_are_refused(tiny, processes, world, per_host, fsdp):
    processes(world, per_host)
    with pytest.raises(UserError, match=f"config.train.fsdp {fsdp} does not divide the {world} processes into groups"):
        step.make_mesh(tiny({"train.fsdp": fsdp}), CPU)


def test_one_process(tiny):
    assert step.make_mesh(tiny(), CPU) is None
    with pytest.raises(UserError, match="config.train.fsdp 8 does not divide the 1 processes"):
        step.make_mesh(tiny({"train.fsdp": 8}), CPU)


@pytest.fixture
def started(monkeypatch, tiny):
    """Return a function (num_gpus, env) -> the device on a host of that many GPUs, and how the processes are joined."""

    def start(num_gpus, **env):
        found = {}
        monkeypatch.setattr(devices.os, "environ", env)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: num_gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: found.update(set=device))
        monkeypatch.setattr(devices, "set_precision", lambda config: None)
        monkeypatch.setattr(devices.dist, "init_process_group", lambda **group: found.update(group))
        monkeypatch.setattr(devices.dist, "get_rank", lambda: 5)
        monkeypatch.setattr(devices.dist, "get_world_size", lambda: 16)
        return devices.start_torch(tiny()), found

    return start


def test_each_process_has_its_own_gpu(started, caplog):
    caplog.set_level("INFO")
    device, found = started(8, RANK="5", LOCAL_RANK="5", LOCAL_WORLD_SIZE="8")
    assert device == found["set"] == torch.device("cuda", 5)
    assert "device_id" not in found  # with it, a mesh would split gloo's group by NCCL's options
    assert (found["backend"], found["timeout"]) == ("cpu:gloo,cuda:nccl", devices.TIMEOUT)
    assert "process 5 of 16 on " in caplog.text and ": cuda:5, of 8 GPUs" in caplog.text
    assert started(1, RANK="5", LOCAL_RANK="5")[0] == torch.device("cuda", 0)  # srun --gpus-per-task=1
    with pytest.raises(UserError, match="process 5 on .* has no GPU: only 4 can be used"):
        started(4, RANK="5", LOCAL_RANK="5", LOCAL_WORLD_SIZE="8")


def test_a_process_alone_says_that_it_leaves_gpus_idle(started, caplog):
    device, found = started(8)
    assert (device, found["world_size"]) == (torch.device("cuda", 0), 1)
    assert "1 of the 8 GPUs on" in caplog.text


def test_tasks_without_torchrun_are_refused(started):
    srun = {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "4"}
    alone = {"RANK": "0", "WORLD_SIZE": "8", "GROUP_WORLD_SIZE": "1"}  # torchrun --standalone in each task
    for env in ({}, alone):
        with pytest.raises(UserError, match="srun started 4 tasks.* start one torchrun per node"):
            started(0, **srun, **env)
    started(0, **srun, RANK="0", WORLD_SIZE="32", GROUP_WORLD_SIZE="4")
    started(0, **srun, RANK="0", WORLD_SIZE="4")  # without torchrun


def test_processes_that_cannot_be_joined(started, tiny, monkeypatch):
    def refuse(**group):
        raise ValueError("Error initializing torch.distributed using env:// rendezvous: WORLD_SIZE expected")

    started(0)
    monkeypatch.setattr(devices.dist, "init_process_group", refuse)
    with pytest.raises(UserError, match="cannot join the other processes: .* WORLD_SIZE expected"):
        devices.start_torch(tiny())


def test_processes_wait_for_the_one_that_evaluates(tiny, monkeypatch, tmp_path):
    """Not in the next step, whose groups of a sharded state give up sooner."""
    order, config = [], tiny({"train.evaluate_every": 1, "evaluation.every_ema": False})
    monkeypatch.setattr(train, "dist", SimpleNamespace(get_rank=lambda: 1, get_world_size=lambda: 2))
    monkeypatch.setattr(training, "evaluate", lambda *_: (order.append("evaluated"), ({}, None))[1])
    monkeypatch.setattr(train.weights, "to_canonical", lambda *_: {})
    monkeypatch.setattr(train, "wait_for_all", lambda: order.append("waited"))
    _, (_, evaluation), _ = train.make_reports(config, torch.device("cpu"), tmp_path)
    evaluation(1, SimpleNamespace(net=torch.nn.Identity(), emas=({}, {})), SimpleNamespace(write=lambda *_: None))
    assert order == ["evaluated", "waited"]
