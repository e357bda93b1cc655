"""Canonical weights: the round trip, and every way in which a file may not fit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from configs import digits
from jax_impl import weights
from jax_impl.step import abstract_net, build_net
from meanflow.errors import UserError

pytestmark = pytest.mark.usefixtures("optimize_less")
SIZES = {"depth": 1, "width": 16, "num_heads": 2}
FLOW, MAP = {"name": "dit", "interval_embedder": False}, {"name": "dmf_dit", "dmf_depth": 1}
NETWORKS = {
    "meanflow": {}, "flow": FLOW, "map": MAP, "normed_map": MAP | {"qk_norm": True},
    "repa": FLOW | {"repa_dims": (3,), "repa_depth": 1, "projector_dim": 8}, "longer": FLOW | {"mlp_ratio": 2.0},
}  # fmt: skip


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


def averaged(table):
    """Return a table as a trainer leaves it that averages it along with the parameters."""
    ema = table.copy()
    for _ in range(1000):
        ema *= np.float32(0.9999)
        ema += np.float32(1 - 0.9999) * table
    return ema


ROUNDED = {
    "averaged": averaged,
    "half": lambda table: table.astype(np.float16),
    "bfloat16": lambda table: table.astype(jnp.bfloat16),
    "without an axis": lambda table: table[0],
}


@pytest.mark.parametrize("change", ROUNDED)
def test_a_table_that_was_averaged_or_rounded_is_taken_as_the_computed_one(net_and_weights, change):
    net, given = net_and_weights
    changed = given | {"pos_embed": ROUNDED[change](given["pos_embed"])}
    assert change == "without an axis" or np.abs(changed["pos_embed"] - given["pos_embed"]).max() > 1e-5
    loaded = weights.from_canonical(net, changed)
    np.testing.assert_array_equal(weights.to_canonical(net, loaded)["pos_embed"], given["pos_embed"])


@pytest.mark.parametrize("change", [lambda a: a + 0.02, lambda a: a * np.nan, lambda a: a[:, ::-1]])
def test_another_table_is_refused(net_and_weights, change):
    net, given = net_and_weights
    with pytest.raises(UserError, match="the table pos_embed is not the one this network computes: entries differ"):
        weights.from_canonical(net, given | {"pos_embed": change(given["pos_embed"])})


OTHER_SIZES = {
    "num_classes": (12, r"num_classes 12, this network has config\.model\.num_classes 10"),
    "input_size": (16, r"the table pos_embed has shape .*input_size 16, .*input_size 8\."),
}


@pytest.mark.parametrize("option", OTHER_SIZES)
def test_the_option_that_makes_weights_not_fit_is_named(net_and_weights, option):
    value, message = OTHER_SIZES[option]
    config = digits.get_config()
    config.model.update({"depth": 2, "width": 16, "num_heads": 2} | {option: value})
    graphdef, params = build_net(config)
    given = weights.to_canonical(nnx.merge(graphdef, params), params)
    with pytest.raises(UserError, match=message):
        weights.from_canonical(net_and_weights[0], given)


def test_names_with_a_prefix_name_the_converter(net_and_weights):
    net, given = net_and_weights
    with pytest.raises(UserError, match=r"their names begin with 'module\.'; python -m parity\.convert SOURCE DEST"):
        weights.from_canonical(net, {f"module.{name}": a for name, a in given.items()})


def test_one_unknown_name_is_no_prefix(net_and_weights):
    net, given = net_and_weights
    with pytest.raises(UserError, match=r"the weights have unknown extra \(1 in all\); does the config match them\?"):
        weights.from_canonical(net, given | {"extra": np.zeros(3)})


def test_integers_are_refused(net_and_weights):
    net, given = net_and_weights
    name = "final_layer.linear.bias"
    with pytest.raises(UserError, match=r"final_layer\.linear\.bias is of type int8: weights must be floating-point"):
        weights.from_canonical(net, given | {name: given[name].astype(np.int8)})


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
    config = tiny.of_network(SIZES | NETWORKS[name])
    graphdef, params = build_net(config)
    net = nnx.merge(graphdef, params)
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
        found = weights.to_canonical(net, weights.from_canonical(net, weights.transfer(net, params, given)))
    new, gone = sorted(own.keys() - given.keys()), sorted(given.keys() - own.keys())
    assert all(name.startswith(fresh) for name in new) and bool(new) == bool(fresh)
    assert all(name.startswith(left_out) for name in gone) and bool(gone) == bool(left_out)
    assert found.keys() == own.keys()
    for name, a in found.items():
        np.testing.assert_array_equal(a, own[name] if name in new else given[name])
    told = [record.getMessage() for record in caplog.records]
    parts = [f"{', '.join(names)} {text}" for names, text in ((new, "start fresh"), (gone, "are left out")) if names]
    kept = f"of the weights to start from, {len(own) - len(new)} are kept"
    assert told == (["; ".join([kept, *parts])] if parts else [])


@pytest.mark.parametrize(
    ("before", "after", "change", "message"),
    [
        ("meanflow", "map", lambda w: None, "have unknown r_embedder"),
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
        weights.from_canonical(net, weights.transfer(net, params, given))


EDM2 = {
    "name": "edm2", "width": 4, "channel_mult": (1,), "channel_mult_emb": 1, "channel_mult_noise": 1, "num_blocks": 1,
    "attn_resolutions": (), "logvar_channels": 3,
}  # fmt: skip


def edm2_network(**changes):
    """Return a network of EDM2, its parameters and canonical weights drawn for it."""
    config = digits.get_config("edm2_flow")
    config.model.update(EDM2 | changes)
    graphdef, shapes = abstract_net(config)
    params = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), shapes)
    net = nnx.merge(graphdef, params)
    rng, canonical = np.random.RandomState(0), weights.to_canonical(net, params)
    return net, params, {name: np.asarray(rng.randn(*a.shape), a.dtype) for name, a in canonical.items()}


def test_scalars_survive_bitwise_as_scalars(tmp_path):
    """Gains have no shape, as in the official state dicts, and only they."""
    net, _, given = edm2_network()
    gains = {name for name in given if name.endswith("_gain")}
    assert {name for name, a in given.items() if a.shape == ()} == gains and len(gains) == 6
    weights.save(tmp_path / "w.safetensors", given, {})
    loaded = weights.load(tmp_path / "w.safetensors")
    state = weights.from_canonical(net, loaded)
    back = weights.to_canonical(net, state)
    assert back.keys() == given.keys() and all(a.dtype == np.float32 for a in back.values())
    for name, a in given.items():
        assert loaded[name].shape == back[name].shape == a.shape
        assert loaded[name].tobytes() == back[name].tobytes() == a.tobytes(), name
    with pytest.raises(UserError, match=r"unet\.out_gain has shape"):
        weights.from_canonical(net, given | {"unet.out_gain": np.zeros(1, np.float32)})


def test_what_is_written_are_values_in_whatever_order_they_lie_in_memory(tmp_path):
    a = np.arange(6, dtype=np.float32).reshape(2, 3)
    given = {"rows": a, "columns": np.asfortranarray(a), "transposed": a.T, "every second": a[:, ::2]}
    weights.save(tmp_path / "w.safetensors", given, {})
    for name, b in weights.load(tmp_path / "w.safetensors").items():
        np.testing.assert_array_equal(b, given[name], err_msg=name)


def test_edm2_starts_without_what_only_its_own_training_or_a_teacher_uses(caplog):
    """Its log-variance; a network of two times starts from nothing but embeddings of both."""
    _, _, given = edm2_network()
    net, params, own = edm2_network(logvar_channels=0)
    with caplog.at_level("INFO", logger="absl"):
        adopted = weights.transfer(net, params, given)
    assert adopted.keys() == own.keys() == {name for name in given if not name.startswith("logvar_")}
    assert [record.getMessage() for record in caplog.records] == [
        f"of the weights to start from, {len(own)} are kept; "
        "logvar_fourier.freqs, logvar_fourier.phases, logvar_linear.weight are left out"
    ]
    net, params, _ = edm2_network(interval_embedder=True)
    with pytest.raises(UserError, match=r"this one takes two: fit its time embeddings .*jax_impl\.time_embedding"):
        weights.transfer(net, params, given)
    fitted = given | {f"unet.emb_noise_{time}.weight": given["unet.emb_noise.weight"] for time in "tr"}
    assert weights.transfer(net, params, fitted).keys() == fitted.keys() - {"unet.emb_noise.weight"}
