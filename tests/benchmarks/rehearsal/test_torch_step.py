"""The PyTorch half: its estimate beside the truth, and what it finds in DDP and FSDP."""

import json
import os
import subprocess
import sys

import pytest

from benchmarks import cases, memory
from benchmarks.rehearsal import attempts
from meanflow.config import store

DIT = "model.depth=3 model.width=384 model.num_heads=6 train.batch_size=32 model.compute_dtype=float32"
UNET = "model.width=32 train.batch_size=16"
FAMILIES = [
    ("dit", "meanflow"),
    ("imf_dit", "improved"),
    ("dmf_dit", "decoupled"),
    ("edm2", "rectified"),
    ("unet", "meanflow"),
]


def preset(name, *settings):
    """Return a preset with settings, as it runs without torch.compile."""
    return cases.override(store.load_file(f"configs/{name}"), ["train.compile=False", *settings])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "settings"), [("meanflow_imagenet.py:b4", DIT), ("meanflow_cifar10.py:v1", UNET)])
def test_the_estimate_is_the_memory_that_a_step_takes_on_a_cpu(name, settings):
    config = preset(name, *settings.split())
    estimate = attempts.rehearse("torch", config, "h100", 1, 1)["peak_bytes"]
    measured = memory.of_step("torch", config)["peak_bytes"]
    assert estimate == pytest.approx(measured, rel=0.1)


@pytest.fixture(scope="module")
def tiny_recipe():
    """Return the module of tiny recipes."""
    import tiny

    return tiny


@pytest.mark.parametrize(("network", "method"), FAMILIES)
def test_every_system_is_rehearsed(tiny_recipe, network, method):
    changes = {"train.ema_decays": (0.9,), "train.batch_size": 32}
    found = attempts.rehearse("torch", tiny_recipe.make(network, method, changes), "h100", 8, 1)
    parts = found["parts"]
    assert sum(parts.values()) == found["peak_bytes"] and min(parts.values()) >= 0
    assert parts["optimizer"] >= 2 * parts["ema"] > 0 and parts["gradients"] > 0
    assert found["collectives"]["all-reduce"]["count"] >= 1
    assert found["flops"] > found["forward_flops"] > 0
    assert any(row["where"].startswith("torch_impl/") for row in found["largest"])


def test_fsdp_shards_the_state_and_gathers_all_of_it_at_once(tiny_recipe):
    found = {}
    for fsdp in (1, 4):
        config = tiny_recipe.make(changes={"train.fsdp": fsdp, "train.ema_decays": (0.9,), "model.width": 64})
        found[fsdp] = attempts.rehearse("torch", config, "h100", 4, 1)
    assert found[4]["parts"]["optimizer"] < 0.3 * found[1]["parts"]["optimizer"]
    assert set(found[1]["collectives"]) == {"all-reduce"}
    gathered, scattered = (found[4]["collectives"][kind] for kind in ("all-gather", "reduce-scatter"))
    assert gathered["count"] == scattered["count"] == 1
    assert gathered["bytes"] == pytest.approx(found[1]["collectives"]["all-reduce"]["bytes"], rel=0.01)
    assert scattered["bytes"] == pytest.approx(gathered["bytes"] / 4, rel=0.01)


@pytest.mark.slow
def test_a_compiled_step_is_rehearsed_too(tiny_recipe):
    found = attempts.rehearse("torch", tiny_recipe.make(changes={"train.compile": True}), "h100", 1, 1)
    assert set(found["peaks"]) == {"compiled", "eager"} and found["peak_kind"].startswith("compiled")
    assert found["peak_bytes"] == found["peaks"]["compiled"]


MUTATION = """
import sys
from benchmarks.rehearsal import torch_step
from torch_impl import step
kept = []
original = step.Loss.forward
def forward(self, *args):
    kept.append([a.clone() for a in self.net.parameters()])  # which nothing frees
    return original(self, *args)
step.Loss.forward = forward
torch_step.main(*sys.argv[1:])
"""


def test_a_copy_of_the_parameters_that_is_kept_is_seen(tiny_recipe, tmp_path):
    config = tiny_recipe.make(changes={"model.width": 64})
    path = tmp_path / "config.json"
    path.write_text(store.to_json(config))
    done = subprocess.run(
        [sys.executable, "-c", MUTATION, path, "h100", "1", "1"], capture_output=True, text=True, check=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    mutated, found = json.loads(done.stdout.splitlines()[-1]), attempts.rehearse("torch", config, "h100", 1, 1)
    assert mutated["peak_bytes"] - found["peak_bytes"] >= 0.9 * found["parts"]["ema"] / len(config.train.ema_decays)
