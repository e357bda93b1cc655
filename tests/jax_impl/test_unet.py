"""The U-Net: resampling, normalisation, dtypes, errors and weights.  What it computes is the parity suite's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from flax import nnx

from jax_impl import step, weights
from jax_impl.models import unet
from meanflow.config import options as base
from meanflow.errors import UserError

SIZES = {
    "name": "unet", "input_size": 8, "channels": 3, "num_classes": 5, "width": 8, "channel_mult": (1,), "num_blocks": 1,
    "attn_resolutions": (), "dropout": 0.3, "augment_dim": 6,
}  # fmt: skip
TAPS = [(1, 1), (1, 3, 3, 1), (1, 2, 3, 4), (1, 2, 0, 3, 5, 8)]
LEVELS = {"channel_mult": (1, 2), "attn_resolutions": (8,)}


def build(**changes):
    """Return the graph definition of a tiny network and weights (nnx.State) that are non-zero everywhere."""
    config = tiny.of_network(SIZES | changes)
    graphdef, shapes = step.abstract_net(config)
    rng = np.random.RandomState(0)
    return graphdef, jax.tree.map(lambda a: jnp.asarray(rng.normal(0, 0.15, a.shape), a.dtype), shapes)


def inputs(dtype=jnp.float32):
    z = jnp.asarray(np.random.RandomState(1).normal(size=(2, 8, 8, 3)), dtype)
    return z, jnp.array([0.5, 1.0], dtype), jnp.zeros(2, dtype), jnp.array([0, 5])


def outer(taps, channels):
    """Return EDM's filter [channels 1 k k] of one group a channel, for PyTorch."""
    taps = torch.tensor(taps, dtype=torch.float64)
    return (torch.outer(taps, taps) / taps.sum() ** 2).expand(channels, 1, -1, -1)


def conv(taps, resample, kernel_size=0, **options):
    options = {"dtype": jnp.float64, "resample": resample, "taps": taps, "size": 6} | options
    return unet.Conv(4, 4, kernel_size, **options)


def images():
    """Return the same images as jax [b h w c] and as torch [b c h w]."""
    x = np.random.RandomState(0).normal(size=(2, 6, 6, 4))
    return jnp.asarray(x), torch.from_numpy(x).permute(0, 3, 1, 2)


def assert_close(x, y):
    np.testing.assert_allclose(x, y.permute(0, 2, 3, 1).numpy(), atol=1e-12)


@pytest.mark.parametrize("taps", TAPS)
def test_resampling_is_a_convolution_with_the_outer_product_of_the_taps(taps):
    with jax.enable_x64(True):
        (x, y), pad = images(), (len(taps) - 1) // 2
        down, up = conv(taps, "down")(x), conv(taps, "up")(x)
    assert_close(down, F.conv2d(y, outer(taps, 4), groups=4, stride=2, padding=pad))
    assert_close(up, F.conv_transpose2d(y, 4 * outer(taps, 4), groups=4, stride=2, padding=pad))
    assert down.shape[1:3] == (3, 3) and up.shape[1:3] == (12, 12)


@pytest.mark.parametrize("features", [4, 24, 128, 256])
def test_group_norm(features):
    norm, rng = unet.group_norm(features), np.random.RandomState(0)
    x, weight, bias = (rng.normal(size=s).astype(np.float32) for s in ((2, 3, 3, features), features, features))
    norm.weight.set_value(jnp.asarray(weight)), norm.bias.set_value(jnp.asarray(bias))
    y, *affine = (torch.from_numpy(a) for a in (x.transpose(0, 3, 1, 2) * 3 + 5, weight, bias))
    want = F.group_norm(y, min(32, features // 4), *affine, eps=1e-6).permute(0, 2, 3, 1)
    np.testing.assert_allclose(norm(jnp.asarray(x) * 3 + 5), want, rtol=1e-4, atol=1e-5)


def test_random_frequencies_are_never_trained():
    net = unet.FourierFeatures(8)
    net.freqs.set_value(jnp.arange(1.0, 5.0))
    graphdef, params = nnx.split(net)
    grads = jax.grad(lambda params: nnx.merge(graphdef, params)(jnp.array([0.5])).sum())(params)
    assert not np.asarray(grads["freqs"].get_value()).any()
    config = base.get_config().train
    config.update(optimizer="adamw", weight_decay=0.1, ema_decays=(0.5,))
    params = {"map_noise": params, "other": jnp.ones(2)}
    grads = {"map_noise": grads, "other": jnp.zeros(2)}
    state = step.TrainState(jnp.zeros((), jnp.int32), params, step.make_optimizer(config).init(params), (params,))
    for _ in range(2):
        state, _ = step.apply_gradients(state, grads, config)
    for tree in (state.params, state.emas[0]):
        assert np.array_equal(tree["map_noise"]["freqs"].get_value(), params["map_noise"]["freqs"].get_value())
    assert (state.params["other"] < 1).all()


@pytest.mark.parametrize(
    ("dtype", "expected"), [("float32", "float32"), ("bfloat16", "float32"), ("float64", "float64")]
)
def test_dtypes(dtype, expected):
    with jax.enable_x64(expected == "float64"):
        graphdef, params = build(**LEVELS, compute_dtype=dtype)
        assert {str(a.dtype) for a in jax.tree.leaves(params)} == {expected}
        assert jax.eval_shape(nnx.merge(graphdef, params), *inputs(expected)).dtype == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_size": 10, "channel_mult": (1, 1, 1)}, "model.input_size 10 cannot be halved 2 times"),
        ({"channel_mult": ()}, "cannot be halved 0 times"),
        ({"resample_filter": (1, 2, 1)}, r"resample_filter \(1, 2, 1\) must have an even number of taps"),
        ({"resample_filter": (1, -1)}, "a sum that is not 0"),
        ({"resample_filter": ()}, "an even number of taps"),
        ({"width": 2}, "2 channels cannot be normalised in groups: model.width must be a multiple of 4"),
        ({"width": 9}, "9 channels cannot be normalised"),
        ({"width": 36, "channel_mult": (1, 4)}, "channels cannot be normalised .* of 32 where"),
        ({"time_embedding": "separate"}, "model.augment_dim must be 0"),
    ],
)
def test_networks_that_cannot_be_built(changes, message):
    with pytest.raises(UserError, match=message):
        build(**changes)


def test_weights_are_canonical():
    net = nnx.merge(*build(**LEVELS, encoder_type="residual", decoder_type="skip", embedding_type="fourier"))
    given = weights.to_canonical(net, nnx.state(net, nnx.Param))
    assert {"map_noise.freqs", "map_layer0.weight", "map_augment.weight", "enc.8x8_conv.bias",
            "enc.4x4_down.conv0.resample_filter", "enc.4x4_down.skip.weight", "enc.4x4_aux_residual.weight",
            "enc.8x8_block0.qkv.weight", "enc.4x4_block0.affine.weight", "dec.4x4_in0.proj.weight",
            "dec.8x8_up.norm0.weight", "dec.8x8_aux_up.resample_filter",
            "dec.8x8_aux_conv.weight"} <= given.keys()  # fmt: skip
    back = weights.to_canonical(net, weights.from_canonical(net, given))
    assert back.keys() == given.keys()
    assert all(np.array_equal(back[name], given[name]) for name in given)
    other = given | {"dec.8x8_aux_up.resample_filter": given["dec.8x8_aux_up.resample_filter"] * 2}
    with pytest.raises(UserError, match=r"table dec\.8x8_aux_up\.resample_filter is not the one"):
        weights.from_canonical(net, other)
