"""The mesh of devices on several hosts, with stand-ins for the hardware."""

import dataclasses
import pathlib
import re

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding

from jax_impl import devices, step
from meanflow.errors import UserError


@dataclasses.dataclass(frozen=True)
class Device:
    """What JAX says of a GPU: each host is a slice."""

    id: int
    process_index: int
    slice_index: int | None
    platform: str = "gpu"
    device_kind: str = "NVIDIA H100 80GB HBM3"


def gpus(hosts, per_host, per_process):
    """Return the GPUs of equal hosts and processes, shuffled."""
    found = [Device(i, i // per_process, i // per_host) for i in range(hosts * per_host)]
    return [found[i] for i in np.random.RandomState(0).permutation(len(found))]


def owned_rows(mesh, num_rows):
    """Return {process: its rows of a batch, in the order of its devices}."""
    indices = NamedSharding(mesh, step.BATCH).devices_indices_map((num_rows,))
    owned = {}
    for device in sorted(indices, key=lambda device: device.id):
        owned.setdefault(device.process_index, []).extend(range(num_rows)[indices[device][0]])
    return owned


def test_jax_itself_refuses_two_hosts_of_gpus():
    with pytest.raises(ValueError, match="multi-slice"):
        jax.make_mesh((16, 1), ("data", "fsdp"), devices=gpus(2, 8, 8))


@pytest.mark.parametrize(("per_process", "fsdp"), [(8, 1), (8, 2), (8, 8), (1, 1), (1, 8), (2, 4), (4, 16)])
def test_processes_own_consecutive_rows_and_groups_stay_on_a_host(per_process, fsdp):
    mesh = devices.device_mesh(gpus(2, 8, per_process), fsdp)
    assert dict(mesh.shape) == {"data": 16 // fsdp, "fsdp": fsdp}
    num = 2 * per_process  # rows of a process, of a batch of 32
    assert owned_rows(mesh, 32) == {p: list(range(p * num, (p + 1) * num)) for p in range(16 // per_process)}
    for group in mesh.devices:
        assert len({device.slice_index for device in group}) == max(1, fsdp // 8)


def test_a_group_over_hosts_is_logged(caplog):
    devices.order_devices(gpus(2, 8, 8), 8)
    assert not caplog.records
    devices.order_devices(gpus(2, 8, 8), 16)
    assert "config.train.fsdp 16 spans 2 hosts" in caplog.text
    assert "8 stays within" in caplog.text


@pytest.mark.parametrize(
    ("hosts", "per_host", "fsdp", "sizes"),
    [(2, 8, 3, "1, 2, 4, 8, 16"), (2, 8, 32, "1, 2, 4, 8, 16"), (2, 6, 4, "1, 2, 3, 6, 12"), (1, 8, 6, "1, 2, 4, 8")],
)  # fmt: skip
def test_groups_that_split_hosts_are_refused_with_the_sizes_that_work(hosts, per_host, fsdp, sizes):
    with pytest.raises(UserError) as refused:
        devices.order_devices(gpus(hosts, per_host, per_host), fsdp)
    assert str(refused.value).startswith(f"config.train.fsdp {fsdp} does not divide the {hosts * per_host} devices")
    assert str(refused.value).endswith(f"choose one of {sizes}")


def test_processes_that_alternate_between_hosts():
    alternating = [Device(i, i, i % 2) for i in range(8)]
    assert devices.order_devices(alternating, 1).shape == (8, 1)
    assert devices.order_devices(alternating, 8).shape == (1, 8)
    with pytest.raises(UserError, match=r"4 does not divide .* 1, 8, or number .* \(srun --distribution=block\)"):
        devices.order_devices(alternating, 4)


def test_a_process_is_a_host_where_devices_have_no_slice():
    hosts = [Device(i, i // 2, None) for i in range(4)]
    assert devices.order_devices(hosts, 2).tolist() == [hosts[:2], hosts[2:]]
    with pytest.raises(UserError, match="2 does not divide the 6 devices into groups within a host"):
        devices.order_devices([Device(i, i // 3, None) for i in range(6)], 2)


def test_no_mesh_is_made_elsewhere():
    root = pathlib.Path(devices.__file__).parents[1]
    for package in ("jax_impl", "benchmarks", "parity", "meanflow"):
        for path in (root / package).rglob("*.py"):
            made = re.search(r"jax\.make_mesh\(|create_device_mesh\(|\bMesh\(", path.read_text())
            assert not made or path.name == "devices.py", path


def test_processes_with_different_numbers_of_devices_are_refused():
    with pytest.raises(UserError, match="same number of devices, but process 0 has 2, process 1 has 1"):
        devices.order_devices([Device(0, 0, 0), Device(1, 0, 0), Device(2, 1, 1)], 1)


def test_meshes_of_this_process(tiny):
    mesh = devices.local_mesh()
    assert (mesh.axis_names, list(mesh.devices.flat)) == (("data", "fsdp"), jax.local_devices())
    assert step.make_mesh(tiny()) == mesh
    with pytest.raises(UserError, match="config.train.fsdp 8 does not divide the 1 devices: choose one of 1"):
        step.make_mesh(tiny({"train.fsdp": 8}))


@pytest.fixture
def joined(monkeypatch, parse_flags):
    """Return a function (argv, env) -> what `jax.distributed.initialize` is told."""

    def join(argv, **env):
        told = []
        monkeypatch.setattr(devices.os, "environ", {"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"} | env)
        monkeypatch.setattr(devices.jax.distributed, "initialize", lambda **arguments: told.append(arguments))
        monkeypatch.setattr(devices, "_set_up", lambda config, visible: None)
        parse_flags(devices.define_flags, *argv)
        devices.start_jax(None)
        return told

    return join


SLURM = {"SLURM_PROCID": "1", "SLURM_LOCALID": "0", "SLURM_NODEID": "1", "SLURM_STEP_NUM_TASKS": "2"}


def test_one_task_on_a_node_takes_all_its_gpus(joined):
    """JAX itself takes the one of the task's number, and no other."""
    found = joined(["--distributed"], **SLURM, SLURM_STEP_TASKS_PER_NODE="1(x2)")
    assert found == [{"local_device_ids": [0, 1, 2, 3, 4, 5, 6, 7]}]


def test_tasks_that_cannot_share_the_gpus_end_with_one_message(joined):
    with pytest.raises(UserError, match=r"^3 tasks on .* cannot divide the 8 GPUs"):
        joined(["--distributed"], **SLURM, SLURM_STEP_TASKS_PER_NODE="3(x2)")


def test_processes_started_by_hand_take_all_gpus_inside_an_allocation_too(joined):
    (found,) = joined(["--coordinator=a:1", "--num_processes=2", "--process=1"], **SLURM)
    assert found == {
        "coordinator_address": "a:1", "num_processes": 2, "process_id": 1, "cluster_detection_method": "deactivate",
    }  # fmt: skip


def test_tasks_without_the_flag_are_refused(joined):
    with pytest.raises(UserError, match="srun started 2 tasks.* add --distributed"):
        joined([], **SLURM)
    assert joined([]) == []


def test_the_log_says_which_devices_a_process_has(tiny, parse_flags, monkeypatch, caplog):
    """GPUs that are there and not used are counted too."""
    parse_flags(devices.define_flags)
    monkeypatch.setattr(devices, "set_precision", lambda config: None)
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "8")
    monkeypatch.setattr(devices.jax, "local_devices", lambda: gpus(1, 2, 2))
    caplog.set_level("INFO")
    devices.start_jax(tiny())
    assert "process 0 of 1 on " in caplog.text and ": 2 of its 8 devices (NVIDIA H100 80GB HBM3)" in caplog.text
