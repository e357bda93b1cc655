"""Canonical weights: the round trip, and every way in which a file may not fit."""

import numpy as np
import pytest
from flax import nnx

from configs import digits
from configs.errors import UserError
from jax_impl import weights
from jax_impl.step import build_net


@pytest.fixture(scope="module")
def net_and_weights():
    config = digits.get_config()
    config.model.update(depth=2, width=16, num_heads=2)
    graphdef, params = build_net(config)
    net = nnx.merge(graphdef, params)
    canonical = weights.to_canonical(net, params)
    rng = np.random.RandomState(0)
    return net, {n: a if n == "pos_embed" else rng.randn(*a.shape).astype(a.dtype) for n, a in canonical.items()}


def test_a_round_trip_is_bitwise(net_and_weights, tmp_path):
    net, given = net_and_weights
    weights.save(tmp_path / "w.safetensors", given, {"step": "1"})
    loaded = weights.load(tmp_path / "w.safetensors")
    back = weights.to_canonical(net, weights.from_canonical(net, loaded))
    assert back.keys() == given.keys()
    assert all(np.array_equal(back[name], given[name]) for name in given)


def test_names_are_those_of_the_official_checkpoints(net_and_weights):
    names = net_and_weights[1].keys()
    assert {"pos_embed", "x_embedder.proj.weight", "t_embedder.mlp.0.weight", "r_embedder.mlp.2.bias",
            "y_embedder.embedding_table.weight", "blocks.1.attn.qkv.weight", "blocks.0.adaLN_modulation.1.bias",
            "final_layer.linear.weight"} <= names  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("blocks.0.attn.qkv.bias"), "lack blocks.0.attn.qkv.bias"),
        (lambda w: w.update({"blocks.9.attn.qkv.bias": w["blocks.0.attn.qkv.bias"]}), "unknown blocks.9.attn.qkv"),
        (lambda w: w.update({"final_layer.linear.bias": np.zeros(3)}), "final_layer.linear.bias has shape"),
        (lambda w: w.update({"pos_embed": w["pos_embed"] + 0.01}), "table pos_embed is not the one"),
    ],
)
def test_weights_that_do_not_fit_are_named(net_and_weights, change, message):
    net, given = net_and_weights
    changed = dict(given)
    change(changed)
    with pytest.raises(UserError, match=message):
        weights.from_canonical(net, changed)


def test_a_truncated_or_missing_file_is_named(net_and_weights, tmp_path):
    path = tmp_path / "w.safetensors"
    weights.save(path, net_and_weights[1], {})
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"cannot read .*w\.safetensors"):
        weights.load(path)
    with pytest.raises(UserError, match=r"cannot read .*none\.safetensors"):
        weights.load(tmp_path / "none.safetensors")
    with pytest.raises(UserError, match="cannot write"):
        weights.save(tmp_path / "no" / "w.safetensors", net_and_weights[1], {})
