"""Mistakes in the autoencoder, or in what is done to its latents, are seen by the golden runner."""

import json
import sys

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jax_impl.models import vae as jax_vae
from meanflow.config import latents as conventions
from meanflow.data.latents import units
from meanflow.errors import UserError
from meanflow.sampling import grids
from meanflow.weights import names
from parity import check
from parity.adapters import frozen_networks
from parity.golden import vae as golden_vae
from torch_impl.models import vae as torch_vae

VAE = {"jax": jax_vae, "torch": torch_vae}


def failures(only):
    """Return {(case, framework)} of the checks that fail."""
    return {(c.case, c.framework) for c in check.run(check.GOLDEN, only).checks if not c.ok}


@pytest.fixture(params=["jax", "torch"])
def framework(request, monkeypatch):
    """Which implementation has the mistake; fixtures do not run the other one."""
    alone(monkeypatch, request.param)
    return request.param


@pytest.fixture
def torch_alone(monkeypatch):
    """Run fixtures with PyTorch alone, which need not compile, for mistakes in what both share."""
    alone(monkeypatch, "torch")


def alone(monkeypatch, framework):
    monkeypatch.setattr(golden_vae, "AUTOENCODERS", {framework: golden_vae.AUTOENCODERS[framework]})
    monkeypatch.setattr(golden_vae.frozen_networks, "VAE", {framework: VAE[framework]})


def test_unchanged_passes(torch_alone):
    result = check.run(check.GOLDEN, "golden/(latent_scaling|vae)")
    assert result.ok and not result.not_covered


def test_symmetric_padding(framework, monkeypatch):
    original = VAE[framework].Conv.__init__

    def symmetric(self, *args, **options):
        original(self, *args, **options)
        self.padding = (1, 1) if self.stride == 2 and args[2] == 3 else self.padding

    monkeypatch.setattr(VAE[framework].Conv, "__init__", symmetric)
    assert failures("golden/vae/mean|golden/vae/decode") == {("golden/vae/mean", framework)}


def test_log_variance_read_as_standard_deviation(framework, monkeypatch):
    log, original = {"jax": jnp.log, "torch": torch.log}[framework], VAE[framework].AutoencoderKL.encode

    def as_std(self, x):
        mean, log_variance = original(self, x)
        return mean, 2 * log(abs(log_variance))  # exp(. / 2) is then |log_variance|

    monkeypatch.setattr(VAE[framework].AutoencoderKL, "encode", as_std)
    assert failures("golden/latent_scaling/dmf|golden/vae/std") == {
        ("golden/latent_scaling/dmf", framework), ("golden/vae/std", framework),
    }  # fmt: skip


@pytest.mark.parametrize("limits", [(-1e9, 20.0), (-30.0, 1e9)])
def test_log_variance_not_clipped(limits, monkeypatch):
    monkeypatch.setattr(torch_vae, "LOG_VARIANCE", limits)
    assert failures("float64/vae/encode") == {("float64/vae/encode", "jax-torch")}


def test_another_epsilon(framework, monkeypatch):
    monkeypatch.setattr(sys.modules[VAE[framework].GroupNorm.__module__], "EPS", 1e-3)
    assert ("golden/vae_flax/decode", framework) in failures("golden/vae_flax/decode")


@pytest.mark.parametrize("name", ["sd", "imm", "imf", "edm2"])
def test_a_wrong_convention(name, torch_alone, monkeypatch):
    right = conventions.CONVENTIONS[name]
    wrong = right._replace(scale=tuple(1.003 * scale for scale in right.scale))
    monkeypatch.setitem(conventions.CONVENTIONS, name, wrong)
    cases = {case for case, _ in failures("golden/latent_scaling")}
    assert cases == {f"golden/latent_scaling/{s}" for s, (of, _) in golden_vae.SYSTEMS.items() if of == name}


def test_pixels_of_the_other_range(torch_alone, monkeypatch):
    right = conventions.CONVENTIONS["edm2"]
    monkeypatch.setitem(conventions.CONVENTIONS, "edm2", right._replace(pixels="symmetric"))
    result = check.run(check.GOLDEN, "golden/latent_scaling/remf")
    assert {c.quantity.split()[0] for c in result.checks if not c.ok} == {"encode_pixels", "decode_u8"}


def test_shift_forgotten(torch_alone, monkeypatch):
    monkeypatch.setattr(units, "to_raw", lambda z, convention: z / np.array(convention.scale))
    cases = {case.removeprefix("golden/latent_scaling/") for case, _ in failures("golden/latent_scaling")}
    assert cases == {"imf_jax", "imf_torch", "remf"}


def test_roundings_exchanged(monkeypatch):
    roundings = grids.ROUNDINGS
    monkeypatch.setattr(grids, "ROUNDINGS", roundings | {"floor": roundings["shift"]})
    assert ("golden/latent_scaling/u8", "jax-torch") in failures("golden/latent_scaling/u8")


def test_another_fixture_of_the_same_form(torch_alone, tmp_path):
    """Of three levels, another batch and one convolution instead of a matrix, made by our own code."""
    settings, rng = frozen_networks.VAES["vae_deep"], np.random.RandomState(0)
    weights = {name: a.astype(np.float32) for name, a in frozen_networks.vae_weights(settings).items()}
    files = golden_vae.autoencoder.Files(settings, weights, "")
    z = rng.normal(size=(3, 3, 2, 4)).astype(np.float32)
    images = frozen_networks.vae("torch", files)("decode", z.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    query = weights.pop("decoder.mid_block.attentions.0.to_q.weight")
    weights["decoder.mid_block.attentions.0.query.weight"] = query[:, :, None, None]
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 3, "up_block_types": ["UpDecoderBlock2D"] * 3}
    config = {"system": "vae", "vae": settings | blocks | {"act_fn": "silu", "out_channels": 1}}
    arrays = {f"param/{name}": a for name, a in weights.items()} | {"in/z": z, "out/decode": images}
    np.savez(tmp_path / "other.npz", config=np.array(json.dumps(config)), **arrays)
    assert check.run(tmp_path, "other/decode").ok
    missing = check.run(tmp_path, "other/mean")
    assert [c.quantity for c in missing.checks] == ["cannot be checked: other has no 'in/x'"]


def test_names_of_the_flax_tree_and_back():
    with np.load(check.GOLDEN / "vae_flax.npz") as file:
        tree = {key.removeprefix("param/"): file[key] for key in file.files if key.startswith("param/")}
    weights = names.flax_tree_to_canonical(tree)
    back = names.canonical_to_flax_tree(weights)
    assert back.keys() == tree.keys() and all(np.array_equal(back[name], a) for name, a in tree.items())
    for unknown in ("encoder/conv_in/other", "encoder/mid_block/resnets_0/norm1/kernel", "decoder/what/kernel"):
        with pytest.raises(UserError, match=unknown):
            names.flax_tree_to_canonical(tree | {unknown: np.zeros(1)})
