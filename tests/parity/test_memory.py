"""Large files: what converting and loading them needs in memory.

A Flax msgpack file is not among them: it is read whole, with its optimizer.
"""

import json
import subprocess
import sys

import orbax.checkpoint as ocp
import pytest
import tiny
import torch

from meanflow.config import store
from meanflow.weights import layouts
from torch_impl.step import build_net

# Prints the peak of a process in bytes, once the frameworks have started and in all.  ru_maxrss would be the parent's
# where that had more, since a process begins as a copy of it.
MEASURED = """
import json, pathlib, re, sys
import jax_impl.model, torch_impl.model
from parity import convert

def peak():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1])

jax_impl.model.jnp.zeros(1).block_until_ready()
before = peak()
{call}
print(json.dumps([before, peak()]))
"""
# How many times the weights Orbax may hold beyond them, since it decompresses up to a GB; not two other networks.
OF_ORBAX = 1.1
CALLS = {  # and how many times the weights each may need
    "convert.main([*sys.argv[1:3], '--config', sys.argv[3]])": 1.3,
    "torch_impl.load(sys.argv[1], config=sys.argv[3])": 2.3,  # the network is a copy of the weights
    "jax_impl.load(sys.argv[1], config=sys.argv[3])": 2.3,
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Return a training checkpoint, in which the EMA is a quarter, the size of that in bytes, and a config's file."""
    directory = tmp_path_factory.mktemp("large")
    config = tiny.make("dit", "meanflow", {"model.depth": 5, "model.width": 1024, "model.num_heads": 16})
    net = build_net(config)
    ema = net.state_dict()
    others = [{name: a + i for name, a in ema.items()} for i in range(1, 4)]
    state = {"ema": ema, "model": others[0], "opt": {"state": {i: a for i, a in enumerate(others[1:])}}}
    torch.save(state, directory / "checkpoint.pt")
    torch.save(ema, directory / "bare.pt")
    trees = [layouts.flax_tree({n: a.numpy() + i for n, a in ema.items()} | net.tables()) for i in range(3)]
    state = {"ema_params": trees[0], "params": trees[1], "opt_state": trees[2]}
    ocp.PyTreeCheckpointer().save(directory / "checkpoint_3", state)
    (directory / "config.json").write_text(store.to_json(config))
    return directory, sum(a.nbytes for a in ema.values())


@pytest.mark.slow
@pytest.mark.parametrize("call", CALLS, ids=["convert", "torch", "jax"])
@pytest.mark.parametrize("source", ["checkpoint.pt", "bare.pt", "checkpoint_3"])
def test_at_most_a_third_more_than_the_weights(call, source, checkpoint, tmp_path):
    directory, size = checkpoint
    argv = [directory / source, tmp_path / "w.safetensors", directory / "config.json"]
    code = MEASURED.format(call=call)
    done = subprocess.run([sys.executable, "-c", code, *map(str, argv)], check=True, capture_output=True, text=True)
    before, after = json.loads(done.stdout.splitlines()[-1])
    bound = CALLS[call] + OF_ORBAX * (source == "checkpoint_3")
    assert 0.9 < (after - before) / size <= bound
