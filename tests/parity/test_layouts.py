"""Files for other codes: what their loaders read is there, and the converter reads it back bitwise."""

import json
import pathlib
import re
import shutil
import types

import flax.serialization
import huggingface_hub
import jax
import numpy as np
import optax
import pytest
import torch
import yaml
from flax.training import checkpoints as flax_checkpoints
from flax.training import train_state
from saved import write_run

import jax_impl
import torch_impl
from meanflow.commands import data_metrics, snapshots
from meanflow.config import latents, store
from meanflow.config.workdir import read_workdir
from meanflow.errors import UserError
from meanflow.weights import layouts, names, sources
from parity import agreement, convert
from parity.cases import objectives
from torch_impl import checkpoints as torch_checkpoints
from torch_impl import step as torch_step
from torch_impl import weights as canonical_files

# Networks of `objectives.NETWORKS`, their data and what official code a --for is for.
FITTING = {
    "dit": ("zhuyu", "meanflow-jax"),
    "unet": ("py-meanflow",),
    "unet_separate": ("zhuyu",),
    "imf": ("imf", "imf-jax"),
    "dmf": ("dmf",),
    "dmf_qk": ("dmf",),
    "dmf_sit": ("dmf",),
    "edm2_flow": ("edm2",),
    "edm2": (),
}
CASES = [(network, name) for network, fitting in FITTING.items() for name in fitting]
BARE = [(network, ".pth") for network in FITTING] + [("dit", suffix) for suffix in (".pt", ".bin", ".safetensors")]
UNCONDITIONAL = {"method.guidance": False, "method.label_drop_prob": 0.0, "evaluation.classifier": False}
SUFFIX = {name: layout.suffixes[0] for name, layout in layouts.LAYOUTS.items()}


def case(network):
    """Return the config of a tiny network in float32, and its canonical weights."""
    config = objectives.config(network, model={"compute_dtype": "float32"})
    if config.model.name == "unet":
        config.update_from_flattened_dict(UNCONDITIONAL)
    weights = {name: a.astype(np.float32) for name, a in objectives.random_weights(config).items()}
    with torch.device("meta"):
        net = torch_step.build_net(config)
    return config, weights | net.tables()


@pytest.fixture
def source(tmp_path, request):
    """Return a canonical file of the test's network, its config file and its weights."""
    config, weights = case(request.param)
    canonical_files.save(tmp_path / "source.safetensors", weights, {"source": "test"})
    (tmp_path / "config.json").write_text(store.to_json(config))
    return tmp_path / "source.safetensors", tmp_path / "config.json", weights


def assert_same(got, want):
    assert got.keys() == want.keys()
    for name in want:
        assert got[name].dtype == want[name].dtype and got[name].shape == want[name].shape, name
        np.testing.assert_array_equal(got[name], want[name])


def run(*argv):
    convert.main([str(a) for a in argv])


def back(path, config):
    """Return the canonical weights that a file is converted to."""
    run(path, path.with_name("back.safetensors"), "--config", config)
    return canonical_files.load(path.with_name("back.safetensors"))


def known_to(name, weights):
    """Return the weights that the code of a layout has: the PyTorch code of improved MeanFlow has no v heads."""
    return {n: a for n, a in weights.items() if name != "imf" or not n.startswith("v_heads.")}


@pytest.mark.parametrize(("source", "name"), CASES, indirect=["source"])
def test_what_is_written_is_read_back_bitwise(source, name, tmp_path):
    path, config, weights = source
    dest = tmp_path / f"official{SUFFIX[name]}"
    run(path, dest, "--for", name)
    weights = known_to(name, weights)
    assert_same(back(dest, config), weights)
    tables = {"pos_embed"} if dest.suffix == ".msgpack" else set()
    assert_same(sources.read(dest).weights, {n: a for n, a in weights.items() if n not in tables})


@pytest.mark.parametrize(("source", "suffix"), BARE, indirect=["source"])
def test_bare_files_are_read_back_bitwise(source, suffix, tmp_path):
    path, config, weights = source
    run(path, tmp_path / f"bare{suffix}")
    assert_same(sources.read(tmp_path / f"bare{suffix}").weights, weights)
    assert_same(back(tmp_path / f"bare{suffix}", config), weights)


@pytest.mark.parametrize("source", ["dit", "imf"], indirect=True)
def test_a_bare_flax_tree_is_read_back_bitwise(source, tmp_path):
    path, config, weights = source
    run(path, tmp_path / "bare.msgpack")
    tree = flax.serialization.msgpack_restore((tmp_path / "bare.msgpack").read_bytes())
    assert set(tree) == {"net"}
    assert_same(flat_of(tree), names.canonical_to_flax_tree(weights))
    assert_same(back(tmp_path / "bare.msgpack", config), weights)


def flat_of(tree):
    return sources.flatten(tree, "/")


# How each official PyTorch code gets a state dict out of a file, and the prefixes of its network there.
LOADERS = {
    "zhuyu": (lambda file: file["ema"], ("",)),
    "py-meanflow": (lambda file: file["model"], ("net.", "net_ema.", "net_ema1.", "net_ema2.")),
    "imf": (lambda file: file, ("net.",)),
    "dmf": (lambda file: file, ("",)),
    "edm2": (lambda file: file["net"], ("",)),
}


@pytest.mark.parametrize(("source", "name"), [c for c in CASES if c[1] in LOADERS], indirect=["source"])
def test_names_and_shapes_are_those_that_the_official_loader_reads(source, name, tmp_path):
    """Canonical names are those of the official state dicts; scalars have no axis there."""
    path, _, weights = source
    run(path, tmp_path / "official.pth", "--for", name)
    find, prefixes = LOADERS[name]
    state = find(torch.load(tmp_path / "official.pth", weights_only=True))
    if name == "py-meanflow":
        assert state.pop("num_updates").dtype == torch.int64
    weights = known_to(name, weights)
    want = {prefix + n: a for prefix in prefixes for n, a in weights.items()}
    assert_same({n: tensor.numpy() for n, tensor in state.items()}, want)
    stored = sum(a.nbytes for a in weights.values())
    assert stored < (tmp_path / "official.pth").stat().st_size < 2 * stored + 500 * len(want)


class TrainState(train_state.TrainState):
    """As in the official code: train.py, utils/trainstate_util.py."""

    ema_params: dict


@pytest.mark.parametrize(
    ("source", "name", "learning_rate"),
    [("dit", "meanflow-jax", 1e-3), ("imf", "imf-jax", optax.constant_schedule(1e-3))],
    indirect=["source"],
)
def test_the_official_jax_code_restores_its_train_state(source, name, learning_rate, tmp_path):
    path, _, weights = source
    run(path, tmp_path / "state.msgpack", "--for", name)
    expected = names.canonical_to_flax_tree(weights)
    fresh = flax.traverse_util.unflatten_dict({n: np.ones(a.shape) for n, a in expected.items()}, sep="/")
    adamw = optax.adamw(learning_rate, weight_decay=0, b2=0.95)
    state = jax.eval_shape(lambda: TrainState.create(apply_fn=None, params=fresh, ema_params=fresh, tx=adamw))
    restored = flax_checkpoints.restore_checkpoint(tmp_path / "state.msgpack", state)
    assert_same(flat_of(restored.ema_params), expected)
    assert_same(flat_of(restored.params), expected)
    assert jax.tree.map(np.shape, restored) == jax.tree.map(np.shape, state)  # the optimizer's state among them
    assert all((a == 0).all() for a in jax.tree.leaves((restored.step, restored.opt_state)))


@pytest.mark.parametrize("name", layouts.LAYOUTS)
@pytest.mark.parametrize("source", FITTING, indirect=True)
def test_a_layout_of_another_system_is_refused(source, name, tmp_path, request):
    path, _, _ = source
    fitting = FITTING[request.node.callspec.params["source"]]
    if name in fitting:
        return
    way_out = f"--for {' or '.join(fitting)} fits" if fitting else "no --for fits, leave it out"
    with pytest.raises(UserError, match=rf"--for {name} is for [^\n]*: {way_out}$"):
        run(path, tmp_path / f"a{SUFFIX[name]}", "--for", name)
    assert not (tmp_path / f"a{SUFFIX[name]}").exists()


@pytest.mark.parametrize("source", ["dit"], indirect=True)
@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".safetensors", ".msgpack"])
@pytest.mark.parametrize("name", layouts.LAYOUTS)
def test_a_suffix_that_a_code_does_not_read_is_refused(source, name, suffix, tmp_path):
    if suffix in layouts.LAYOUTS[name].suffixes:
        return
    fits = " or ".join(layouts.LAYOUTS[name].suffixes)
    with pytest.raises(UserError, match=rf"reads no \{suffix} file: with --for {name}, DEST ends in {fits}$"):
        run(source[0], tmp_path / f"a{suffix}", "--for", name)


@pytest.mark.parametrize("source", [n for n in FITTING if n not in ("dit", "imf")], indirect=True)
def test_a_system_without_a_flax_tree_is_refused(source, tmp_path):
    with pytest.raises(UserError, match=r"has no official Flax tree: name DEST \*\.safetensors or \*\.pt$"):
        run(source[0], tmp_path / "a.msgpack")


NEAR_MISSES = {  # networks that differ from a fitting one by an option
    "dit_qk": ("dit", {"qk_norm": True}, "zhuyu", "a DiT of MeanFlow with qk_norm: no --for fits"),
    "edm2_no_logvar": ("edm2_flow", {"logvar_channels": 0}, "edm2", "without its log-variance head: no --for fits"),
    "unet_interleaved": ("unet", {"qkv_layout": "interleaved"}, "py-meanflow", "model.qkv_layout='split'"),
    "unet_split": ("unet_separate", {"qkv_layout": "split"}, "zhuyu", "model.qkv_layout='interleaved'"),
}


@pytest.mark.parametrize("variant", NEAR_MISSES)
def test_an_option_that_the_official_network_lacks_is_refused(variant, tmp_path, monkeypatch):
    network, changes, name, message = NEAR_MISSES[variant]
    monkeypatch.setattr(objectives, "NETWORKS", {variant: objectives.NETWORKS[network] | changes})
    config, weights = case(variant)
    canonical_files.save(tmp_path / "a.safetensors", weights, {"source": "test"})
    (tmp_path / "config.json").write_text(store.to_json(config))
    with pytest.raises(UserError, match=message):
        run(tmp_path / "a.safetensors", tmp_path / "b.pt", "--for", name, "--config", tmp_path / "config.json")


@pytest.mark.parametrize("source", ["dit"], indirect=True)
@pytest.mark.parametrize(("convention", "warns"), [("sd", False), ("imm", True)])
def test_latents_that_the_code_decodes_otherwise_are_named(source, convention, warns, tmp_path, capsys):
    run(source[0], tmp_path / "a.msgpack", "--for", "meanflow-jax", "--latents", convention)
    said = capsys.readouterr().err
    assert ("Gsunshine/meanflow decodes latents of the convention 'sd'" in said) == warns
    assert ("these weights generate 'imm'" in said) == warns


@pytest.mark.parametrize("source", ["imf"], indirect=True)
def test_heads_that_the_code_lacks_are_named(source, tmp_path, capsys):
    run(source[0], tmp_path / "a.pth", "--for", "imf")
    assert "left out v_heads.*" in capsys.readouterr().err


@pytest.mark.parametrize("source", ["dit"], indirect=True)
def test_contradictory_options(source, tmp_path):
    path, _, _ = source
    for argv, message in (
        ([tmp_path / "run", "--to", "jax", "--for", "zhuyu"], "leave out one of them"),
        ([path, "--to", "hub"], "exists already"),
        ([tmp_path / "run", "--to", "hub"], "a hub folder needs a config, which .* does not hold: give --config"),
        ([tmp_path / "a.onnx"], r"a\.onnx ends in none of \.safetensors, \.pt"),
        ([tmp_path / "no" / "a.pt", "--for", "zhuyu"], "cannot write"),
        ([tmp_path / "no" / "a.msgpack"], "cannot write"),
    ):
        with pytest.raises(UserError, match=message):
            run(path, *argv)
    assert not (tmp_path / "run").exists()


def front_matter(text):
    """Return the YAML in front of a model card and what follows."""
    _, front, body = text.split("---\n", 2)
    return yaml.safe_load(front), body


@pytest.fixture
def run_dir(tmp_path):
    """Return the work directory of a run, as training and evaluation leave it, and its weights."""
    config, weights = case("dit")
    config.name = "tiny"
    config.latents.update(latents.CONVENTIONS["sd"]._asdict())
    config.data.name = "/somewhere/private/imagenet_latents"
    write_run("torch", tmp_path / "run", config, weights)
    result = {"num_samples": 20, "fid": 3.43210, "convention": "official", "reference": "/somewhere/private/in256.npz"}
    data_metrics.write_evaluation(tmp_path / "run", result)
    return tmp_path / "run", config, weights


def test_a_hub_folder_of_a_run(run_dir, tmp_path):
    path, config, weights = run_dir
    run(path, tmp_path / "hub", "--to", "hub")
    assert {child.name for child in (tmp_path / "hub").iterdir()} == {"model.safetensors", "config.json", "README.md"}
    model = tmp_path / "hub" / "model.safetensors"
    assert_same(canonical_files.load(model), weights)
    found = canonical_files.metadata(model)
    wanted = {"format": "canonical", "system": "meanflow", "network": "dit", "step": "0"}
    assert wanted.items() <= found.items()
    assert found["ema"] == f"EMA of decay {config.train.ema_decays[0]}"
    assert latents.from_dict(json.loads(found["latents"])) == latents.CONVENTIONS["sd"]
    assert found["config"] == (tmp_path / "hub" / "config.json").read_text()
    stored = read_workdir(tmp_path / "hub")
    assert stored.data.name == "imagenet_latents" and stored.model == config.model
    assert "/somewhere" not in "".join((tmp_path / "hub" / name).read_text() for name in ("README.md", "config.json"))
    run(model, tmp_path / "again", "--to", "torch", "--config", tmp_path / "hub" / "config.json")
    assert_same(torch_checkpoints.read_weights(tmp_path / "again")[1], weights)


def test_a_model_card_says_what_the_run_was(run_dir, tmp_path):
    path, config, weights = run_dir
    rows = [{"omega": omega, "interval": [0.0, 1.0], "fid": fid} for omega, fid in ((1.0, 9.0), (2.0, 4.5))]
    (path / "sweep.json").write_text(json.dumps(rows))
    run(path, tmp_path / "hub", "--to", "hub", "--ema", -1)
    front, body = front_matter((tmp_path / "hub" / "README.md").read_text())
    assert front["library_name"] == "meanflow" and front["pipeline_tag"] == "unconditional-image-generation"
    assert {"meanflow", "dit"} <= set(front["tags"])
    for text in (
        "# MeanFlow: tiny", "arxiv.org/abs/2505.13447", "8 x 8, 3 channels, latents of the convention 'sd'",
        f"{sum(a.size for a in weights.values()) / 1e6:.2f} million parameters", "conditioned on 7 classes",
        "| data | imagenet_latents, split train |", f"| trained for | 0 steps of {config.train.steps} |",
        f"| batch size | {config.train.batch_size} |", "| weights | raw parameters |", "| fid | 3.4321 |",
        "| reference | in256.npz |", f"omega {config.method.omega}, kappa {config.method.kappa}", "4.5 |",
    ):  # fmt: skip
        assert text in body, text
    assert body.count("## Metrics") == 1
    assert all(pathlib.Path(file).is_file() for file in re.findall(r"^python (\S+\.py)", body, re.MULTILINE))


def test_a_hub_folder_of_a_snapshot(tmp_path):
    config, weights = case("dmf")
    path = snapshots.path_of(tmp_path, 30, config.train.ema_decays[0])
    snapshots.write(tmp_path, config, 30, [weights] * len(config.train.ema_decays), canonical_files.save)
    run(path, tmp_path / "hub", "--to", "hub")
    metadata = canonical_files.metadata(tmp_path / "hub" / "model.safetensors")
    assert metadata["step"] == "30" and metadata["ema"] == f"EMA of decay {config.train.ema_decays[0]}"
    body = (tmp_path / "hub" / "README.md").read_text()
    assert f"| trained for | 30 steps of {config.train.steps} |" in body and "Metrics" not in body


@pytest.mark.parametrize("source", FITTING, indirect=True)
def test_every_system_has_a_model_card(source, tmp_path):
    path, config, _ = source
    run(path, tmp_path / "hub", "--to", "hub", "--config", config)
    front, body = front_matter((tmp_path / "hub" / "README.md").read_text())
    assert len(front["tags"]) == len(set(front["tags"])) and "not known: EMA or raw" in body
    assert ("one-step-generation" in front["tags"]) == ("flow" not in front["tags"])
    assert ("parameters, unconditional." in body) == ("unet" in front["tags"])
    assert "step" not in canonical_files.metadata(tmp_path / "hub" / "model.safetensors")


def test_damaged_results_are_named(run_dir, tmp_path):
    (run_dir[0] / "evaluation.json").write_text("{")
    with pytest.raises(UserError, match=r"cannot read .*evaluation\.json: .*delete it and evaluate again"):
        run(run_dir[0], tmp_path / "hub", "--to", "hub")


def test_a_hub_folder_is_a_model(run_dir, tmp_path):
    """Its config says what the weights do not show."""
    path, config, _ = run_dir
    run(path, tmp_path / "hub", "--to", "hub")
    model = torch_impl.load(tmp_path / "hub")
    assert model.config.model.num_heads == config.model.num_heads and model.config.name == "tiny"
    expected = torch_impl.load(path).sample(2, steps=1, decode=False)
    np.testing.assert_array_equal(model.sample(2, steps=1, decode=False), expected)


@pytest.mark.parametrize("network", ["dit", "imf", "edm2_flow"])
def test_a_hub_folder_says_how_far_the_frameworks_agree(network, tmp_path, capsys):
    """On the weights that were written, whatever the run's precision."""
    config, weights = case(network)
    config.model.compute_dtype = "bfloat16"
    write_run("torch", tmp_path / "run", config, weights)
    run(tmp_path / "run", tmp_path / "hub", "--to", "hub")
    model = tmp_path / "hub" / "model.safetensors"
    found = json.loads(canonical_files.metadata(model)["parity"])
    u = [agreement.velocity(load(model, dtype="float32")) for load in (jax_impl.load, torch_impl.load)]
    assert found["difference"] == pytest.approx(np.abs(u[0] - u[1]).max(), rel=1e-3)
    assert found["relative"] == pytest.approx(found["difference"] / np.abs(u[1]).max(), rel=1e-3)
    assert 0 < found["relative"] < 1e-5
    assert found["dtype"] == "float32" and found["inputs"] == agreement.INPUTS
    assert f"| JAX and PyTorch differ by | {found['relative']:.1e} of the" in (tmp_path / "hub/README.md").read_text()
    assert "warning: the frameworks differ" not in capsys.readouterr().err


def test_frameworks_that_disagree_are_named(run_dir, tmp_path, monkeypatch, capsys):
    def with_other_heads(path, config, **given):
        config = config.copy_and_resolve_references()
        config.model.num_heads *= 2
        return jax_impl.load(path, config=config, **given)

    monkeypatch.setattr(agreement, "jax_impl", types.SimpleNamespace(load=with_other_heads))
    run(run_dir[0], tmp_path / "hub", "--to", "hub")
    assert re.search(r"warning: the frameworks differ on .*model\.safetensors by .*check\.py", capsys.readouterr().err)
    assert json.loads(canonical_files.metadata(tmp_path / "hub" / "model.safetensors")["parity"])["relative"] > 1e-3


def test_what_a_hub_folder_says_is_kept(run_dir, tmp_path):
    """From the folder or its file; canonical weights of a run say the config alone."""
    path, config, _ = run_dir
    run(path, tmp_path / "hub", "--to", "hub", "--ema", -1)
    run(path, tmp_path / "a.safetensors")
    for name, source in (("of_folder", "hub"), ("of_file", "hub/model.safetensors"), ("of_weights", "a.safetensors")):
        run(tmp_path / source, tmp_path / name, "--to", "hub")
        found = canonical_files.metadata(tmp_path / name / "model.safetensors")
        said = (found.get("step"), found.get("ema"))
        assert said == ((None, None) if name == "of_weights" else ("0", "raw parameters"))
        assert read_workdir(tmp_path / name).model == config.model


def test_a_run_is_pushed(run_dir, tmp_path, monkeypatch, capsys):
    """What the hub is given is the folder; without permission one line says what to do."""
    path, _, _ = run_dir
    made = []
    monkeypatch.setattr(huggingface_hub, "create_repo", lambda repo, exist_ok: made.append((repo, exist_ok)))

    def upload(*, repo_id, folder_path, revision, commit_message):
        made.append((repo_id, revision, commit_message))
        shutil.copytree(folder_path, tmp_path / "uploaded")
        return f"https://the.hub/{repo_id}"

    monkeypatch.setattr(huggingface_hub, "upload_folder", upload)
    run(path, "hf://me/tiny@v1", "--to", "hub")
    assert made == [("me/tiny", True), ("me/tiny", "v1", "Weights of run")]
    assert "https://the.hub/me/tiny" in capsys.readouterr().out
    assert {f.name for f in (tmp_path / "uploaded").iterdir()} == {"model.safetensors", "config.json", "README.md"}

    def refuse(*_, **__):
        raise ValueError("no token")

    monkeypatch.setattr(huggingface_hub, "create_repo", refuse)
    with pytest.raises(UserError, match="cannot upload to hf://me/tiny: no token .*hf auth login"):
        run(path, "hf://me/tiny", "--to", "hub")
    for argv, message in (
        (("hf://me/tiny",), "only --to hub writes"),
        (("hf://me/tiny/file.pth", "--to", "hub"), "is not a repository on the hub"),
    ):
        with pytest.raises(UserError, match=message):
            run(path, *argv)
