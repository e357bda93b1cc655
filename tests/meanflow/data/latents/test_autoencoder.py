"""Autoencoders are read as diffusers saves them, whatever its version, and anything else is refused by name."""

import builtins
import json

import numpy as np
import pytest
import safetensors.torch
import torch
from safetensors.numpy import save_file

from meanflow.data.latents import autoencoder
from meanflow.errors import UserError

CONFIG = {
    "_class_name": "AutoencoderKL", "act_fn": "silu", "block_out_channels": [8, 16], "layers_per_block": 1,
    "down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2, "in_channels": 3,
    "out_channels": 3, "latent_channels": 4, "norm_num_groups": 4, "sample_size": 16,
}  # fmt: skip
ATTENTION = "encoder.mid_block.attentions.0."
ARRAYS = {
    f"{ATTENTION}to_q.weight": np.arange(4, dtype=np.float32).reshape(2, 2),
    f"{ATTENTION}to_out.0.bias": np.ones(2, np.float32),
    "quant_conv.weight": np.ones((2, 2, 1, 1), np.float32),
}


def write(directory, arrays=ARRAYS, kind="safetensors", **changes):
    """Write an autoencoder of few arrays, and return the directory's name."""
    (directory / "config.json").write_text(json.dumps(CONFIG | changes))
    if kind == "safetensors":
        save_file(arrays, directory / "diffusion_pytorch_model.safetensors")
    else:
        tensors = {name: torch.from_numpy(a) for name, a in arrays.items()}
        torch.save(tensors, directory / "diffusion_pytorch_model.bin")
    return str(directory)


@pytest.fixture(params=["safetensors", "bin"])
def kind(request):
    return request.param


def test_settings_weights_and_digest(tmp_path, kind):
    files = autoencoder.read(write(tmp_path, kind=kind))
    assert files.settings == {
        "in_channels": 3, "latent_channels": 4, "layers_per_block": 1, "norm_num_groups": 4,
        "block_out_channels": (8, 16),
    }  # fmt: skip
    assert files.weights.keys() == ARRAYS.keys()
    assert all(np.array_equal(files.weights[name], a) for name, a in ARRAYS.items())
    assert files.digest == autoencoder.of(files.settings, dict(reversed(ARRAYS.items())), "").digest
    assert len(files.digest) == 16
    other = ARRAYS | {f"{ATTENTION}to_out.0.bias": np.zeros(2, np.float32)}
    assert files.digest != autoencoder.of(files.settings, other, "").digest
    assert files.digest != autoencoder.of(files.settings | {"norm_num_groups": 2}, ARRAYS, "").digest


@pytest.mark.parametrize("shape", [(2, 2), (2, 2, 1, 1)])
def test_old_names(tmp_path, kind, shape):
    old = {
        f"{ATTENTION}query.weight": ARRAYS[f"{ATTENTION}to_q.weight"].reshape(shape),
        f"{ATTENTION}proj_attn.bias": ARRAYS[f"{ATTENTION}to_out.0.bias"],
        "quant_conv.weight": ARRAYS["quant_conv.weight"],
    }
    files = autoencoder.read(write(tmp_path, old, kind))
    assert {name: a.shape for name, a in files.weights.items()} == {name: a.shape for name, a in ARRAYS.items()}
    assert all(np.array_equal(files.weights[name], a) for name, a in ARRAYS.items())


def test_a_name_twice(tmp_path):
    both = ARRAYS | {f"{ATTENTION}query.weight": np.ones((2, 2), np.float32)}
    with pytest.raises(UserError, match=f"holds {ATTENTION}to_q.weight twice"):
        autoencoder.read(write(tmp_path, both))


def test_half_precision_becomes_float32(tmp_path, kind):
    half = {name: a.astype(np.float16) for name, a in ARRAYS.items()}
    assert {a.dtype for a in autoencoder.read(write(tmp_path, half, kind)).weights.values()} == {np.dtype(np.float32)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_class_name": "AutoencoderTiny"}, "is of a AutoencoderTiny, and only AutoencoderKL is known"),
        ({"down_block_types": ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"]}, "down_block_types"),
        ({"up_block_types": ["UpDecoderBlock2D"]}, "up_block_types"),
        ({"act_fn": "relu"}, "act_fn is 'relu', and only 'silu' is known"),
        ({"use_quant_conv": False}, "use_quant_conv"),
        ({"mid_block_add_attention": False}, "mid_block_add_attention"),
        ({"out_channels": 4}, "out_channels is 4, and only 3 is known"),
        ({"block_out_channels": []}, "block_out_channels"),
        ({"latent_channels": "4"}, "whole numbers"),
    ],
)
def test_other_autoencoders_are_refused(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        autoencoder.read(write(tmp_path, **changes))


def test_incomplete_config(tmp_path):
    config = {name: value for name, value in CONFIG.items() if name != "norm_num_groups"}
    write(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="lacks norm_num_groups: give a complete copy"):
        autoencoder.read(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="cannot read"):
        autoencoder.read(str(tmp_path))


def test_half_precision_is_read_exactly(tmp_path):
    write(tmp_path)
    halves = {name: torch.from_numpy(a).bfloat16() for name, a in ARRAYS.items()}
    safetensors.torch.save_file(halves, tmp_path / "diffusion_pytorch_model.safetensors")
    got = autoencoder.read(str(tmp_path)).weights
    assert all(np.array_equal(got[name], halves[name].float()) for name in ARRAYS)


def test_damaged_weights(tmp_path, kind):
    write(tmp_path, kind=kind)
    path = tmp_path / f"diffusion_pytorch_model.{kind}"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(UserError, match="cannot read"):
        autoencoder.read(str(tmp_path))


def test_code_in_weights_is_not_executed(tmp_path):
    write(tmp_path, kind="bin")
    torch.save({"a": print}, tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(UserError, match=r"\.bin is refused: it holds objects of 'builtins.print'") as error:
        autoencoder.read(str(tmp_path))
    assert "weights_only" not in str(error.value) and "\x1b" not in str(error.value)


def test_what_is_no_directory_of_an_autoencoder(tmp_path):
    with pytest.raises(UserError, match="there is no directory"):
        autoencoder.read(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="neither diffusion_pytorch_model.safetensors"):
        autoencoder.read(str(tmp_path))
    (tmp_path / "vae").mkdir()
    with pytest.raises(UserError, match="a whole pipeline: name the autoencoder in it, .*vae"):
        autoencoder.read(str(tmp_path))


def test_the_hub(tmp_path, monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    write(tmp_path, kind="bin")

    def download(name, file):
        assert name == "some/vae"
        if not (tmp_path / file).exists():
            raise EntryNotFoundError(file)
        return str(tmp_path / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert autoencoder.read("some/vae").weights.keys() == ARRAYS.keys()

    def offline(name, file):
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(UserError, match="cannot fetch the autoencoder some/vae: no connection.*copy the directory"):
        autoencoder.read("some/vae")


def test_the_hub_without_its_package(monkeypatch):
    original = builtins.__import__

    def without(name, *args, **options):
        if name.startswith("huggingface_hub"):
            raise ModuleNotFoundError(name)
        return original(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"huggingface_hub, which is not installed: .*\[latents\]"):
        autoencoder.read("some/vae")


def test_the_factor_needs_no_weights(tmp_path):
    path = write(tmp_path, kind="safetensors")
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    assert autoencoder.read_factor(path) == 2


def test_latent_shape():
    files = autoencoder.Files({"block_out_channels": (8, 16, 32, 32), "latent_channels": 4}, {}, "")
    assert autoencoder.factor(files) == 8
    assert autoencoder.latent_shape(files, 256) == (32, 32, 4)
    with pytest.raises(UserError, match="give a multiple of 8"):
        autoencoder.latent_shape(files, 100)
