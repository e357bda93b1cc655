"""Initial weights: bitwise the same in both frameworks, each a function of (seed, name, shape), all declared."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest
import tiny
import torch
from flax import nnx

from configs import (
    digits,
    dmf_imagenet,
    imf_imagenet,
    meanflow_cifar10,
    meanflow_imagenet,
    remeanflow_imagenet,
)
from jax_impl import step as jax_step
from jax_impl import weights as jax_weights
from meanflow.config import options, store
from meanflow.weights import initial
from torch_impl import step as torch_step
from torch_impl import weights as torch_weights

PUBLISHED = {
    "meanflow": (meanflow_imagenet, "b4"), "cifar10": (meanflow_cifar10, "v1"), "imf": (imf_imagenet, "b2"),
    "dmf": (dmf_imagenet, "dmf_256"), "remeanflow": (remeanflow_imagenet, "64"),
}  # fmt: skip
OTHER_UNET = {"encoder_type": "residual", "decoder_type": "skip", "embedding_type": "fourier"}
SHAPES = {"a.weight": (3, 4), "b.weight": (3, 4), "c_gain": (), "d.phases": (1000,)}  # of EDM2's table


def of_both(config):
    """Return the canonical weights of fresh networks of both frameworks."""
    net = nnx.merge(*jax_step.build_net(config))
    yield jax_weights.to_canonical(net, nnx.state(net, nnx.Param))
    net = torch_step.build_net(config)
    yield torch_weights.to_canonical(net, dict(net.named_parameters()))


def assert_bitwise_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, a in ours.items():
        assert a.dtype == theirs[name].dtype and a.shape == theirs[name].shape, name
        assert a.tobytes() == theirs[name].tobytes(), name


@pytest.mark.parametrize("variant", digits.VARIANTS)
def test_both_frameworks_start_from_the_same_weights(variant):
    assert_bitwise_equal(*of_both(digits.get_config(variant)))


# Prints {canonical name: dtype, shape and digest} of fresh weights.
DIGESTS = """
import hashlib, json, sys
from meanflow.config import store

config = store.from_json(sys.argv[2])
if sys.argv[1] == "jax":
    from flax import nnx
    from jax_impl import step, weights
    net = nnx.merge(*step.build_net(config))
    params = nnx.state(net, nnx.Param)
else:
    from torch_impl import step, weights
    net = step.build_net(config)
    params = dict(net.named_parameters())
drawn = weights.to_canonical(net, params)
print(json.dumps({n: [str(a.dtype), a.shape, hashlib.blake2b(a.tobytes()).hexdigest()] for n, a in drawn.items()}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("system", PUBLISHED)
def test_both_frameworks_start_published_runs_from_the_same_weights(system):
    """In processes of their own, which give their memory back: networks of 700 million parameters are among them."""
    module, variant = PUBLISHED[system]
    found = []
    for framework in ("jax", "torch"):
        argv = [sys.executable, "-c", DIGESTS, framework, store.to_json(module.get_config(variant))]
        found.append(json.loads(subprocess.run(argv, check=True, capture_output=True, text=True).stdout))
    assert found[0] == found[1] and len(found[0]) > 50


def test_float64_networks_start_from_the_weights_of_float32_ones():
    single, _ = of_both(tiny.make("edm2", "rectified"))
    with jax.enable_x64(True):
        double, theirs = of_both(tiny.make("edm2", "rectified", {"model.compute_dtype": "float64"}))
    assert_bitwise_equal(double, theirs)
    assert all(a.dtype == np.float64 and np.array_equal(a, single[name]) for name, a in double.items())


def test_abstract_networks_are_drawn_from_nothing(monkeypatch):
    monkeypatch.delattr(initial, "draw")
    config = digits.get_config("edm2_flow")
    jax_step.abstract_net(config)
    jax_step.abstract_state(config, jax_step.make_mesh(config))
    with torch.device("meta"):
        net = torch_step.build_net(config)
    assert all(p.is_meta for p in net.parameters())


def test_a_weight_is_a_function_of_seed_and_name():
    weights, again, others = (initial.draw("edm2", SHAPES, seed) for seed in (0, 0, 1))
    assert_bitwise_equal(weights, again)
    assert all(a.dtype == np.float32 and a.shape == SHAPES[name] for name, a in weights.items())
    assert not np.isclose(weights["a.weight"], weights["b.weight"]).any()
    assert not np.isclose(weights["a.weight"], others["a.weight"]).any()
    alone = initial.draw("edm2", {"b.weight": (3, 4)}, 0)
    assert_bitwise_equal(alone, {"b.weight": weights["b.weight"]})


def test_a_seed_gives_the_same_weights_for_ever():
    weights = initial.draw("edm2", {"a.weight": (3,), "a.phases": (3,)}, 5)
    assert weights["a.weight"].tolist() == [0.62519770860672, 0.3059140741825104, -1.808164358139038]
    assert weights["a.phases"].tolist() == [0.0767919197678566, 2.2500274181365967, 1.7736189365386963]


def test_no_generator_is_one_of_the_noise_of_samples():
    """Whose keys are (seed, index of the sample)."""
    for name in map(str, range(100)):
        seed, checksum = initial.generator(7, name).bit_generator.state["state"]["key"]
        assert seed == 7 and checksum >= 2**63


@pytest.mark.parametrize(
    ("distribution", "low", "high", "std"),
    [
        (initial.constant(2.0), 2, 2, 0),
        (initial.normal(0.5), -np.inf, np.inf, 0.5),
        (initial.normal_by_width(2.0), -np.inf, np.inf, 2 / 3),  # the last axis has 9
        (initial.uniform(3.0), 0, 3, 3 / 12**0.5),
        (initial.xavier(), -((6 / 6300) ** 0.5), (6 / 6300) ** 0.5, (2 / 6300) ** 0.5),  # (300 + 400) 9
        (initial.xavier(0.1), -0.1 * (6 / 6300) ** 0.5, 0.1 * (6 / 6300) ** 0.5, 0.1 * (2 / 6300) ** 0.5),
        (initial.xavier_of_patches, -((6 / 3900) ** 0.5), (6 / 3900) ** 0.5, (2 / 3900) ** 0.5),  # 300 + 400 * 9
    ],
)
def test_distributions(distribution, low, high, std):
    a = distribution(np.random.default_rng(0), (300, 400, 1, 9))
    assert low <= a.min() and a.max() <= high * (1 + 1e-6)
    assert a.std(dtype=np.float64) == pytest.approx(std, rel=5e-3)
    if np.isfinite(high) and std:
        assert a.min() - low < 1e-4 * (high - low) and high - a.max() < 1e-4 * (high - low)


def configs():
    """Yield configs of which each network's weights, together, have every name there is."""
    for variant in digits.VARIANTS:
        yield digits.get_config(variant)
    for module, variants in (
        (dmf_imagenet, ("sit_512", "dmf_512")), (imf_imagenet, ("b2",)), (meanflow_imagenet, ("b4",)),
        (meanflow_cifar10, ("v1", "reproduction")), (remeanflow_imagenet, ("64", "512", "teacher_512")),
    ):  # fmt: skip
        yield from map(module.get_config, variants)
    for encoder in ("residual", "skip"):
        config = options.get_config("unet", "meanflow")
        config.model.update(OTHER_UNET | {"encoder_type": encoder})
        yield config


def test_every_weight_has_a_distribution_and_every_distribution_a_weight():
    used = {network: set() for network in torch_step.ARCHITECTURES}
    for config in configs():
        with torch.device("meta"):
            shapes = torch_weights.shapes(torch_step.build_net(config))
        network = config.model.name
        used[network] |= {initial.pattern_of(network, name) for name in shapes}
    assert used == {network: set(table) for network, table in initial.NETWORKS.items()}


def test_a_weight_without_a_distribution_is_named():
    with pytest.raises(ValueError, match=r"no pattern of initial.NETWORKS\['dit'\].* matches head\.weight: add one"):
        initial.draw("dit", {"head.weight": (2, 2)}, 0)
