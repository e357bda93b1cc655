"""The autoencoder: that of diffusers, and what its functions promise."""

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from jax_impl import weights
from jax_impl.autoencoder import make_decoder, make_encoder
from jax_impl.models.vae import AutoencoderKL, Conv, MidBlock, group_norm
from meanflow.config.latents import CONVENTIONS
from meanflow.data.latents import autoencoder
from meanflow.errors import UserError


def official():
    """Return diffusers' network of three levels, with random weights that are non-zero everywhere."""
    torch.manual_seed(0)
    net = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3, norm_num_groups=4,
        block_out_channels=(8, 12, 16), layers_per_block=1, latent_channels=4,
    )  # fmt: skip
    for parameter in net.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return net.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def net():
    return official()


@pytest.fixture(scope="module")
def files(net, tmp_path_factory):
    """Return that network, read from the directory that diffusers writes."""
    directory = tmp_path_factory.mktemp("vae")
    net.save_pretrained(directory, safe_serialization=True)
    return autoencoder.read(str(directory))


def run(files, method, x, bias=0.0):
    """Return what a method of our network makes of x [b c h w]; bias: added to that of its quant_conv."""
    net = nnx.eval_shape(lambda: AutoencoderKL(**files.settings))
    params, graphdef = weights.from_canonical(net, files.weights), nnx.graphdef(net)
    params["quant_conv"]["bias"][...] += bias
    call = jax.jit(lambda params, x: getattr(nnx.merge(graphdef, params), method)(x))
    return call(params, jnp.asarray(np.moveaxis(np.asarray(x), 1, -1)))


def relative(got, want):
    want = np.asarray(want)
    return np.linalg.norm(np.asarray(got) - want) / np.linalg.norm(want)


def test_log_variances_are_clipped(files):
    bias = np.array([0, 0, 0, 0, 100, -100, 0, 0], np.float32)
    log_variance = run(files, "encode", torch.randn(1, 3, 8, 8), bias=bias)[1]
    assert (log_variance[..., 0] == 20).all() and (log_variance[..., 1] == -30).all()


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
        group_norm(10, 4, dtype=jnp.float32)


def test_bfloat16_keeps_the_residual_in_float32():
    out = jax.eval_shape(lambda x: MidBlock(8, 4, dtype=jnp.bfloat16)(x), jnp.ones((1, 4, 4, 8)))
    assert out.dtype == jnp.float32
    assert jax.eval_shape(lambda x: Conv(8, 4, 3, dtype=jnp.bfloat16)(x), out).dtype == jnp.bfloat16
