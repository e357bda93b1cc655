"""FLOPs of a step: the formula, and one forward as each framework counts it."""

import importlib

import pytest

from meanflow.commands import flops
from meanflow.config import store

PRESETS = ("", ":unet", ":imf", ":dmf", ":edm2_flow", ":remeanflow", ":flow")
XL2 = 237_236_649_984  # 28 blocks of 256 tokens: 2 * 256 * 28 * (12 * 1152^2 + 2 * 256 * 1152), and embeddings


def load(preset, **options):
    config = store.load_file(f"configs/{preset}")
    config.update_from_flattened_dict(options)
    return config


@pytest.mark.parametrize("preset", PRESETS)
def test_both_frameworks_count_the_same(preset):
    config = load(f"digits.py{preset}")
    counted = [importlib.import_module(f"{name}_impl.flops").count_forward(config) for name in ("jax", "torch")]
    assert counted[0] == counted[1] > 1e6


@pytest.mark.parametrize("framework", ["jax", "torch"])
def test_a_forward_of_xl2(framework):
    count = importlib.import_module(f"{framework}_impl.flops").count_forward
    config = load("meanflow_imagenet.py:xl2")
    assert count(config) == XL2
    config.model.attention = "fused"  # counts the same
    assert count(config) == XL2
    tokens, width = 256, 1152
    assert pytest.approx(2 * tokens * 28 * (12 * width**2 + 2 * tokens * width), rel=0.01) == XL2


@pytest.mark.parametrize(
    ("preset", "options", "expected"),
    [
        ("digits.py:flow", {}, 3),
        ("digits.py:dmf", {"method.guidance_type": "default"}, 7),
        ("digits.py:dmf", {"method.guidance_type": "mg"}, 10),
        ("digits.py", {"method.flow_fraction": 0.75, "method.guidance": False}, 3.25),
        ("digits.py", {"method.flow_fraction": 0.75, "method.guidance": True, "method.kappa": 0.0}, 4.25),
        ("digits.py", {"method.flow_fraction": 0.75, "method.guidance": True, "method.kappa": 0.5}, 4.5),
        ("digits.py:remeanflow", {"method.flow_fraction": 0.75, "method.guidance": True, "method.kappa": 0.0}, 4.5),
        ("imf_imagenet.py:xl2", {"method.flow_fraction": 0.5, "model.depth": 48, "model.head_depth": 8}, 5.5),
    ],
)
def test_the_forwards_of_a_step(preset, options, expected):
    config = load(preset, **options)
    assert flops.forwards(config) == pytest.approx(expected)
    config.train.batch_size = 32
    assert flops.of_step(config, 1e9) == pytest.approx(expected * 32e9)
