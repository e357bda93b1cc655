"""The options of EDM2's network are found in the names and shapes of its weights."""

import numpy as np
import pytest
import tiny
import torch

from meanflow.errors import UserError
from meanflow.weights import canonical, infer
from parity import convert
from parity.cases import objectives
from torch_impl import step as torch_step

SIZES = {
    "input_size": 8, "channels": 3, "num_classes": 7, "width": 8, "channel_mult": (1, 2), "channel_mult_emb": 2,
    "channel_mult_noise": 1, "num_blocks": 1, "attn_resolutions": (4,),
}  # fmt: skip
OTHERS = {
    "flow": {"interval_embedder": False},
    "two times": {"interval_embedder": True},
    "log-variance": {"interval_embedder": False, "logvar_channels": 6},
    "three levels": {"input_size": 16, "channel_mult": (1, 2, 3), "num_blocks": 2, "attn_resolutions": (16, 4)},
    "no attention": {"attn_resolutions": (), "channel_mult_noise": 3},
    "no common factor": {"channel_mult": (2, 3), "channel_mult_emb": 5, "channel_mult_noise": 2},
    "wide": {"width": 32, "channel_mult": (1, 3), "head_width": 96},
    "whole heads": {"width": 64, "channel_mult": (1, 2), "attn_resolutions": (8, 4), "head_width": 64},
}


def weights_of(options):
    """Return a model's config, and zeros in the shapes of its canonical weights, sorted as in a safetensors file."""
    config = tiny.of_network(SIZES | {"name": "edm2"} | options)
    with torch.device("meta"):
        net = torch_step.build_net(config)
    shapes = {name: () if name.endswith(canonical.SCALARS) else t.shape for name, t in net.state_dict().items()}
    return config, {name: np.broadcast_to(np.float32(0), shape) for name, shape in sorted(shapes.items())}


@pytest.mark.parametrize("options", OTHERS.values(), ids=list(OTHERS))
def test_the_options_are_found(options):
    expected, weights = weights_of(options)
    found = infer.inferred_config(weights)
    assert found.method.name == expected.method.name
    for option in (*SIZES, *options, "head_width", "logvar_channels", "interval_embedder"):
        assert found.model[option] == expected.model[option], option
    convert.checked(weights, None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"unet.emb_label.weight": None}, "lack unet.emb_label.weight: no known EDM2 network is unconditional"),
        ({"unet.enc.8x8_conv.weight": None}, "lack unet.enc.NxN_conv.weight"),
        ({"unet.enc.16x16_conv.weight": np.zeros((8, 4, 3, 3))}, "lack unet.enc.NxN_conv.weight"),
        ({"unet.enc.4x4_block0.conv_res0.weight": None}, "lack unet.enc.4x4_block0.conv_res0.weight"),
        ({"unet.enc.8x8_conv.weight": np.zeros(3)}, "arrays of ranks that no EDM2 network has"),
        ({"unet.enc.8x8_conv.weight": np.zeros((0, 4, 3, 3))}, "arrays of ranks that no EDM2 network has"),
        ({"unet.emb_fourier.freqs": np.zeros(())}, "arrays of ranks that no EDM2 network has"),
        ({"unet.out_gain": np.zeros(1)}, "arrays of ranks that no EDM2 network has"),
        ({"unet.emb_label.weight": np.zeros((16, 7, 1, 1))}, "arrays of ranks that no EDM2 network has"),
        ({"unet.enc.5x5_down.conv_res0.weight": np.zeros((8, 8, 3, 3))}, "lack unet.enc.5x5_block0.conv_res0.weight"),
        ({"unet.out_conv.weight": None}, "lack unet.out_conv.weight"),
        ({"unet.new.weight": np.zeros((1, 1, 1, 1))}, "have unknown unet.new.weight"),
        ({"unet.emb_fourier.phases": np.zeros(9)}, r"phases has shape \(9,\)"),
    ],
)
def test_weights_of_no_edm2_network_are_named(change, message):
    _, weights = weights_of({"interval_embedder": False})
    changed = {name: a for name, a in (weights | change).items() if a is not None}
    with pytest.raises(UserError, match=message):
        convert.checked(changed, None)


DAMAGE = {
    "a number": lambda a: np.float32(0), "a vector": lambda a: a.reshape(-1)[:1], "empty": lambda a: a[:0],
    "more axes": lambda a: a[None, None, None], "gone": None,
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("network", ["dit", "imf", "dmf_sit", "dmf_qk", "unet"])
def test_damaged_arrays_are_refused_whatever_their_shape(network, damage):
    whole = {
        name: np.zeros(a.shape, np.float32) for name, a in objectives.random_weights(objectives.config(network)).items()
    }
    decisive = (
        "x_embedder.",
        "y_embedder.",
        "_tokens",
        "pos_embed",
        "mlp.fc1.w",
        "q_norm",
        "w1.",
        "projectors.",
        "8x8_conv.w",
    )
    for name in whole:
        if any(part in name for part in decisive):
            change = DAMAGE[damage]
            changed = {n: a for n, a in whole.items() if n != name} | (
                {} if change is None else {name: change(whole[name])}
            )
            with pytest.raises(UserError):
                convert.checked(changed, None)
