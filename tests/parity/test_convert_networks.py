"""The converter on Inception's weights, and the convention of latents that goes with a model's."""

import json
import re

import numpy as np
import pytest
import torch

from configs import digits
from jax_impl import weights as jax_weights
from meanflow.config import latents
from meanflow.errors import UserError
from parity import check, convert
from parity.adapters import frozen_networks
from parity.golden import fixtures
from torch_impl import checkpoints
from torch_impl import weights as torch_weights

SD = latents.CONVENTIONS["sd"]


@pytest.fixture(scope="module")
def inception():
    """Return a state dict as torch-fidelity keeps it."""
    state = {name: torch.from_numpy(a) for name, a in frozen_networks.inception_weights(1).items()}
    return state | {"Mixed_5b.branch1x1.bn.num_batches_tracked": torch.tensor(0)}


@pytest.fixture
def sit(tmp_path):
    """Return a file of canonical weights of a model of latents."""
    weights = fixtures.Fixture(check.GOLDEN / "sit_torch.npz").under("param/")
    torch_weights.save(tmp_path / "sit.safetensors", weights, {})
    return tmp_path / "sit.safetensors"


@pytest.fixture
def config():
    """Return the config of the network of `sit`."""
    config = digits.get_config()
    config.model.update(input_size=8, channels=4, num_classes=10, depth=3, width=32, num_heads=4)
    return config


def convention(path):
    """Return the convention in a file's metadata."""
    return latents.from_dict(json.loads(torch_weights.metadata(path)["latents"]))


def test_inception(inception, tmp_path, capsys):
    torch.save(inception, tmp_path / "official.pth")
    convert.main([str(tmp_path / "official.pth"), str(tmp_path / "inception.safetensors")])
    assert "(PyTorch state dict of Inception)" in capsys.readouterr().out
    loaded = jax_weights.load(tmp_path / "inception.safetensors")
    want = frozen_networks.inception_weights(1)
    assert loaded.keys() == want.keys() and all(np.array_equal(loaded[name], a) for name, a in want.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fc.weight": torch.zeros(1000, 2048)}, r"fc.weight has shape \(1000, 2048\)"),
        ({"AuxLogits.fc.weight": torch.zeros(2)}, "have unknown AuxLogits.fc.weight"),
        ({"Mixed_7c.branch_pool.bn.bias": None}, "lack Mixed_7c.branch_pool.bn.bias"),
    ],
)
def test_other_inceptions_are_refused(inception, tmp_path, change, message):
    state = {name: a for name, a in (inception | change).items() if a is not None}
    torch.save(state, tmp_path / "official.pth")
    with pytest.raises(UserError, match=message):
        convert.convert(tmp_path / "official.pth", tmp_path / "inception.safetensors")
    assert not (tmp_path / "inception.safetensors").exists()


def test_inception_has_no_latents(inception, tmp_path):
    torch.save(inception, tmp_path / "official.pth")
    for options in (convert.Options(latents="sd"), convert.Options(to="jax")):
        with pytest.raises(UserError, match="leave out --"):
            convert.convert(tmp_path / "official.pth", tmp_path / "a.safetensors", options)


@pytest.mark.parametrize("name", ["sd", "imm", "imf", "edm2"])
def test_latents_by_name(sit, tmp_path, name):
    dest = tmp_path / "named.safetensors"
    convert.main([str(sit), str(dest), "--latents", name])
    assert convention(dest) == latents.CONVENTIONS[name]
    assert jax_weights.metadata(dest) == torch_weights.metadata(dest)
    convert.convert(dest, tmp_path / "again.safetensors")  # it goes on from file to file
    assert convention(tmp_path / "again.safetensors") == latents.CONVENTIONS[name]


def test_without_a_convention(sit, tmp_path):
    convert.convert(sit, tmp_path / "plain.safetensors")
    assert "latents" not in torch_weights.metadata(tmp_path / "plain.safetensors")


@pytest.mark.parametrize("framework", ["jax", "torch"])
def test_latents_of_a_work_directory(sit, config, tmp_path, framework):
    run = tmp_path / "run"
    convert.convert(sit, run, convert.Options(to=framework, config=config, latents="imf"))
    convert.convert(run, tmp_path / "back.safetensors")
    assert convention(tmp_path / "back.safetensors") == latents.CONVENTIONS["imf"]
    if framework == "torch":
        assert latents.of(checkpoints.read_weights(run, 0)[0]) == latents.CONVENTIONS["imf"]
    with pytest.raises(UserError, match="images would come out wrong"):
        convert.convert(run, tmp_path / "other.safetensors", convert.Options(latents="sd"))


def test_conventions_that_differ(sit, config, tmp_path):
    dest = tmp_path / "named.safetensors"
    convert.convert(sit, dest, convert.Options(latents="sd"))
    config.latents.update(SD._replace(scale=(0.2,))._asdict())
    with pytest.raises(UserError, match="the config has latents .* but .*named.safetensors"):
        convert.convert(dest, tmp_path / "other.safetensors", convert.Options(config=config))


def test_the_way_out_of_two_conventions_is_one_that_the_converter_has(sit, config, tmp_path):
    config.latents.update(SD._asdict())
    with pytest.raises(UserError, match="--latents has latents .*'imm'.* but the config has .*'sd'") as error:
        convert.convert(sit, tmp_path / "run", convert.Options(to="jax", config=config, latents="imm"))
    options = re.findall(r"--\w[\w.]*", str(error.value))
    assert set(options) == {"--latents", "--config"} and not (tmp_path / "run").exists()


def test_metadata_that_is_no_convention(sit, tmp_path):
    dest = tmp_path / "wrong.safetensors"
    for text, message in (("{", "is not JSON"), ("{}", "is not a latent convention")):
        torch_weights.save(dest, torch_weights.load(sit), {"latents": text})
        with pytest.raises(UserError, match=message):
            convert.convert(dest, tmp_path / "other.safetensors")


def test_metadata_of_what_is_no_file(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"12345678")
    for weights in (jax_weights, torch_weights):
        for path in (tmp_path / "a.safetensors", tmp_path / "none.safetensors"):
            with pytest.raises(UserError, match="as safetensors"):
                weights.metadata(path)
