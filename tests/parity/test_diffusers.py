"""Folders of diffusers: both frameworks and diffusers' own scheduler and pipelines read what the converter writes."""

import itertools
import json

import diffusers
import make_parts
import numpy as np
import pytest
import tiny as tiny_configs
import torch
from saved import write_run

import jax_impl
import torch_impl
from meanflow.config import latents
from meanflow.data.latents import units
from meanflow.errors import UserError
from meanflow.sampling import noise
from meanflow.weights import files
from parity import convert, diffusers_folder
from parity.cases import objectives
from parity.diffusers_pipeline import MeanFlowPipeline
from torch_impl import checkpoints
from torch_impl.methods.rectified import TIME_MAX
from torch_impl.methods.samplers import full
from torch_impl.model import conditions
from torch_impl.step import build_net

NETWORKS = {
    "dit": "meanflow", "imf_dit": "improved", "dmf_dit": "decoupled", "unet": "meanflow", "edm2": "rectified",
}  # fmt: skip
LABELS = [1, 4, 1, 4, 1]
APART = 1e-5
FACTORS = {
    "imf_dit": 3,
    "unet": 3,
    "edm2": 3,
}  # of weights, so that these networks feel their times


def written(path, network="dit", method="meanflow", changes=()):
    """Return a run and the folder that it is converted to; weights are random and non-zero, steps are not uniform."""
    config = tiny_configs.make(network, method, {"sample.shift": 1.5} | dict(changes))
    weights, tables = objectives.random_weights(config), build_net(config).tables()
    weights = {name: a if name in tables else FACTORS.get(network, 1) * a for name, a in weights.items()}
    weights = {name: a.astype(np.float32) for name, a in weights.items()}
    write_run("torch", path / "run", config, weights)
    convert.main([str(path / "run"), str(path / "out"), "--to", "diffusers"])
    assert files.load(path / "out" / "transformer" / diffusers_folder.WEIGHTS).keys() == weights.keys()
    return path / "run", path / "out"


def drawn(config):
    """Return the noise [b c h w] of the first samples."""
    c = config.model
    z, _, _ = noise.draw(np.arange(len(LABELS)), (c.input_size, c.input_size, c.channels), c.num_classes, 0)
    return torch.from_numpy(z).permute(0, 3, 1, 2)


def expected(run, steps, **more):
    """Return what our own sampler makes of a run, [b c h w]."""
    return torch_impl.load(run).sample(len(LABELS), LABELS, steps=steps, decode=False, **more).transpose(0, 3, 1, 2)


@pytest.mark.parametrize("network", NETWORKS)
def test_the_scheduler_of_diffusers_drives_our_network(network, tmp_path):
    run, out = written(tmp_path, network, NETWORKS[network])
    scheduler = diffusers.FlowMapEulerDiscreteScheduler.from_pretrained(out, subfolder="scheduler")
    model, latest = torch_impl.load(out), TIME_MAX if network == "edm2" else 1.0
    assert scheduler.config.shift == 1.5
    for steps in (1, 2):
        z, y = drawn(model.config), torch.tensor(LABELS)
        scheduler.set_timesteps(steps)
        for t, r in itertools.pairwise(scheduler.sigmas):
            given = {name: full(z, value) for name, value in conditions(model.config).items()}
            u = model.net(z, full(z, min(float(t), latest)), full(z, min(float(r), latest)), y, **given)
            z = scheduler.step(u, t * scheduler.config.num_train_timesteps, z).prev_sample
        assert np.abs(z.numpy() - expected(run, steps)).max() < APART
        assert np.abs(z.numpy() - drawn(model.config).numpy()).max() > 0.1


@pytest.mark.parametrize("network", NETWORKS)
def test_both_frameworks_read_the_folder(network, tmp_path):
    run, out = written(tmp_path, network, NETWORKS[network])
    want, got = (checkpoints.read_weights(run)[1], files.load(out / "transformer" / diffusers_folder.WEIGHTS))
    assert all(np.array_equal(want[name], got[name]) for name in want)
    options = {"labels": LABELS, "steps": 2, "decode": False}
    samples = torch_impl.load(run).sample(5, **options)
    np.testing.assert_array_equal(torch_impl.load(out).sample(5, **options), samples)
    assert np.abs(jax_impl.load(out).sample(5, **options) - samples).max() < APART


@pytest.mark.parametrize("network", ["dit", "imf_dit", "edm2"])
def test_the_pipeline(network, tmp_path):
    """Also guided inside an interval, with other times, and saved again."""
    guided = {"sample.omega": 3.0} if network == "imf_dit" else {"sample.cfg_scale": 2.0, "sample.interval": (0.0, 0.7)}
    run, out = written(tmp_path, network, NETWORKS[network], guided)
    pipe = MeanFlowPipeline.from_pretrained(out)
    pipe.set_progress_bar_config(disable=True)
    z = drawn(pipe.transformer.run)
    for steps in (1, 2):
        got = pipe(LABELS, steps, latents=z, output_type="latent").images.numpy()
        assert np.abs(got - expected(run, steps)).max() < APART
    option = {"omega": 1.0} if network == "imf_dit" else {"cfg_scale": 1.0}
    other = pipe(LABELS, 2, latents=z, output_type="latent", **option).images.numpy()
    assert np.abs(other - expected(run, 2, **option)).max() < APART < np.abs(other - got).max()
    at = pipe(LABELS, sigmas=[1.0, 0.25], latents=z, output_type="latent").images.numpy()
    assert np.abs(at - expected(run, 2, times=(1.0, 0.375 / 1.125, 0.0))).max() < APART  # the shift is on top
    pipe.save_pretrained(tmp_path / "again")
    again = MeanFlowPipeline.from_pretrained(tmp_path / "again")
    assert np.array_equal(again(LABELS, 2, latents=z, output_type="latent").images.numpy(), got)
    first, second = (pipe(LABELS, generator=torch.manual_seed(1), output_type="np").images for _ in range(2))
    assert np.array_equal(first, second) and first.shape == (5, 8, 8, 1) and 0 <= first.min() < first.max() <= 1
    assert pipe(LABELS).images[0].size == (8, 8)


def test_a_lower_precision(tmp_path):
    _, out = written(tmp_path)
    pipe = MeanFlowPipeline.from_pretrained(out, torch_dtype=torch.bfloat16)
    assert pipe.transformer.run.model.compute_dtype == "bfloat16"
    z = drawn(pipe.transformer.run)
    low, high = (
        p(LABELS, 1, latents=z, output_type="latent").images for p in (pipe, MeanFlowPipeline.from_pretrained(out))
    )
    assert 1e-4 < (low - high).abs().max() < 0.1


@pytest.mark.parametrize("convention", ["sd", "imf"])
def test_latents(convention, tmp_path):
    """The autoencoder is named, with the convention as AutoencoderKL states it; images are decoded by it."""
    make_parts.autoencoder(tmp_path / "vae")
    given = latents.CONVENTIONS[convention]
    changes = {f"latents.{name}": value for name, value in given._asdict().items()}
    changes |= {"latents.vae": str(tmp_path / "vae"), "model.channels": 4}
    _, out = written(tmp_path, changes=changes)
    settings = json.loads((out / "vae" / "config.json").read_text())
    assert settings["_class_name"] == "AutoencoderKL" and settings["_name_or_path"] == "vae"
    config = diffusers.AutoencoderKL.from_config(diffusers.AutoencoderKL.load_config(out / "vae")).config
    z = np.random.RandomState(0).normal(size=(2, 8, 8, 4)).astype(np.float32)
    shift, std = config.shift_factor if convention == "sd" else np.array(config.latents_mean), config.latents_std or 1
    np.testing.assert_allclose(z * std / config.scaling_factor + shift, units.to_raw(z, given), rtol=1e-5)
    assert str(tmp_path) not in "".join(path.read_text() for path in out.rglob("*.json"))
    pipe = MeanFlowPipeline.from_pretrained(out)
    pipe.transformer.model.config.latents.vae = str(tmp_path / "vae")
    images = pipe(LABELS, latents=drawn(pipe.transformer.run), output_type="np").images
    want = torch_impl.load(tmp_path / "run").sample(5, LABELS)
    assert images.shape == want.shape == (5, 32, 32, 3) and np.abs(255 * images - want).max() < 0.51


def test_a_convention_that_is_given(tmp_path):
    run, _ = written(tmp_path, changes={"model.channels": 4})
    convert.main([str(run), str(tmp_path / "given"), "--to", "diffusers", "--latents", "imm"])
    assert json.loads((tmp_path / "given" / "vae" / "config.json").read_text())["scaling_factor"] == 0.18125
    assert latents.of(torch_impl.load(tmp_path / "given").config) == latents.CONVENTIONS["imm"]
    metadata = files.metadata(tmp_path / "given" / "transformer" / diffusers_folder.WEIGHTS)
    assert latents.from_dict(json.loads(metadata["latents"])) == latents.CONVENTIONS["imm"]


def test_what_is_refused(tmp_path):
    run, out = written(tmp_path)
    for argv, message in (
        ([run, "hf://me/tiny", "--to", "diffusers"], "only --to hub writes"),
        ([run, out, "--to", "diffusers"], "exists already"),
        ([run, tmp_path / "new", "--to", "diffusers", "--for", "zhuyu"], "leave out one of them"),
        ([out / "transformer" / "config.json", tmp_path / "new", "--to", "diffusers"], "neither safetensors"),
    ):
        with pytest.raises(UserError, match=message):
            convert.main([str(a) for a in argv])
