"""`jax_impl.load` and `torch_impl.load`: the same call, the same images, from runs and from official files."""

import importlib

import jax
import numpy as np
import pytest
import tiny as tiny_configs
import torch
from saved import write_run

import jax_impl
import torch_impl
from benchmarks import weights as table
from meanflow.commands import sample as sampling
from meanflow.errors import UserError
from parity import convert
from torch_impl import weights
from torch_impl.step import build_net

LOADERS = {"jax": jax_impl.load, "torch": torch_impl.load}
APART = 1e-4  # of samples, before they are decoded and rounded
NETWORKS = {
    "dit": "meanflow", "imf_dit": "improved", "dmf_dit": "decoupled", "unet": "meanflow", "edm2": "rectified",
}  # fmt: skip


def canonical(config):
    """Return random non-zero weights of a config's network."""
    net, rng = build_net(config), np.random.RandomState(0)
    own = weights.to_canonical(net, dict(net.named_parameters()))
    return {name: (0.2 * rng.normal(size=a.shape)).astype(np.float32) for name, a in own.items()} | net.tables()


def apart(samples):
    return float(np.abs(samples["jax"] - samples["torch"]).max())


@pytest.mark.parametrize("network", NETWORKS)
def test_both_frameworks_draw_the_same_images(network, tmp_path):
    """From a run of each framework, from canonical weights, and from the official state dict with the run's config."""
    config = tiny_configs.make(network, NETWORKS[network])
    given = canonical(config)
    for name in LOADERS:
        write_run(name, tmp_path / name, config, given)
    convert.convert(tmp_path / "jax", tmp_path / "w.safetensors", convert.Options(ema=1))
    torch.save({"ema": {n: torch.from_numpy(np.array(a)) for n, a in given.items()}}, tmp_path / "w.pth")
    options = {"steps": 2, "seed": 3, "decode": False}
    labels = [] if network == "unet" else [1, 4]
    first = None
    for source, more in (("{name}", {}), ("w.safetensors", {}), ("w.pth", {"config": config})):
        models = {n: load(tmp_path / source.format(name=n), **more) for n, load in LOADERS.items()}
        samples = {n: model.sample(5, labels, **options) for n, model in models.items()}
        first = samples if first is None else first
        assert samples["jax"].shape == (5, config.model.input_size, config.model.input_size, config.model.channels)
        assert apart(samples) <= APART and np.abs(samples["torch"]).max() > 0.1
        assert all(np.array_equal(samples[name], first[name]) for name in samples), source
        pixels = {n: model.sample(5, labels, steps=2, seed=3) for n, model in models.items()}
        assert pixels["jax"].dtype == np.uint8 and np.abs(pixels["jax"].astype(int) - pixels["torch"]).max() <= 1
    other = models["torch"].sample(3, labels, steps=2, seed=3, decode=False)
    assert np.allclose(other, first["torch"][:3], atol=1e-5)  # of its row alone
    assert not np.allclose(models["torch"].sample(3, labels, steps=1, seed=3, decode=False), other)


@pytest.mark.parametrize("row", table.ROWS, ids=lambda row: f"{row.source}, {row.file}")
def test_an_official_file_gives_the_recorded_output(row, tmp_path):
    found = table.measure(row, tmp_path)
    assert max(float(found["jax"]), float(found["torch"])) <= table.BOUND and found.get("back") != "differs"


def test_a_wrong_number_of_heads_would_be_seen(tmp_path):
    row = table.ROWS[0]._replace(options={"num_heads": 2})
    assert float(table.measure(row, tmp_path)["torch"]) > 1e-2


def test_the_page_is_up_to_date():
    rows = [line.split("|")[1:3] for line in table.PAGE.read_text().splitlines() if line.startswith("|")]
    assert [[row.source, row.file] for row in table.ROWS] == [
        [a.strip(), b.strip()] for a, b in rows[2:][: len(table.ROWS)]
    ]


def test_what_the_network_is_told(tmp_path):
    config = tiny_configs.make("imf_dit", "improved")
    write_run("torch", tmp_path / "torch", config, canonical(config))
    convert.convert(tmp_path / "torch", tmp_path / "w.safetensors")
    models = {name: load(tmp_path / "w.safetensors") for name, load in LOADERS.items()}
    z = np.random.RandomState(1).normal(size=(3, 8, 8, 1))
    u = {n: m.velocity(z, 0.9, [0.1, 0.5, 0.9], [1, 2, 10], omega=4.0) for n, m in models.items()}
    assert apart(u) <= 1e-5
    assert not np.allclose(u["jax"], models["jax"].velocity(z, 0.9, [0.1, 0.5, 0.9], [1, 2, 10], omega=1.0))
    images = {n: m.sample(2, [1], omega=4.0, interval=[0.2, 0.8], decode=False) for n, m in models.items()}
    assert apart(images) <= APART
    assert not np.allclose(images["jax"], models["jax"].sample(2, [1], omega=1.0, decode=False))


def test_nothing_else_is_changed(tmp_path):
    """Precision and random state are the process's own; a config that is given is not touched."""
    config = tiny_configs.make("dit", "meanflow", {"train.matmul_precision": "default"})
    write_run("torch", tmp_path / "torch", config, canonical(config))
    convert.convert(tmp_path / "torch", tmp_path / "w.safetensors")
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32, torch.random.get_rng_state()
    jax_before = jax.config.jax_default_matmul_precision, jax.config.jax_enable_x64
    text = config.to_json()
    for load in LOADERS.values():
        load(tmp_path / "w.safetensors", config=config, dtype="float64").sample(2, steps=3)
    assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == before[:2]
    assert torch.equal(torch.random.get_rng_state(), before[2]) and config.to_json() == text
    assert (jax.config.jax_default_matmul_precision, jax.config.jax_enable_x64) == jax_before


@pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)
def test_what_is_refused(load, tmp_path):
    config = tiny_configs.make()
    write_run("jax" if load is torch_impl.load else "torch", tmp_path / "other", config, canonical(config))
    with pytest.raises(UserError, match=r"holds a (JAX|PyTorch) checkpoint, not .*python -m parity.convert"):
        load(tmp_path / "other")
    torch.save({n: torch.from_numpy(np.array(a)) for n, a in canonical(config).items()}, tmp_path / "w.pth")
    with pytest.raises(UserError, match="no published network has depth 1 and width 16: give num_heads"):
        load(tmp_path / "w.pth")
    with pytest.raises(UserError, match="heads is no option of the network dit"):
        load(tmp_path / "w.pth", num_heads=2, heads=2)
    with pytest.raises(UserError, match="there is no"):
        load(tmp_path / "none.pth")
    model = load(tmp_path / "w.pth", num_heads=2)
    assert model.kind == "PyTorch state dict" and model.config.model.num_heads == 2
    with pytest.raises(UserError, match="not by omega"):
        model.sample(1, omega=2.0)
    with pytest.raises(UserError, match="label 11 is outside"):
        model.sample(1, labels=[11])
    with pytest.raises(UserError, match="is not told omega"):
        model.velocity(np.zeros((1, 8, 8, 1)), 1, 0, 1, omega=2.0)
    with pytest.raises(UserError, match="for 2 rows"):
        model.velocity(np.zeros((2, 8, 8, 1)), [1, 1, 1], 0, 1)
    with pytest.raises(UserError, match="makes images, not latents"):
        model.decode(np.zeros((1, 8, 8, 1)))


@pytest.mark.parametrize("framework", LOADERS)
def test_commands_take_the_same_weights(framework, parse_flags, tmp_path):
    """Here an official file of two networks and a config that says its heads; --ema chooses among its networks."""
    config = tiny_configs.make("dit", "meanflow")
    given = canonical(config)
    parts = {"ema": given, "model": {n: a if n == "pos_embed" else 2 * a for n, a in given.items()}}
    torch.save(
        {k: {n: torch.from_numpy(np.array(a)) for n, a in w.items()} for k, w in parts.items()}, tmp_path / "w.pth"
    )
    module = importlib.import_module(f"{framework}_impl.sample")
    found = {}
    for ema in ("", "--ema=0", "--ema=-1"):
        parse_flags(
            sampling.define_sample_flags, f"--weights={tmp_path / 'w.pth'}", "--steps=2", *([ema] if ema else [])
        )
        loaded = module.load(None, str(tmp_path / "w.pth"), config)
        found[ema], _ = sampling.generate(*loaded, 3, [1])
    model = LOADERS[framework](tmp_path / "w.pth", config=config)
    expected = model.sample(3, [1], steps=2, decode=False)
    assert np.abs(found[""] - expected).max() < 1e-6 and np.array_equal(found[""], found["--ema=0"])
    assert not np.allclose(found["--ema=-1"], expected)
