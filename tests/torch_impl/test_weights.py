"""Canonical weights: the round trip, and every way in which a file may not fit."""

import functools

import numpy as np
import pytest

from configs import digits
from configs.errors import UserError
from torch_impl import weights
from torch_impl.step import build_net

SIZES = {"depth": 1, "width": 16, "num_heads": 2, "dmf_depth": 1, "projector_dim": 8, "repa_depth": 1}
FLOW = {"name": "dit", "interval_embedder": False}
NETWORKS = {
    "meanflow": {}, "flow": FLOW, "repa": FLOW | {"repa_dims": (3,)}, "map": {"name": "dmf_dit"},
    "normed_map": {"name": "dmf_dit", "qk_norm": True}, "longer": FLOW | {"mlp_ratio": 2.0},
}  # fmt: skip


@pytest.fixture(scope="module")
def net_and_weights():
    config = digits.get_config()
    config.model.update(depth=2, width=16, num_heads=2)
    net = build_net(config)
    params = dict(net.named_parameters())
    canonical = weights.to_canonical(net, params)
    rng = np.random.RandomState(0)
    return net, {n: a if n == "pos_embed" else rng.randn(*a.shape).astype(a.dtype) for n, a in canonical.items()}


def test_a_round_trip_is_bitwise(net_and_weights, tmp_path):
    net, given = net_and_weights
    weights.save(tmp_path / "w.safetensors", given, {"step": "1"})
    loaded = weights.load(tmp_path / "w.safetensors")
    state = weights.from_canonical(net, loaded)
    back = weights.to_canonical(net, {name: a for name, a in state.items() if name not in net.tables()})
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


@functools.cache
def fresh_network(name):
    """Return a fresh one of `NETWORKS`, its parameters, and its canonical weights."""
    config = digits.get_config()
    config.model.update(SIZES | NETWORKS[name])
    net = build_net(config)
    params = dict(net.named_parameters())
    return net, params, weights.to_canonical(net, params)


@pytest.mark.parametrize(
    ("before", "after", "fresh", "left_out"),
    [
        ("flow", "map", "logvar_linear.", ""),
        ("repa", "map", "logvar_linear.", "projectors."),
        ("flow", "meanflow", "r_embedder.", ""),
        ("repa", "flow", "", "projectors."),
        ("flow", "repa", "projectors.", ""),
        ("map", "flow", "", "logvar_linear."),
        ("map", "map", "", ""),
    ],
)
def test_a_model_starts_from_another_of_its_family(before, after, fresh, left_out, caplog):
    """All that both have is taken over, bitwise, and the rest is named."""
    given, rng = dict(fresh_network(before)[2]), np.random.RandomState(0)
    given |= {name: rng.randn(*a.shape).astype(a.dtype) for name, a in given.items() if name != "pos_embed"}
    net, params, own = fresh_network(after)
    with caplog.at_level("INFO", logger="absl"):
        state = weights.from_canonical(net, weights.adopt(net, params, given))
        found = {name: a.numpy() for name, a in state.items()}
    new, gone = sorted(own.keys() - given.keys()), sorted(given.keys() - own.keys())
    assert all(name.startswith(fresh) for name in new) and bool(new) == bool(fresh)
    assert all(name.startswith(left_out) for name in gone) and bool(gone) == bool(left_out)
    assert found.keys() == own.keys()
    for name, a in found.items():
        np.testing.assert_array_equal(a, own[name] if name in new else given[name])
    told = [record.getMessage() for record in caplog.records]
    expected = [f"{', '.join(names)} {text}" for names, text in ((new, "start fresh"), (gone, "are left out")) if names]
    assert told == [f"of the weights to start from, {text}" for text in expected]


@pytest.mark.parametrize(
    ("before", "after", "change", "message"),
    [
        ("meanflow", "map", lambda w: None, "hold the unknown r_embedder"),
        ("flow", "map", lambda w: w.pop("t_embedder.mlp.0.bias"), "lack t_embedder.mlp.0.bias"),
        ("flow", "map", lambda w: w.update({"blocks.9.attn.qkv.bias": np.zeros(3)}), "unknown blocks.9"),
        ("longer", "map", lambda w: None, "mlp.fc1.* has shape"),
        ("flow", "normed_map", lambda w: None, "lack blocks.0.attn.k_norm.scale"),
        ("map", "map", lambda w: w.update({"logvar_linear.bias": np.zeros(3)}), "logvar_linear.bias has shape"),
    ],
)
def test_all_else_must_fit(before, after, change, message):
    (net, params, _), given = fresh_network(after), dict(fresh_network(before)[2])
    change(given)
    with pytest.raises(UserError, match=message):
        weights.from_canonical(net, weights.adopt(net, params, given))
