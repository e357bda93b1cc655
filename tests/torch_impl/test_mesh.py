"""The mesh of processes on several hosts, which torchrun numbers host by host."""

import pytest
import torch

from configs.errors import UserError
from torch_impl import step

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
