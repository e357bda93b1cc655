"""Infers the options of a network from the names and shapes of its canonical weights."""

import math
import re

import ml_collections
import numpy as np

from meanflow.config import options
from meanflow.errors import UserError
from meanflow.weights import canonical, unknown


def inferred_config(weights: dict[str, np.ndarray], input_size: int | None = None) -> ml_collections.ConfigDict:
    """Return a config whose network has parameters of these shapes.

    input_size: of a transformer whose weights do not contain it.

    Options that do not affect names or shapes keep their defaults: the number of heads without qk_norm, dmf_depth and
    repa_depth; for a U-Net the layout of q, k and v, dropout and the number of classes; for EDM2's U-Net head width and
    sigma_data; for improved MeanFlow's transformer the image size, that of ImageNet latents.
    Raises UserError if no known network has these weights, or if they do not contain the image size.
    """
    if "unet.emb_fourier.freqs" in weights:
        return inferred_edm2(weights)
    if "encoder.conv_in.weight" in weights:
        raise UserError("these are the weights of an autoencoder: --config.latents.vae reads its directory directly")
    empty = [name for name, a in weights.items() if not a.size]
    if empty:
        raise UserError(f"the weights are damaged: {empty[0]} is empty ({len(empty)} such arrays)")
    if any(name.startswith("enc.") for name in weights):
        return inferred_unet(weights)
    return inferred_imf_dit(weights, input_size) if "omega_tokens" in weights else inferred_dit(weights, input_size)


def check_ranks(weights: dict[str, np.ndarray], ranks: dict[str, int]) -> None:
    """Raise UserError unless the weights have arrays of these names and ranks."""
    for name, rank in ranks.items():
        if name not in weights:
            there = canonical.some(weights) if weights else "no arrays at all"
            problem = f"the weights lack {name}: no network of this project has such weights ({there})"
            raise UserError("; ".join(filter(None, (problem, unknown.describe(weights)))))
        if weights[name].ndim != rank:
            raise UserError(f"{name} has shape {weights[name].shape}, where {rank} axes are needed")


def inferred_dit(weights: dict[str, np.ndarray], input_size: int | None = None) -> ml_collections.ConfigDict:
    """Return the config of a transformer of MeanFlow, of a flow model or of decoupled MeanFlow."""
    needed = ("x_embedder.proj.weight", "y_embedder.embedding_table.weight", "blocks.0.mlp.fc1.weight")
    check_ranks(weights, dict(zip(needed, (4, 2, 2), strict=True)))
    if "pos_embed" not in weights and input_size is None:
        raise UserError("these weights do not contain the image size: give --config")
    if "pos_embed" in weights and weights["pos_embed"].ndim not in (2, 3):
        raise UserError(f"pos_embed has shape {weights['pos_embed'].shape}, where (1, patches, width) is needed")
    width, channels, patch_size, _ = weights[needed[0]].shape
    if "pos_embed" in weights:
        input_size = round(weights["pos_embed"].shape[-2] ** 0.5) * patch_size
    config = options.get_config(*kind_of_dit(weights))
    config.model.update(
        width=width, channels=channels, patch_size=patch_size, num_heads=1, input_size=input_size,
        num_classes=len(weights[needed[1]]) - 1, mlp_ratio=len(weights[needed[2]]) / width,
        depth=1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks.")),
    )  # fmt: skip
    scale = weights.get("blocks.0.attn.q_norm.scale")
    if scale is not None:
        check_ranks(weights, {"blocks.0.attn.q_norm.scale": 1})
        config.model.update(qk_norm=True, num_heads=width // len(scale))
    projectors = sorted({int(m[1]) for n in weights if (m := re.match(r"projectors\.(\d+)\.", n))})
    if projectors and "repa_dims" in config.model:
        last = [f"projectors.{i}.4.weight" for i in projectors]
        check_ranks(weights, dict.fromkeys(last, 2))
        config.model.repa_depth = min(config.model.repa_depth, config.model.depth)
        config.model.projector_dim = weights[last[0]].shape[1]
        config.model.repa_dims = tuple(len(weights[name]) for name in last)
    if config.model.name == "dmf_dit":
        config.model.dmf_depth = min(config.model.dmf_depth, config.model.depth)
    return config


def kind_of_dit(weights: dict[str, np.ndarray]) -> tuple[str, str]:
    """Return the network and the method that the weights of a transformer belong to."""
    if "logvar_linear.weight" in weights:
        return "dmf_dit", "decoupled"
    return "dit", "meanflow" if "r_embedder.mlp.0.weight" in weights else "flow"


def inferred_imf_dit(weights: dict[str, np.ndarray], input_size: int | None = None) -> ml_collections.ConfigDict:
    """Return the config of improved MeanFlow's transformer."""
    block = "shared_blocks.0" if "shared_blocks.0.norm1.weight" in weights else "u_heads.0"  # there may be no trunk
    table, norm, hidden = (
        "y_embedder.embedding_table._flax_embedding.weight", f"{block}.attn.q_norm.weight",
        f"{block}.mlp.w1._flax_linear.weight",
    )  # fmt: skip
    check_ranks(
        weights,
        {"x_embedder.proj.weight": 4, table: 2, norm: 1, hidden: 2}
        | {f"{name}_tokens": 2 for name in ("class", "omega", "t_min", "time")},
    )
    depths = {
        kind: len({name.split(".")[1] for name in weights if name.startswith(f"{kind}.")})
        for kind in ("shared_blocks", "u_heads", "v_heads")
    }
    width, channels, patch_size, _ = weights["x_embedder.proj.weight"].shape
    if width % len(weights[norm]) or len(weights[norm]) % 2:
        raise UserError(f"{norm} has shape {weights[norm].shape}: heads must be even and divide the width {width}")
    config = options.get_config("imf_dit", "improved")
    config.model.update(
        width=width, channels=channels, patch_size=patch_size, num_heads=width // len(weights[norm]),
        input_size=input_size or 16 * patch_size, num_classes=len(weights[table]) - 1,
        mlp_ratio=(len(weights[hidden]) + 0.5) / width,  # its product with the width is rounded down
        depth=depths["shared_blocks"] + depths["u_heads"], head_depth=depths["u_heads"],
        v_heads=depths["v_heads"] == depths["u_heads"],
        num_class_tokens=len(weights["class_tokens"]), num_omega_tokens=len(weights["omega_tokens"]),
        num_interval_tokens=len(weights["t_min_tokens"]), num_time_tokens=len(weights["time_tokens"]),
    )  # fmt: skip
    return config


def inferred_unet(weights: dict[str, np.ndarray]) -> ml_collections.ConfigDict:
    """Return the config of a U-Net."""
    found = {m[1]: name for name in weights if (m := re.fullmatch(r"enc\.(\d+)x\1_conv\.weight", name))}
    if len(found) != 1 or "map_layer0.weight" not in weights:
        raise UserError("the weights lack enc.NxN_conv.weight or map_layer0.weight: no known U-Net has these weights")
    if any(a.ndim != (2 if name.startswith("map_") else 4) for name, a in weights.items() if is_matrix(name)):
        raise UserError("the weights have matrices of ranks that no known U-Net has")
    [(size, first)] = found.items()
    width, channels = weights[first].shape[:2]
    names = "\n".join(weights)
    lower = re.findall(r"^enc\.(\d+)x\1_down\.conv0\.weight$", names, re.MULTILINE)
    sizes = [size, *sorted(lower, key=int, reverse=True)]  # names may be sorted: 16x16, 4x4, 8x8
    for s in sizes:
        if f"enc.{s}x{s}_block0.conv0.weight" not in weights:
            raise UserError(f"the weights lack enc.{s}x{s}_block0.conv0.weight: no known U-Net has these weights")
    separate = "map_layer0_s.weight" in weights
    emb, features = weights["map_layer0.weight"].shape
    filters = [a for name, a in weights.items() if name.endswith("resample_filter")]
    config = options.get_config("unet", "meanflow")
    config.model.update(
        input_size=int(size), channels=channels, width=width,
        channel_mult=tuple(len(weights[f"enc.{s}x{s}_block0.conv0.weight"]) // width for s in sizes),
        channel_mult_emb=emb // width, channel_mult_noise=features // width // (1 if separate else 2),
        num_blocks=len(re.findall(rf"^enc\.{size}x{size}_block\d+\.conv0\.weight$", names, re.MULTILINE)),
        attn_resolutions=tuple(int(s) for s in sizes if f"enc.{s}x{s}_block0.qkv.weight" in weights),
        augment_dim=weights["map_augment.weight"].shape[1] if "map_augment.weight" in weights else 0,
        embedding_type="fourier" if "map_noise.freqs" in weights else "positional",
        encoder_type=next((kind for kind in ("skip", "residual") if f"_aux_{kind}." in names), "standard"),
        decoder_type="skip" if "_aux_up." in names else "standard",
        time_embedding="separate" if separate else "joint",
    )  # fmt: skip
    if filters:
        config.model.resample_filter = tuple(map(float, filters[0].sum((0, 1, 2))))
    return config


def is_matrix(name: str) -> bool:
    """Return whether a canonical name of a U-Net names the weight of a linear layer or convolution, or a filter."""
    return bool(re.search(r"(map_\w+|conv\d?|skip|qkv|proj|_aux_\w+(?<!norm))\.weight$|resample_filter$", name))


def inferred_edm2(weights: dict[str, np.ndarray]) -> ml_collections.ConfigDict:
    """Return the config of EDM2's U-Net, with one time or, in Re-MeanFlow, two.

    The width is the greatest common divisor of all channels; only products with it matter.
    Raises UserError, also for an unconditional network.
    """
    if "unet.emb_label.weight" not in weights:
        raise UserError("the weights lack unet.emb_label.weight: no known EDM2 network is unconditional")
    convs = {m[1]: name for name in weights if (m := re.fullmatch(r"unet\.enc\.(\d+)x\1_conv\.weight", name))}
    if len(convs) != 1:
        raise UserError("the weights lack unet.enc.NxN_conv.weight: no known EDM2 network has these weights")
    if any(a.ndim != edm2_rank(name) or not a.size for name, a in weights.items()):
        raise UserError("the weights have arrays of ranks that no EDM2 network has")
    [(size, first)] = convs.items()
    names = "\n".join(weights)
    lower = re.findall(r"^unet\.enc\.(\d+)x\1_down\.conv_res0\.weight$", names, re.MULTILINE)
    sizes = [size, *sorted(lower, key=int, reverse=True)]
    for s in sizes:
        if f"unet.enc.{s}x{s}_block0.conv_res0.weight" not in weights:
            raise UserError(f"the weights lack unet.enc.{s}x{s}_block0.conv_res0.weight: no EDM2 network has these")
    blocks = {s: len(weights[f"unet.enc.{s}x{s}_block0.conv_res0.weight"]) for s in sizes}
    emb, features = len(weights["unet.emb_label.weight"]), len(weights["unet.emb_fourier.freqs"])
    width = math.gcd(emb, features, *blocks.values())
    attention = [s for s in sizes if f"unet.enc.{s}x{s}_block0.attn_qkv.weight" in weights]
    two_times = "unet.emb_noise_t.weight" in weights
    config = options.get_config("edm2", "rectified" if two_times else "flow")
    config.model.update(
        input_size=int(size), channels=weights[first].shape[1] - 1,  # the network adds one of ones
        num_classes=weights["unet.emb_label.weight"].shape[1], width=width,
        channel_mult=tuple(channels // width for channels in blocks.values()),
        channel_mult_emb=emb // width, channel_mult_noise=features // width,
        num_blocks=len(re.findall(rf"^unet\.enc\.{size}x{size}_block\d+\.conv_res0\.weight$", names, re.MULTILINE)),
        attn_resolutions=tuple(map(int, attention)),
        logvar_channels=len(weights["logvar_fourier.freqs"]) if "logvar_fourier.freqs" in weights else 0,
    )  # fmt: skip
    attended = {blocks[s] for s in [*attention, sizes[-1]]}  # the decoder's first block always attends
    if any(channels > config.model.head_width and channels % config.model.head_width for channels in attended):
        config.model.head_width = math.gcd(*attended)
    return config


def edm2_rank(name: str) -> int:
    """Return the rank of an array of EDM2's network by its name; that of a convolution for unknown names."""
    if name.endswith("_gain"):
        return 0
    if name.endswith(("_fourier.freqs", "_fourier.phases")):
        return 1
    return 2 if re.search(r"(^unet\.emb_\w+|\.emb_linear|^logvar_linear)\.weight$", name) else 4
