"""The U-Net: resampling, attention, dropout masks, conditions and errors.  What it computes is the parity suite's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
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
    config = base.get_config()
    config.model.update(SIZES | changes)
    graphdef, shapes = jax.eval_shape(lambda: step.build_net(config))
    rng = np.random.RandomState(0)
    return graphdef, jax.tree.map(lambda a: jnp.asarray(rng.normal(0, 0.15, a.shape), a.dtype), shapes)


@pytest.fixture(scope="module")
def net(optimize_less):
    """Return a tiny network, and a function (*inputs, params=its own, **given) -> u, compiled."""
    graphdef, params = build()
    apply = jax.jit(lambda params, *inputs, **given: nnx.merge(graphdef, params)(*inputs, **given))
    return nnx.merge(graphdef, params), lambda *inputs, params=params, **given: apply(params, *inputs, **given)


def inputs(dtype=jnp.float32):
    z = jnp.asarray(np.random.RandomState(1).normal(size=(2, 8, 8, 3)), dtype)
    return z, jnp.array([0.5, 1.0], dtype), jnp.zeros(2, dtype), jnp.array([0, 5])


def uniforms(num, seed=0):
    return jnp.asarray(np.random.RandomState(seed).randint(2**24, size=num) / 2**24, jnp.float32)


def outer(taps, channels):
    """Return EDM's filter [channels 1 k k] of one group a channel, for PyTorch."""
    taps = torch.tensor(taps, dtype=torch.float64)
    return (torch.outer(taps, taps) / taps.sum() ** 2).expand(channels, 1, -1, -1)


def conv(taps, resample, kernel_size=0, **options):
    options = {"dtype": jnp.float64, "resample": resample, "taps": taps, "size": 6, "rngs": nnx.Rngs(0)} | options
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


@pytest.mark.parametrize("taps", TAPS)
def test_filtering_after_a_convolution_that_runs_beyond_the_border(taps):
    with jax.enable_x64(True):
        (x, y), layer = images(), conv(taps, "down", 3, filter_last=True)
        found, weight = layer(x), torch.from_numpy(np.array(layer.kernel[...], np.float64)).permute(3, 2, 0, 1)
    wide = F.conv2d(y, weight, padding=1 + (len(taps) - 1) // 2)
    assert_close(found, F.conv2d(wide, outer(taps, 4), groups=4, stride=2))


@pytest.mark.parametrize("features", [4, 24, 128, 256])
def test_group_norm(features):
    norm, rng = unet.GroupNorm(features), np.random.RandomState(0)
    x, weight, bias = (rng.normal(size=s).astype(np.float32) for s in ((2, 3, 3, features), features, features))
    norm.weight.set_value(jnp.asarray(weight)), norm.bias.set_value(jnp.asarray(bias))
    y, *affine = (torch.from_numpy(a) for a in (x.transpose(0, 3, 1, 2) * 3 + 5, weight, bias))
    want = F.group_norm(y, min(32, features // 4), *affine, eps=1e-6).permute(0, 2, 3, 1)
    np.testing.assert_allclose(norm(jnp.asarray(x) * 3 + 5), want, rtol=1e-4, atol=1e-5)


def attention(q, k, v):
    """Return softmax(q k / sqrt(c)) v of arrays [b n c]."""
    scores = np.exp(np.einsum("bqc,bkc->bqk", q, k) / np.sqrt(q.shape[2]))
    return np.einsum("bkc,bqk->bqc", v, scores / scores.sum(-1, keepdims=True))


def test_layouts_of_attention_are_a_permutation_of_channels():
    qkv = np.random.RandomState(0).normal(size=(2, 3, 3, 15))
    want = attention(*np.split(qkv.reshape(2, 9, 15), 3, axis=2)).reshape(2, 3, 3, 5)
    one_channel_after_another = np.arange(15).reshape(3, 5).T.ravel()
    with jax.enable_x64(True):
        split = unet.attend(jnp.asarray(qkv), "split")
        interleaved = unet.attend(jnp.asarray(qkv[..., one_channel_after_another]), "interleaved")
    np.testing.assert_allclose(split, want)
    np.testing.assert_allclose(interleaved, want)


def lowbias32(x):
    """Mix an integer: https://github.com/skeeto/hash-prospector, after an offset, modulo 2^32."""
    x = (x + 0x9E3779B9) % 2**32
    x = (x ^ (x >> 16)) * 0x7FEB352D % 2**32
    x = (x ^ (x >> 15)) * 0x846CA68B % 2**32
    return x ^ (x >> 16)


def test_masks_are_the_hash_of_row_and_entry():
    draws = [0.0, 0.25, 1 - 2**-24]
    found = unet.keep_masks(jnp.array(draws), 40, 0.3)
    seeds = [lowbias32(int(draw * 2**24)) for draw in draws]
    want = [[lowbias32(lowbias32(i) ^ seed) >= round(0.3 * 2**32) for i in range(40)] for seed in seeds]
    assert found.tolist() == want


def test_masks_keep_their_share_independently():
    """Bounds of five standard deviations of independent entries."""
    rows, entries = 64, 4096
    centred = (np.asarray(unet.keep_masks(uniforms(rows), entries, 0.3)) - 0.7) / 0.21**0.5
    assert abs(centred.mean()) < 5 * (rows * entries) ** -0.5
    assert (centred.mean(1) * entries**0.5).std() == pytest.approx(1, abs=5 * (2 * rows) ** -0.5)
    between_rows = centred @ centred.T / entries
    assert abs(between_rows[~np.eye(rows, dtype=bool)]).max() < 5 * entries**-0.5
    for lag in (1, 2, 3, 8, 64, 512):
        assert abs((centred[:, lag:] * centred[:, :-lag]).mean()) < 5 * (rows * entries) ** -0.5


def test_the_mask_of_a_row_does_not_depend_on_its_batch(net):
    module, draws = net[0], uniforms(6)
    masks = module.dropout_masks(draws)
    assert masks.shape == (6, module.num_entries)
    for i in range(6):
        assert np.array_equal(module.dropout_masks(draws[i : i + 1])[0], masks[i])
    assert len(np.unique(masks, axis=0)) == 6


def test_dropout_scales_what_it_keeps():
    rng = np.random.RandomState(0)
    x, keep = rng.normal(size=(2, 4, 3, 5)), rng.uniform(size=(2, 60)) < 0.7
    want = np.where(keep.reshape(2, 4, 3, 5), x / 0.7, 0)
    np.testing.assert_allclose(unet.dropout(jnp.asarray(x), 0.3, jnp.asarray(keep)), want, rtol=1e-6)


def test_every_block_has_masks_of_its_own(monkeypatch):
    module, sizes = nnx.merge(*build(**LEVELS)), []
    monkeypatch.setattr(unet, "dropout", lambda x, prob, keep: sizes.append(keep.shape[1]) or x)
    jax.eval_shape(lambda *args: module(*args, dropout=module.dropout_masks(jnp.zeros(2))), *inputs())
    firsts = [m.first for part in (module.enc, module.dec) for m in part.values() if isinstance(m, unet.Block)]
    assert len(firsts) == 10
    assert sorted(firsts) == [0, *np.cumsum(sizes)[:-1]]
    assert sum(sizes) == module.num_entries


def test_a_masked_network_is_one_with_scaled_convolutions(net):
    module, apply = net
    params = nnx.state(module)
    for keep, scale in ((True, 1 / 0.7), (False, 0.0)):
        masked = apply(*inputs(), dropout=jnp.full((2, module.num_entries), keep))
        scaled = jax.tree_util.tree_map_with_path(
            lambda path, a, scale=scale: a * scale if "conv1'" in str(path) and a.ndim == 4 else a, params
        )
        np.testing.assert_allclose(masked, apply(*inputs(), params=scaled), rtol=1e-4, atol=1e-5)


def test_no_masks_no_dropout(net, monkeypatch):
    module, apply = net
    assert not np.array_equal(apply(*inputs()), apply(*inputs(), dropout=module.dropout_masks(uniforms(2))))
    monkeypatch.setattr(unet, "dropout", lambda *args: pytest.fail("dropout"))
    jax.eval_shape(module, *inputs())


def test_augmentation_labels(net):
    _, apply = net
    plain, labels = apply(*inputs()), uniforms((2, 6))
    np.testing.assert_allclose(apply(*inputs(), augment=jnp.zeros((2, 6))), plain, rtol=1e-4, atol=1e-5)
    assert abs(apply(*inputs(), augment=labels) - plain).max() > 1e-3
    untold = nnx.merge(*build(augment_dim=0))
    assert "augment" not in str(nnx.to_flat_state(nnx.state(untold)))
    jax.eval_shape(lambda *args: untold(*args, augment=labels), *inputs())


def test_classes_are_ignored_and_times_are_not(net):
    _, apply = net
    z, t, r, y = inputs()
    assert np.array_equal(apply(z, t, r, y), apply(z, t, r, y + 1))
    assert abs(apply(z, t, r, y) - apply(z, t, r + 0.3, y)).max() > 1e-4
    assert abs(apply(z, t, r, y) - apply(z, t - 0.3, r, y)).max() > 1e-4


def test_time_features_are_sines_then_cosines_down_to_the_slowest(net):
    features, half = net[0].embed_time(jnp.array([0.5]))[0], net[0].features // 2
    expected = {0: np.sin(0.5), half - 1: np.sin(0.5 / 10_000), half: np.cos(0.5), -1: np.cos(0.5 / 10_000)}
    for i, value in expected.items():
        assert float(features[i]) == pytest.approx(value, rel=1e-6)


def test_random_frequencies_are_never_trained():
    graphdef, params = nnx.split(unet.FourierFeatures(8, rngs=nnx.Rngs(0)))
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
