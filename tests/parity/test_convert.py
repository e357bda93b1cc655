"""The converter: bitwise round trips, every name known or refused, nothing executed."""

import argparse
import operator
import pathlib
import pickle

import flax.serialization
import flax.traverse_util
import numpy as np
import orbax.checkpoint as ocp
import pytest
import torch
from flax import nnx

from configs import digits
from jax_impl import checkpoints as jax_checkpoints
from jax_impl import step as jax_step
from jax_impl import train as jax_train
from jax_impl import weights as jax_weights
from meanflow.config import store
from meanflow.config.workdir import read_workdir
from meanflow.errors import UserError
from meanflow.weights import canonical, infer, names
from parity import check, convert
from parity.adapters import frameworks
from parity.cases import objectives, settings
from parity.golden import dmf, fixtures
from parity.golden import imf as golden_imf
from torch_impl import checkpoints as torch_checkpoints
from torch_impl import step as torch_step
from torch_impl import train as torch_train
from torch_impl import weights as canonical_files


@pytest.fixture(scope="module")
def sit():
    """Return canonical weights: a small official PyTorch state dict."""
    return fixtures.Fixture(check.GOLDEN / "sit_torch.npz").under("param/")


@pytest.fixture(scope="module")
def dit():
    """Return a small official Flax tree, flat."""
    return fixtures.Fixture(check.GOLDEN / "meanflow_dit_flax.npz").under("param/")


@pytest.fixture(scope="module")
def imf():
    """Return a small official Flax tree of improved MeanFlow, flat."""
    return fixtures.Fixture(check.GOLDEN / "imf_dit_flax.npz").under("param/")


@pytest.fixture
def config(tmp_path):
    """Return a config file of the network of both."""
    path = tmp_path / "tiny.py"
    path.write_text(
        "from configs import digits\n\n\ndef get_config():\n    config = digits.get_config()\n"
        "    config.model.update(input_size=8, channels=4, num_classes=10, depth=3, width=32, num_heads=4)\n"
        "    return config\n"
    )
    return path


def tensors(weights):
    return {name: torch.from_numpy(np.array(a)) for name, a in weights.items()}


def assert_same(got, want):
    assert got.keys() == want.keys()
    for name in want:
        assert got[name].dtype == want[name].dtype
        np.testing.assert_array_equal(got[name], want[name])


def run(*argv):
    convert.main([str(a) for a in argv])


def test_flax_round_trip(dit):
    weights = names.flax_tree_to_canonical(dit)
    assert weights["blocks.0.attn.qkv.weight"].shape == (96, 32)
    assert weights["x_embedder.proj.weight"].shape == (32, 4, 2, 2)
    assert_same(names.canonical_to_flax_tree(weights), dit)


def test_canonical_round_trip(sit):
    trained = {name: a for name, a in sit.items() if name != "pos_embed"}
    assert_same(names.flax_tree_to_canonical(names.canonical_to_flax_tree(sit)), trained)


@pytest.mark.parametrize(
    "name",
    ["net/blocks/layers_0/attn/q_norm/scale", "net/x_embedder/proj/_flax_linear/kernel", "net/new/kernel", "kernel",
     "net/r_embedder/mlp/layers_0/_flax_linear/kernel", "net/blocks/0/attn/qkv/_flax_linear/kernel"],
)  # fmt: skip
def test_unknown_flax_name(name):
    with pytest.raises(UserError, match="is not a parameter of the official Flax network"):
        names.canonical_name(name)


def test_safetensors_and_pt_and_back(tmp_path, sit):
    canonical_files.save(tmp_path / "a.safetensors", sit, {})
    run(tmp_path / "a.safetensors", tmp_path / "b.pt")
    assert_same({n: t.numpy() for n, t in torch.load(tmp_path / "b.pt", weights_only=True).items()}, sit)
    run(tmp_path / "b.pt", tmp_path / "c.safetensors")
    assert_same(canonical_files.load(tmp_path / "c.safetensors"), sit)


@pytest.mark.parametrize("entry", ["ema", "model", "state_dict", None])
def test_official_torch_checkpoints(tmp_path, sit, entry):
    state = {f"module.{name}": tensor for name, tensor in tensors(sit).items()}
    zeros = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    whole = {"opt": {"step": 3}, "args": argparse.Namespace(lr=1), "model": zeros, entry: state}
    torch.save(whole if entry else state, tmp_path / "a.pth")
    if entry == "state_dict":
        whole.pop("model")
        torch.save(whole, tmp_path / "a.pth")
    run(tmp_path / "a.pth", tmp_path / "b.safetensors")
    assert_same(canonical_files.load(tmp_path / "b.safetensors"), sit)


def test_prefix_chooses_an_entry(tmp_path, sit):
    torch.save({"ema": {}, "nets": {"first": tensors(sit)}, "step": 3}, tmp_path / "a.pt")
    run(tmp_path / "a.pt", tmp_path / "b.safetensors", "--prefix", "nets.first.")
    assert_same(canonical_files.load(tmp_path / "b.safetensors"), sit)
    with pytest.raises(UserError, match="no name begins with --prefix 'other'"):
        run(tmp_path / "a.pt", tmp_path / "b.safetensors", "--prefix", "other")


@pytest.fixture(scope="module")
def unet():
    """Return the config of a tiny U-Net in float32, and its canonical weights."""
    config = objectives.config("unet", model={"compute_dtype": "float32", "channel_mult": (1,)})
    return config, {name: a.astype(np.float32) for name, a in objectives.random_weights(config).items()}


@pytest.fixture
def several(tmp_path, unet):
    """Return a checkpoint as py-meanflow writes it, and its four networks by --ema."""
    config, weights = unet
    tables = frameworks.FRAMEWORKS["torch"].tables(frameworks.FRAMEWORKS["torch"].build(config, weights))
    nets = {ema: {n: a if n in tables else a * (1 + ema / 8) for n, a in weights.items()} for ema in (-1, 0, 1, 2)}
    prefixes = {-1: "net.", 0: "net_ema.", 1: "net_ema1.", 2: "net_ema2."}
    state = {prefixes[ema] + name: a for ema, net in nets.items() for name, a in tensors(net).items()}
    path = tmp_path / "checkpoint-3.pth"
    torch.save({"model": state | {"num_updates": torch.tensor(7)}, "optimizer": {}, "epoch": 3}, path)
    return path, nets


@pytest.mark.parametrize("ema", [-1, 0, 1, 2])
def test_each_network_of_a_checkpoint_of_several(tmp_path, several, ema):
    path, nets = several
    run(path, tmp_path / "b.safetensors", "--ema", ema)
    assert_same(canonical_files.load(tmp_path / "b.safetensors"), nets[ema])


def test_a_network_that_the_checkpoint_lacks(tmp_path, several):
    with pytest.raises(UserError, match=r"has no net_ema3 \(--ema 3\), only net, net_ema, net_ema1, net_ema2"):
        run(several[0], tmp_path / "b.safetensors", "--ema", 3)
    assert not (tmp_path / "b.safetensors").exists()


def test_both_frameworks_compute_the_same_from_a_converted_checkpoint(tmp_path, several, unet):
    config, _ = unet
    run(several[0], tmp_path / "b.safetensors", "--ema", 1)
    converted = canonical_files.load(tmp_path / "b.safetensors")
    with frameworks.full_precision():
        outputs = [f.forward(f.build(config, converted), *objectives.jvp_inputs(config)[:4], {"augment": a})
                   for a in [objectives.given(config)["augment"]] for f in frameworks.FRAMEWORKS.values()]  # fmt: skip
    assert np.linalg.norm(outputs[0] - outputs[1]) <= 2e-5 * np.linalg.norm(outputs[1])


def test_flax_round_trip_of_improved_meanflow(imf):
    weights = names.flax_tree_to_canonical(imf)
    assert weights["shared_blocks.0.mlp.w2._flax_linear.weight"].shape == (32, 85)
    assert weights["u_heads.0.attn.q_norm.weight"].shape == (16,)
    assert weights["h_embedder.mlp.0._flax_linear.weight"].shape == (32, 256)
    assert_same(names.canonical_to_flax_tree(weights), imf)


@pytest.mark.parametrize(
    "name",
    ["net/shared_blocks/0/norm1/kernel", "net/u_heads_0/attn/qkv/_flax_linear/kernel", "net/t_embedder/mlp/layers_0",
     "net/shared_blocks_0/norm1/scale", "net/v_heads_0/mlp/w1/_flax_linear/bias", "net/omega_tokens/kernel"],
)  # fmt: skip
def test_unknown_flax_name_of_improved_meanflow(name):
    with pytest.raises(UserError, match="is not a parameter of the official Flax network"):
        names.canonical_name(name, "improved")


@pytest.mark.parametrize("v_heads", [True, False])
def test_official_checkpoints_of_improved_meanflow(tmp_path, imf, v_heads):
    """Flax and PyTorch, with the head of v or, as the released ones, without, give both frameworks one network."""
    tree = {name: a for name, a in imf.items() if v_heads or "/v_heads_" not in name}
    nested = flax.traverse_util.unflatten_dict(tree, sep="/")
    (tmp_path / "flax.msgpack").write_bytes(flax.serialization.msgpack_serialize({"ema_params": nested}))
    canonical = names.flax_tree_to_canonical(tree)
    torch.save({"ema": {f"net.{name}": a for name, a in tensors(canonical).items()}}, tmp_path / "torch.pth")
    config = golden_imf.config_of(fixtures.Fixture(check.GOLDEN / "imf_dit_flax.npz"))
    (tmp_path / "config.json").write_text(store.to_json(config))
    for source in ("flax.msgpack", "torch.pth"):
        for flags in ((), ("--config", tmp_path / "config.json")):
            run(tmp_path / source, tmp_path / "b.safetensors", *flags)
            assert_same(canonical_files.load(tmp_path / "b.safetensors"), canonical)
    run(tmp_path / "b.safetensors", tmp_path / "run", "--to", "torch", "--config", tmp_path / "config.json")
    assert read_workdir(tmp_path / "run").model.v_heads == v_heads
    config.model.v_heads = v_heads
    z, y = np.random.RandomState(0).normal(size=(3, 8, 8, 4)).astype(np.float32), np.array([1, 2, 9])
    config.sample.steps = 2
    with frameworks.full_precision():
        images = [f.sample(f.build(config, canonical), z, y, config.sample) for f in frameworks.FRAMEWORKS.values()]
    assert np.linalg.norm(images[0] - images[1]) <= 2e-5 * np.linalg.norm(images[1])


@pytest.mark.parametrize("projectors", [True, False])
def test_an_official_flow_model_becomes_a_flow_map_with_the_same_velocity(tmp_path, projectors, caplog):
    """A SiT checkpoint, with REPA's projectors or without, as each trainer loads it: the same at r = t as before."""
    fixture = fixtures.Fixture(check.GOLDEN / "dmf_sit_torch.npz")
    official = {n: a for n, a in fixture.under("param/").items() if projectors or not n.startswith("projectors.")}
    torch.save({"ema": tensors(official), "args": argparse.Namespace(lr=1e-4)}, tmp_path / "sit.pt")
    run(tmp_path / "sit.pt", tmp_path / "sit.safetensors")
    config = dmf.config_of(fixture.config["net"] | {"dmf_depth": 2})
    config.train.load_from = str(tmp_path / "sit.safetensors")
    x, t, y, want = dmf.images(fixture, "in/fwd/x", "in/fwd/t", "in/fwd/y", "out/fwd/v")
    with frameworks.full_precision():
        caplog.set_level("INFO")
        graphdef, state, _ = jax_train.start_state(config, jax_step.make_mesh(config))
        got = {"jax": jax_weights.to_canonical(nnx.merge(graphdef, state.params), state.params)}
        state, _ = torch_train.start_state(config, None, torch.device("cpu"))
        got["torch"] = canonical_files.to_canonical(state.net, dict(state.net.named_parameters()))
        for name, f in frameworks.FRAMEWORKS.items():
            shared = {n: a for n, a in official.items() if not n.startswith("projectors.")}
            assert_same({n: a for n, a in got[name].items() if not n.startswith("logvar_linear.")}, shared)
            net = f.build(config, got[name])
            assert np.linalg.norm(f.forward(net, x, t, t, y) - want) <= 1e-6 * np.linalg.norm(want)
            assert np.linalg.norm(f.forward(net, x, t, 0 * t, y) - want) > 1e-2 * np.linalg.norm(want)
    said = caplog.text
    (tmp_path / "sit.safetensors").unlink()
    with pytest.raises(UserError, match="there is no .*sit.safetensors"):
        torch_train.start_state(config, None, torch.device("cpu"))
    assert said.count("logvar_linear.bias, logvar_linear.weight start fresh") == 2
    assert ("projectors.0.0.bias" in said) == projectors


WITHOUT_A_TRACE = {"num_heads", "qkv_layout", "dropout", "compute_dtype", "dmf_depth", "repa_depth"}
OTHER_NETWORKS = {
    "unet_16": settings.UNET | {
        "input_size": 16, "channel_mult": (1, 2, 3), "channel_mult_emb": 2, "channel_mult_noise": 3, "num_blocks": 2,
        "attn_resolutions": (16, 4), "resample_filter": (1.0, 2.0, 3.0, 2.0), "encoder_type": "residual",
    },
    "dmf_shallow": settings.DMF | {"depth": 1, "dmf_depth": 1},
    "unet_separate_wide": objectives.NETWORKS["unet_separate"] | {"channel_mult_noise": 3},
}  # fmt: skip


@pytest.mark.parametrize("order", ["as built", "sorted"])
@pytest.mark.parametrize("network", [*objectives.NETWORKS, *OTHER_NETWORKS])
def test_the_options_of_a_network_are_found_in_its_weights(network, order, monkeypatch):
    """Sorted, as in a safetensors file, the level 4x4 comes before 8x8."""
    monkeypatch.setattr(objectives, "NETWORKS", objectives.NETWORKS | OTHER_NETWORKS)
    expected = objectives.config(network).model
    with torch.device("meta"):
        net = torch_step.build_net(objectives.config(network))
    shapes = {name: () if name.endswith(canonical.SCALARS) else t.shape for name, t in net.state_dict().items()}
    weights = {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}
    weights = dict(sorted(weights.items()) if order == "sorted" else weights) | net.tables()
    found = infer.inferred_config(weights).model
    assert set(found) == set(expected)
    for model in (found, expected):
        if "resample_filter" in model:  # a filter is known but for its scale
            model.resample_filter = tuple(float(tap) / sum(model.resample_filter) for tap in model.resample_filter)
        if "mlp_ratio" in model:
            model.mlp_ratio = int(model.mlp_ratio * model.width)
    hidden = WITHOUT_A_TRACE - ({"num_heads"} if expected.get("qk_norm") else set()) | {
        "unet": {"num_classes"},
        "imf_dit": {"input_size"},
        "edm2": {"head_width", "sigma_data"},
    }.get(expected.name, set())
    for option in set(expected) - hidden:
        same = np.allclose if option == "resample_filter" else operator.eq
        assert same(found[option], expected[option]), option
    convert.checked(weights, None)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["map_layer0.weight", "enc.a"], "lack enc.NxN_conv.weight or map_layer0.weight"),
        (["enc.8x8_conv.weight"], "lack enc.NxN_conv.weight or map_layer0.weight"),
        (["enc.8x8_conv.weight", "enc.4x4_conv.weight", "map_layer0.weight"], "lack enc.NxN_conv.weight or map_layer0"),
        (["enc.8x8_conv.weight", "map_layer0.weight"], "lack enc.8x8_block0.conv0.weight"),
        (
            ["enc.8x8_conv.weight", "map_layer0.weight", "map_layer1.bias", "enc.b.conv.weight"],
            "matrices of ranks that no known U-Net has",
        ),
    ],
)
def test_weights_of_no_unet_are_named(names, message):
    with pytest.raises(UserError, match=message):
        infer.inferred_config(
            {name: np.zeros((8, 3) if "map" in name or ".b." in name else (8, 3, 3, 3)) for name in names}
        )


class Malicious:
    """Runs a function when it is unpickled."""

    def __reduce__(self):
        return pathlib.Path.touch, (pathlib.Path("executed"),)


def test_a_malicious_pickle_is_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Malicious()}, "bad.pt")
    (tmp_path / "bad.pth").write_bytes(pickle.dumps({"model": Malicious()}, protocol=2))
    for name in ("bad.pt", "bad.pth"):
        with pytest.raises(UserError, match=rf"{name} is refused"):
            run(name, "b.safetensors")
    assert not (tmp_path / "executed").exists() and not (tmp_path / "b.safetensors").exists()


def test_unknown_missing_and_misshapen_names(tmp_path, sit):
    for change, message in (
        ({"blocks.0.new": np.ones(2)}, r"have unknown blocks\.0\.new"),
        ({"final_layer.linear.bias": None}, r"lack final_layer\.linear\.bias"),
        ({"final_layer.linear.bias": np.ones(3)}, r"final_layer\.linear\.bias has shape \(3,\)"),
        ({"pos_embed": sit["pos_embed"] + 1}, "the table pos_embed is not the one"),
        ({"x_embedder.proj.weight": None}, r"lack x_embedder\.proj\.weight"),
    ):
        weights = {name: a for name, a in (sit | change).items() if a is not None}
        torch.save(tensors(weights), tmp_path / "a.pt")
        with pytest.raises(UserError, match=message):
            run(tmp_path / "a.pt", tmp_path / "b.safetensors")


@pytest.mark.parametrize("form", ["bare", "state"])
@pytest.mark.parametrize("kind", ["msgpack", "orbax"])
def test_official_flax_checkpoints(tmp_path, dit, config, kind, form):
    tree = flax.traverse_util.unflatten_dict(dit, sep="/")
    zeros = flax.traverse_util.unflatten_dict({name: a * 0 for name, a in dit.items()}, sep="/")
    tree = tree if form == "bare" else {"step": np.int32(3), "params": zeros, "ema_params": tree}
    path = tmp_path / kind
    if kind == "msgpack":
        path.write_bytes(flax.serialization.msgpack_serialize(tree))
    else:
        ocp.PyTreeCheckpointer().save(path, tree)
    with pytest.raises(UserError, match="give --config"):
        run(path, tmp_path / "b.safetensors")
    run(path, tmp_path / "b.safetensors", "--config", config)
    got = canonical_files.load(tmp_path / "b.safetensors")
    assert got.pop("pos_embed").shape == (1, 16, 32)
    assert_same(got, names.flax_tree_to_canonical(dit))


@pytest.mark.parametrize("framework", ["jax", "torch"])
def test_work_directories(tmp_path, sit, config, framework):
    canonical_files.save(tmp_path / "a.safetensors", sit, {})
    with pytest.raises(UserError, match="a work directory needs a config"):
        run(tmp_path / "a.safetensors", tmp_path / "run", "--to", framework)
    run(tmp_path / "a.safetensors", tmp_path / "run", "--to", framework, "--config", config)
    read = {"jax": jax_checkpoints, "torch": torch_checkpoints}[framework].read_weights
    assert_same(read(tmp_path / "run")[1], sit)
    assert_same(read(tmp_path / "run", -1)[1], sit)
    run(tmp_path / "run", tmp_path / "b.safetensors")
    assert_same(canonical_files.load(tmp_path / "b.safetensors"), sit)
    with pytest.raises(UserError, match="exists already"):
        run(tmp_path / "a.safetensors", tmp_path / "run", "--to", framework, "--config", config)


def test_mistakes_on_the_command_line(tmp_path, sit):
    canonical_files.save(tmp_path / "a.safetensors", sit, {})
    (tmp_path / "text.md").write_text("no weights")
    (tmp_path / "directory").mkdir()
    for argv, message in (
        (["nothing.pt", "b.pt"], "there is no nothing.pt"),
        ([tmp_path / "a.safetensors", "b.onnx"], r"b\.onnx ends in none of \.safetensors, \.pt"),
        ([tmp_path / "text.md", "b.pt"], r"text\.md is neither"),
        ([tmp_path / "directory", "b.pt"], "neither a work directory nor an Orbax checkpoint"),
        ([tmp_path / "a.safetensors", "b.pt", "--config", "no.py"], r"no config file no\.py"),
        ([tmp_path / "a.safetensors", tmp_path / "no" / "b.pt"], "cannot write"),
    ):
        with pytest.raises(UserError, match=message):
            run(*argv)


def test_help_lists_what_is_read_and_written(launcher):
    shown = launcher.run("parity/convert.py", "--help")
    assert shown.poll() == 0
    assert all(
        word in shown.stdout
        for word in ("safetensors", ".pt", "msgpack", "Orbax", "--ema", "--prefix", "--to", "--for")
    )


def test_config_may_be_json(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(store.to_json(digits.get_config()))
    assert convert.load_config(str(path)).model == digits.get_config().model


def test_an_embedder_that_a_network_of_two_times_never_reads_is_left_out(tmp_path, capsys):
    """As official Re-MeanFlow builds its network: with EDM2's own embedder of time beside the two new ones."""
    with np.load(check.GOLDEN / "remeanflow_edm2_torch.npz") as file:
        given = {key.removeprefix("param/"): file[key] for key in file.files if key.startswith("param/")}
    torch.save({"ema": {name: torch.from_numpy(a) for name, a in given.items()}}, tmp_path / "official.pt")
    convert.convert(tmp_path / "official.pt", tmp_path / "weights.safetensors")
    assert "left out unet.emb_noise.weight" in capsys.readouterr().err
    converted = canonical_files.load(tmp_path / "weights.safetensors")
    assert given.keys() - converted.keys() == {"unet.emb_noise.weight"}


@pytest.mark.parametrize("change", ["averaged", "float16", "bfloat16"])
def test_weights_are_written_with_the_computed_table(tmp_path, sit, change):
    """Official trainers average the fixed table along with the parameters, or round it with them."""
    given = tensors(sit)
    if change == "averaged":
        for _ in range(1000):
            given["pos_embed"].mul_(0.9999).add_(torch.from_numpy(sit["pos_embed"]), alpha=1 - 0.9999)
        assert (given["pos_embed"].numpy() != sit["pos_embed"]).any()
    else:
        given = {name: tensor.to(getattr(torch, change)) for name, tensor in given.items()}
    torch.save({"ema": given}, tmp_path / "a.pt")
    run(tmp_path / "a.pt", tmp_path / "b.safetensors")
    expected = {name: tensor.float().numpy() for name, tensor in given.items()} | {"pos_embed": sit["pos_embed"]}
    assert_same(canonical_files.load(tmp_path / "b.safetensors"), expected)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"encoder.conv_in.weight": np.ones((3, 3, 3, 3))}, "weights of an autoencoder: --config.latents.vae reads"),
        ({"other.weight": np.ones(3)}, r"lack x_embedder\.proj\.weight: .*\(other\.weight \(1 in all\)\)"),
        ({}, "no arrays at all"),
    ],
)
def test_weights_of_another_network_are_named(tmp_path, weights, message):
    torch.save(tensors(weights), tmp_path / "a.pt")
    with pytest.raises(UserError, match=message):
        run(tmp_path / "a.pt", tmp_path / "b.safetensors")
