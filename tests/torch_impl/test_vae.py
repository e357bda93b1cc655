"""The autoencoder: that of diffusers, whatever file it comes from, and what its functions promise."""

import diffusers
import numpy as np
import pytest
import torch

from meanflow.config.latents import CONVENTIONS
from meanflow.data.latents import autoencoder
from meanflow.errors import UserError
from torch_impl import weights
from torch_impl.autoencoder import make_decoder, make_encoder
from torch_impl.models.vae import AutoencoderKL, group_norm


def official():
    """Return diffusers' network of three levels, with random weights that are non-zero everywhere."""
    torch.manual_seed(0)
    net = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3, norm_num_groups=4,
        block_out_channels=(8, 12, 16), layers_per_block=2, latent_channels=4,
    )  # fmt: skip
    for parameter in net.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return net.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def net():
    return official()


@pytest.fixture(scope="module", params=[True, False], ids=["safetensors", "bin"])
def files(request, net, tmp_path_factory):
    """Return that network, read from the directory that diffusers writes."""
    directory = tmp_path_factory.mktemp("vae")
    net.save_pretrained(directory, safe_serialization=request.param)
    return autoencoder.read(str(directory))


def relative(got, want):
    want = np.asarray(want)
    return np.linalg.norm(np.asarray(got) - want) / np.linalg.norm(want)


def test_the_network_is_that_of_diffusers(net, files):
    ours = AutoencoderKL(**files.settings)
    ours.load_state_dict(weights.from_canonical(ours, files.weights))
    x, z = torch.randn(2, 3, 16, 24), torch.randn(2, 4, 4, 6)
    with torch.no_grad():
        want = net.encode(x).latent_dist
        mean, log_variance = ours.encode(x)
        assert relative(mean, want.mean) < 2e-6 and relative(log_variance, want.logvar) < 2e-6
        assert relative(ours.decode(z), net.decode(z).sample) < 2e-6


def test_log_variances_are_clipped(files):
    ours = AutoencoderKL(**files.settings)
    ours.load_state_dict(weights.from_canonical(ours, files.weights))
    ours.quant_conv.bias.data[4:] += torch.tensor([100.0, -100.0, 0.0, 0.0])
    with torch.no_grad():
        log_variance = ours.encode(torch.randn(1, 3, 8, 8))[1]
    assert (log_variance[:, 0] == 20).all() and (log_variance[:, 1] == -30).all()


@pytest.mark.parametrize("pixels", ["symmetric", "unit"])
def test_encoder(net, files, pixels):
    images = np.random.RandomState(0).randint(0, 256, size=(5, 16, 8, 3)).astype(np.uint8)
    moments = make_encoder(files, pixels, batch_size=2)(images)
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    want = net.encode(x if pixels == "unit" else 2 * x - 1).latent_dist
    want = torch.cat([want.mean, want.std], 1).permute(0, 2, 3, 1)
    assert moments.dtype == np.float32 and moments.shape == (5, 4, 2, 8)
    assert relative(moments, want) < 2e-6


@pytest.mark.parametrize("name", ["imf", "edm2"])
def test_decoder(net, files, name):
    z = np.random.RandomState(1).normal(size=(3, 2, 4, 4)).astype(np.float32)
    images = make_decoder(files, CONVENTIONS[name], batch_size=2)(z)
    raw = z / np.array(CONVENTIONS[name].scale) + np.array(CONVENTIONS[name].shift)
    want = net.decode(torch.from_numpy(raw).permute(0, 3, 1, 2).float()).sample.permute(0, 2, 3, 1)
    assert images.dtype == np.float32 and images.shape == (3, 8, 16, 3)
    assert relative(images, 2 * want - 1 if name == "edm2" else want) < 2e-6


def test_mistakes_are_named(files):
    with pytest.raises(UserError, match="choose symmetric"):
        make_encoder(files, "bytes")
    encode, decode = make_encoder(files, "unit"), make_decoder(files, CONVENTIONS["sd"])
    with pytest.raises(UserError, match=r"takes uint8 \[b H W 3\]"):
        encode(np.zeros((1, 8, 8, 3), np.float32))
    with pytest.raises(UserError, match="multiples of 4"):
        encode(np.zeros((1, 8, 10, 3), np.uint8))
    with pytest.raises(UserError, match=r"\[b h w 4\]"):
        decode(np.zeros((1, 2, 2, 3), np.float32))
    with pytest.raises(UserError, match="lack decoder.conv_in.bias"):
        lacking = {name: a for name, a in files.weights.items() if name != "decoder.conv_in.bias"}
        make_encoder(files._replace(weights=lacking), "unit")
    with pytest.raises(UserError, match="norm_num_groups"):
        group_norm(10, 4, dtype=torch.float32)


def test_bfloat16_keeps_the_residual_in_float32(files):
    ours = AutoencoderKL(**files.settings, dtype=torch.bfloat16)
    ours.load_state_dict(weights.from_canonical(ours, files.weights))
    exact = AutoencoderKL(**files.settings)
    exact.load_state_dict(weights.from_canonical(exact, files.weights))
    z = torch.randn(2, 4, 4, 4)
    with torch.no_grad():
        assert 1e-4 < relative(ours.decode(z).float(), exact.decode(z)) < 3e-2
        assert ours.decoder.mid_block(torch.randn(1, 16, 4, 4)).dtype == torch.float32
