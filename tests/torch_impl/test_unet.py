"""The U-Net: resampling, attention, dropout masks, conditions and errors.  What it computes is the parity suite's."""

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F

from meanflow.config import options as base
from meanflow.errors import UserError
from torch_impl import step, weights
from torch_impl.models import unet

SIZES = {
    "name": "unet", "input_size": 8, "channels": 3, "num_classes": 5, "width": 8, "channel_mult": (1,), "num_blocks": 1,
    "attn_resolutions": (), "dropout": 0.3, "augment_dim": 6,
}  # fmt: skip
TAPS = [(1, 1), (1, 3, 3, 1), (1, 2, 3, 4), (1, 2, 0, 3, 5, 8)]
LEVELS = {"channel_mult": (1, 2), "attn_resolutions": (8,)}


def build(**changes):
    """Return a tiny network whose weights are non-zero everywhere."""
    config = tiny.of_network(SIZES | changes)
    net, generator = step.build_net(config), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.15)
    return net


@pytest.fixture
def net():
    """Return a tiny network."""
    return build()


def inputs(dtype=torch.float32):
    z = torch.from_numpy(np.random.RandomState(1).normal(size=(2, 3, 8, 8))).to(dtype)
    return z, torch.tensor([0.5, 1.0], dtype=dtype), torch.zeros(2, dtype=dtype), torch.tensor([0, 5])


def outer(taps, channels):
    """Return EDM's filter [channels 1 k k] of one group a channel."""
    taps = torch.tensor(taps, dtype=torch.float64)
    return (torch.outer(taps, taps) / taps.sum() ** 2).expand(channels, 1, -1, -1)


def conv(taps, resample, kernel_size=0, **options):
    layer = unet.Conv(4, 4, kernel_size, dtype=torch.float64, resample=resample, taps=taps, size=6, **options)
    for p in layer.parameters():
        p.data.normal_()
    return layer.double()


@pytest.mark.parametrize("taps", TAPS)
def test_resampling_is_a_convolution_with_the_outer_product_of_the_taps(taps):
    x, pad = torch.randn(2, 4, 6, 6, dtype=torch.float64), (len(taps) - 1) // 2
    down, up = conv(taps, "down")(x), conv(taps, "up")(x)
    torch.testing.assert_close(down, F.conv2d(x, outer(taps, 4), groups=4, stride=2, padding=pad))
    torch.testing.assert_close(up, F.conv_transpose2d(x, 4 * outer(taps, 4), groups=4, stride=2, padding=pad))
    assert down.shape[2:] == (3, 3) and up.shape[2:] == (12, 12)


@pytest.mark.parametrize("taps", TAPS)
def test_filtering_after_a_convolution_that_runs_beyond_the_border(taps):
    x, layer = torch.randn(2, 4, 6, 6, dtype=torch.float64), conv(taps, "down", 3, filter_last=True)
    wide = F.conv2d(x, layer.weight, layer.bias, padding=1 + (len(taps) - 1) // 2)
    torch.testing.assert_close(layer(x), F.conv2d(wide, outer(taps, 4), groups=4, stride=2))


@pytest.mark.parametrize("features", [4, 24, 128, 256])
def test_group_norm(features):
    norm, x = unet.group_norm(features), torch.randn(2, features, 3, 3) * 3 + 5
    norm.weight.data.normal_(), norm.bias.data.normal_()
    want = F.group_norm(x, min(32, features // 4), norm.weight, norm.bias, eps=1e-6)
    torch.testing.assert_close(norm(x), want, rtol=1e-4, atol=1e-5)


def attention(q, k, v):
    """Return softmax(q k / sqrt(c)) v of arrays [b c n]."""
    scores = np.exp(np.einsum("bcq,bck->bqk", q, k) / np.sqrt(q.shape[1]))
    return np.einsum("bck,bqk->bcq", v, scores / scores.sum(-1, keepdims=True))


def test_layouts_of_attention_are_a_permutation_of_channels():
    qkv = np.random.RandomState(0).normal(size=(2, 15, 3, 3))
    want = attention(*np.split(qkv.reshape(2, 15, 9), 3, axis=1)).reshape(2, 5, 3, 3)
    one_channel_after_another = np.arange(15).reshape(3, 5).T.ravel()
    split = unet.attend(torch.from_numpy(qkv), "split").numpy()
    interleaved = unet.attend(torch.from_numpy(qkv[:, one_channel_after_another]), "interleaved").numpy()
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
    found = unet.keep_masks(torch.tensor(draws), 40, 0.3)
    seeds = [lowbias32(int(draw * 2**24)) for draw in draws]
    want = [[lowbias32(lowbias32(i) ^ seed) >= round(0.3 * 2**32) for i in range(40)] for seed in seeds]
    assert found.tolist() == want


def test_masks_keep_their_share_independently():
    """Bounds of five standard deviations of independent entries."""
    rows, entries = 64, 4096
    draws = torch.rand(rows, generator=torch.Generator().manual_seed(0))
    centred = (unet.keep_masks(draws, entries, 0.3).double() - 0.7) / 0.21**0.5
    assert abs(float(centred.mean())) < 5 * (rows * entries) ** -0.5
    assert float((centred.mean(1) * entries**0.5).std()) == pytest.approx(1, abs=5 * (2 * rows) ** -0.5)
    between_rows = centred @ centred.T / entries - torch.eye(rows)
    assert float(between_rows.fill_diagonal_(0).abs().max()) < 5 * entries**-0.5
    for lag in (1, 2, 3, 8, 64, 512):
        assert abs(float((centred[:, lag:] * centred[:, :-lag]).mean())) < 5 * (rows * entries) ** -0.5


def test_the_mask_of_a_row_does_not_depend_on_its_batch(net):
    draws = torch.rand(6)
    masks = net.dropout_masks(draws)
    assert masks.shape == (6, net.num_entries)
    for i in range(6):
        assert torch.equal(net.dropout_masks(draws[i : i + 1])[0], masks[i])
    assert len(torch.unique(masks, dim=0)) == 6


def test_dropout_scales_what_it_keeps():
    rng = np.random.RandomState(0)
    x, keep = rng.normal(size=(2, 4, 3, 5)), rng.uniform(size=(2, 60)) < 0.7
    want = np.where(keep.reshape(2, 4, 3, 5), x / 0.7, 0)
    found = unet.dropout(torch.from_numpy(x).permute(0, 3, 1, 2), 0.3, torch.from_numpy(keep)).permute(0, 2, 3, 1)
    np.testing.assert_allclose(found.numpy(), want)


def test_every_block_has_masks_of_its_own(monkeypatch):
    net, sizes = build(**LEVELS), []
    monkeypatch.setattr(unet, "dropout", lambda x, prob, keep: sizes.append(keep.shape[1]) or x)
    net(*inputs(), dropout=net.dropout_masks(torch.rand(2)))
    firsts = [block.first for block in net.modules() if isinstance(block, unet.Block)]
    assert len(firsts) == 10
    assert sorted(firsts) == [0, *np.cumsum(sizes)[:-1]]
    assert sum(sizes) == net.num_entries


def test_a_masked_network_is_one_with_scaled_convolutions(net):
    for keep, scale in ((True, 1 / 0.7), (False, 0.0)):
        masked = net(*inputs(), dropout=torch.full((2, net.num_entries), keep))
        scaled = build()
        for name, p in scaled.named_parameters():
            p.data.mul_(scale if name.endswith("conv1.weight") else 1)
        torch.testing.assert_close(masked, scaled(*inputs()))


def test_no_masks_no_dropout(net, monkeypatch):
    assert not torch.equal(net(*inputs()), net(*inputs(), dropout=net.dropout_masks(torch.rand(2))))
    monkeypatch.setattr(unet, "dropout", lambda *args: pytest.fail("dropout"))
    assert net.train()(*inputs()).isfinite().all()


def test_augmentation_labels(net):
    plain, labels = net(*inputs()), torch.randn(2, 6)
    torch.testing.assert_close(net(*inputs(), augment=torch.zeros(2, 6)), plain)
    assert (net(*inputs(), augment=labels) - plain).abs().max() > 1e-3
    untold = build(augment_dim=0)
    assert torch.equal(untold(*inputs(), augment=labels), untold(*inputs()))


def test_classes_are_ignored_and_times_are_not(net):
    z, t, r, y = inputs()
    assert torch.equal(net(z, t, r, y), net(z, t, r, y + 1))
    assert (net(z, t, r, y) - net(z, t, r + 0.3, y)).abs().max() > 1e-4
    assert (net(z, t, r, y) - net(z, t - 0.3, r, y)).abs().max() > 1e-4


def test_time_features_are_sines_then_cosines_down_to_the_slowest(net):
    features, half = net.embed_time(torch.tensor([0.5]))[0].detach(), net.features // 2
    expected = {0: np.sin(0.5), half - 1: np.sin(0.5 / 10_000), half: np.cos(0.5), -1: np.cos(0.5 / 10_000)}
    for i, value in expected.items():
        assert float(features[i]) == pytest.approx(value, rel=1e-6)


def test_random_frequencies_are_never_trained():
    net, config = unet.FourierFeatures(8), base.get_config().train
    net.other = torch.nn.Parameter(torch.ones(2))
    before = net.freqs.normal_().clone()
    config.update(optimizer="adamw", weight_decay=0.1, ema_decays=(0.5,))
    emas = ({name: p.detach().clone() for name, p in net.named_parameters()},)
    (net(torch.tensor([0.5])).sum() + net.other.sum()).backward()
    assert net.freqs.grad is None
    state = step.TrainState(0, net, step.make_optimizer(net, config), emas, net)
    for _ in range(2):
        net.other.grad = torch.zeros(2)
        state, _ = step.apply_gradients(state, config)
    assert torch.equal(net.freqs, before) and torch.equal(state.emas[0]["freqs"], before)
    assert (net.other < 1).all()


@pytest.mark.parametrize(
    ("dtype", "expected"), [("float32", "float32"), ("bfloat16", "float32"), ("float64", "float64")]
)
def test_dtypes(dtype, expected):
    net, output = build(**LEVELS, compute_dtype=dtype), getattr(torch, expected)
    assert {p.dtype for p in net.parameters()} == {output}
    assert net(*inputs(output)).dtype == output


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
    net = build(**LEVELS, encoder_type="residual", decoder_type="skip", embedding_type="fourier")
    given = weights.to_canonical(net, dict(net.named_parameters()))
    assert {"map_noise.freqs", "map_layer0.weight", "map_augment.weight", "enc.8x8_conv.bias",
            "enc.4x4_down.conv0.resample_filter", "enc.4x4_down.skip.weight", "enc.4x4_aux_residual.weight",
            "enc.8x8_block0.qkv.weight", "enc.4x4_block0.affine.weight", "dec.4x4_in0.proj.weight",
            "dec.8x8_up.norm0.weight", "dec.8x8_aux_up.resample_filter",
            "dec.8x8_aux_conv.weight"} <= given.keys()  # fmt: skip
    state = weights.from_canonical(net, given)
    back = weights.to_canonical(net, {name: a for name, a in state.items() if name not in net.tables()})
    assert back.keys() == given.keys() == state.keys()
    assert all(np.array_equal(back[name], given[name]) for name in given)
    other = given | {"dec.8x8_aux_up.resample_filter": given["dec.8x8_aux_up.resample_filter"] * 2}
    with pytest.raises(UserError, match=r"table dec\.8x8_aux_up\.resample_filter is not the one"):
        weights.from_canonical(net, other)
