"""What published files have too much or too little: they are sampled from, converted and trained from all the same."""

import numpy as np
import pytest
import torch

import torch_impl
from jax_impl import checkpoints as jax_checkpoints
from meanflow.config import options
from meanflow.weights import files, infer
from parity import check, convert
from parity.golden import fixtures
from torch_impl import checkpoints as torch_checkpoints
from torch_impl import weights as torch_weights
from torch_impl.step import build_net


def official(name, path, without=()):
    """Write an official state dict and return it."""
    weights = fixtures.Fixture(check.GOLDEN / f"{name}.npz").under("param/")
    weights = {n: a for n, a in weights.items() if not n.startswith(tuple(without))}
    torch.save({n: torch.from_numpy(np.array(a)) for n, a in weights.items()}, path)
    return weights


def start(config, path, caplog):
    """Return what a run starts from, of a file of canonical weights, and the message about it."""
    net = build_net(config)
    with caplog.at_level("INFO"):
        got = torch_weights.transfer(net, dict(net.named_parameters()), files.load(path))
    torch_weights.from_canonical(net, net.tables() | got)
    return got, caplog.messages[-1]


def test_a_run_starts_from_a_released_imf(tmp_path, caplog):
    weights = official("imf_dit_torch", tmp_path / "imf.pth")
    convert.convert(tmp_path / "imf.pth", tmp_path / "imf.safetensors")
    config = infer.inferred_config(files.load(tmp_path / "imf.safetensors"), 8)
    assert not config.model.v_heads
    config.model.v_heads = True
    got, message = start(config, tmp_path / "imf.safetensors", caplog)
    fresh = {name for name in got if name.startswith("v_heads.")}
    assert fresh and got.keys() - fresh == {name.removeprefix("net.") for name in weights}
    assert message.endswith(f"{len(weights)} are kept; {', '.join(sorted(fresh))} start fresh")


def test_decoupled_meanflow_without_its_log_variance(tmp_path, caplog, capsys):
    whole = official("dmf_dmft_torch", tmp_path / "whole.pt")
    official("dmf_dmft_torch", tmp_path / "part.pt", without=("logvar_linear.",))
    config = infer.inferred_config(whole)
    config.model.update(num_heads=4, dmf_depth=2)
    models = [torch_impl.load(tmp_path / f"{name}.pt", config=config) for name in ("whole", "part")]
    assert np.array_equal(*(model.sample(2, decode=False) for model in models))
    assert "lack logvar_linear, which sampling does not read" in capsys.readouterr().err
    convert.convert(tmp_path / "part.pt", tmp_path / "flow.safetensors")  # without a config, they are a flow model's
    got, message = start(config, tmp_path / "flow.safetensors", caplog)
    assert got.keys() - {"pos_embed"} == whole.keys() - {"pos_embed"}
    assert message.endswith("logvar_linear.bias, logvar_linear.weight start fresh")


@pytest.mark.parametrize(
    ("to", "checkpoints"), [("torch", torch_checkpoints), pytest.param("jax", jax_checkpoints, marks=pytest.mark.slow)]
)
def test_re_meanflow_with_its_log_variance(to, checkpoints, tmp_path, capsys):
    """Its official network keeps EDM2's log-variance and embedder of one time, of which its trainer uses neither."""
    whole = official("remeanflow_edm2_torch", tmp_path / "re.pt")
    config = options.get_config("edm2", "rectified")
    unused = {n for n in whole if n.startswith("logvar_") or n == "unet.emb_noise.weight"}
    assert len(unused) == 4
    inferred = infer.inferred_config({n: a for n, a in whole.items() if n != "unet.emb_noise.weight"})
    config.model.update(inferred.model, head_width=12, logvar_channels=0)
    convert.convert(tmp_path / "re.pt", tmp_path / "run", convert.Options(to=to, config=config))
    said = capsys.readouterr().err
    assert all(f"left out {name}, which the network does not read" in said for name in unused)
    _, written = checkpoints.read_weights(tmp_path / "run")
    assert written.keys() == whole.keys() - unused
    assert all(np.array_equal(a, whole[name].reshape(a.shape)) for name, a in written.items())
    if to == "torch":
        models = [torch_impl.load(tmp_path / "re.pt", config=config), torch_impl.load(tmp_path / "run")]
        assert np.array_equal(*(model.sample(2, decode=False) for model in models))
