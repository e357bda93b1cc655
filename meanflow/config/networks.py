"""Options of each network, `config.model`, and checks of its sizes."""

from collections.abc import Callable
from typing import NamedTuple

from meanflow.config.sections import Config, Options, choice, is_number, number
from meanflow.errors import UserError

# Depth, width and heads of the DiT family: arXiv:2212.09748 table 1; M is MeanFlow's own, arXiv:2505.13447 table 4.
DIT_SIZES = {
    "S": {"depth": 12, "width": 384, "num_heads": 6},
    "B": {"depth": 12, "width": 768, "num_heads": 12},
    "M": {"depth": 16, "width": 1024, "num_heads": 16},
    "L": {"depth": 24, "width": 1024, "num_heads": 16},
    "XL": {"depth": 28, "width": 1152, "num_heads": 16},
}


def data_sizes() -> Options:
    """Options that every network has."""
    return {
        "input_size": number(8, "[1, inf)"),  # height and width of the data
        "channels": number(1, "[1, inf)"),  # channels of the data
        "num_classes": number(10, "[1, inf)"),  # number of classes; the label `num_classes` means "no class"
        "compute_dtype": choice("float32", "bfloat16", "float64"),  # of matmuls; float64 needs float64 parameters
    }


def transformer() -> Options:
    """Options that all transformers share."""
    return {
        "width": number(128, "[1, inf)"),  # channels of a token
        "patch_size": number(2, "[1, inf)"),  # side of a patch; there are (input_size / patch_size)^2 tokens
        "depth": number(4, "[1, inf)"),  # blocks; imf_dit: on the path to u, including its head
        "num_heads": number(4, "[1, inf)"),  # attention heads
        "mlp_ratio": number(4.0, "(0, inf)"),  # hidden width of a block's MLP / `width`
        "attention": choice("plain", "fused"),  # attention outside the JVP; fused: the kernel of cuDNN or PyTorch
        # Attention under the JVP, where no gradient is taken; flash: the package jvp_flash_attention, PyTorch on CUDA
        # only; fused is refused, because those kernels lack forward-mode AD.
        "attention_jvp": choice("plain", "fused", "flash"),
    }


def dit(method: str) -> Options:
    """DiT, arXiv:2212.09748, as MeanFlow, flow models (SiT) and Re-MeanFlow use it."""
    options = transformer() | {
        "qk_norm": False,  # RMS-normalise queries and keys per head
        "interval_embedder": method != "flow",  # embed t - r; flow models lack this embedding and ignore r
    }
    repa = {  # representation alignment, arXiv:2410.06940
        "repa_dims": (),  # feature width of each encoder; (): no REPA
        "repa_depth": number(8, "[1, inf)"),  # blocks before the projectors
        "projector_dim": number(2048, "[1, inf)"),  # hidden width of a projector
    }
    return options | (repa if method == "flow" else {})


def dmf_dit(method: str) -> Options:
    """DiT of decoupled MeanFlow, arXiv:2510.24474."""
    return transformer() | {
        "qk_norm": False,  # RMS-normalise queries and keys per head
        "dmf_depth": number(3, "[0, inf)"),  # number of leading blocks conditioned on t; later ones on r
    }


def imf_dit(method: str) -> Options:
    """Transformer of improved MeanFlow, arXiv:2512.02012: conditions are tokens; u and v have separate heads."""
    return transformer() | {
        "head_depth": number(2, "[0, inf)"),  # blocks in each of the heads of u and v; the other blocks are shared
        "v_heads": True,  # include the head of v; False (released weights): can only sample
        "num_class_tokens": number(8, "[1, inf)"),  # tokens for the class
        "num_omega_tokens": number(4, "[1, inf)"),  # tokens for the guidance scale
        "num_interval_tokens": number(2, "[1, inf)"),  # tokens each for start and end of the guidance interval
        "num_time_tokens": number(4, "[1, inf)"),  # tokens for t - r
    }


def levels() -> Options:
    """Options that both U-Nets share."""
    return {
        "width": number(128, "[1, inf)"),  # channels of the first level
        "channel_mult": (2, 2, 2),  # channels of each level / `width`; each level halves the resolution
        "channel_mult_emb": number(4, "[1, inf)"),  # width of the condition / `width`
        "channel_mult_noise": number(2, "[1, inf)"),  # width of the features of each time / `width`
        "num_blocks": number(4, "[1, inf)"),  # residual blocks per level of the encoder; the decoder has one more
        "attn_resolutions": (16,),  # resolutions whose blocks have attention
    }


def unet(method: str) -> Options:
    """Unconditional U-Net of the CIFAR-10 systems: DDPM++ and NCSN++ as in EDM, arXiv:2206.00364."""
    return levels() | {
        "dropout": number(0.0, "[0, 1)"),  # dropout probability in training
        "augment_dim": number(0, "[0, inf)"),  # embedded labels of data.augment, 6 for the CIFAR-10 runs; 0: none
        "embedding_type": choice("positional", "fourier"),  # time features: DDPM++ | random, NCSN++
        "encoder_type": choice("standard", "skip", "residual"),  # DDPM++ | skip connections | NCSN++
        "decoder_type": choice("standard", "skip"),  # DDPM++ | skip connections
        "resample_filter": (1, 3, 3, 1),  # filter taps of down- and upsampling; (1, 1) in DDPM++
        "time_embedding": choice("joint", "separate"),  # one MLP for t and t - r (py-meanflow) | one each for t and r
        "qkv_layout": choice("split", "interleaved"),  # q, k, v channels: thirds (py-meanflow) | EDM, reproduction
    }


def edm2(method: str) -> Options:
    """U-Net of EDM2, arXiv:2312.02696, for flow models and Re-MeanFlow."""
    return levels() | {
        "head_width": number(64, "[1, inf)"),  # channels per attention head; narrower blocks have one head
        "interval_embedder": method != "flow",  # embed r in addition to t; flow models lack this embedding
        "logvar_channels": number(0, "[0, inf)"),  # features of the log-variance in EDM2's released weights; 0: none
        "sigma_data": number(0.5, "(0, inf)"),  # standard deviation of the data
    }


def check_transformer(config: Config) -> None:
    """Raise UserError for invalid transformer sizes, or attention kernels that do not support them."""
    c = config.model
    if c.attention_jvp == "fused":
        raise UserError(
            "config.model.attention_jvp is fused, but neither cuDNN's nor PyTorch's fused attention has the "
            "forward-mode derivative that a JVP needs: leave it plain, or in PyTorch on a GPU set flash; "
            "config.model.attention=fused applies wherever there is no JVP"
        )
    if c.attention_jvp == "flash" and c.compute_dtype == "float64":
        raise UserError(
            "config.model.attention_jvp is flash and config.model.compute_dtype float64, but that kernel computes in "
            "float32 at most: set --config.model.attention_jvp=plain"
        )
    if c.attention_jvp == "flash" and c.width > 256 * c.num_heads:
        raise UserError(
            "config.model.attention_jvp is flash, which takes heads of at most 256 channels, but config.model.width "
            f"{c.width} over model.num_heads {c.num_heads} is more: set --config.model.attention_jvp=plain"
        )
    if c.attention == "fused" and c.compute_dtype == "float64":
        raise UserError(
            "config.model.attention is fused and config.model.compute_dtype float64, but a fused kernel computes its "
            "softmax in float32: set --config.model.attention=plain"
        )
    if c.input_size % c.patch_size:
        raise UserError(
            f"config.model.patch_size {c.patch_size} does not divide config.model.input_size {c.input_size}"
        )
    if c.width % c.num_heads or c.width % 4:
        raise UserError(f"config.model.width {c.width} must be a multiple of model.num_heads and of 4")


def check_interval_embedder(config: Config) -> None:
    """Raise UserError if the network embeds one time but its method needs two, or vice versa."""
    embedder, method = config.model.interval_embedder, config.method.name
    if embedder != (method != "flow"):
        raise UserError(
            f"config.model.interval_embedder is {embedder}, but config.method.name {method} trains a network "
            f"{'with' if method != 'flow' else 'without'} it: leave it as get_config(method={method!r}) sets it"
        )


def check_dit(config: Config) -> None:
    """Raise UserError like `check_transformer`, and for embeddings or REPA options that do not fit the method."""
    check_transformer(config)
    check_interval_embedder(config)
    c = config.model
    if config.method.name != "flow":
        return
    if not all(isinstance(dim, int) and dim > 0 for dim in c.repa_dims):
        raise UserError(f"config.model.repa_dims is {c.repa_dims}; give a whole number above 0 for each encoder")
    if c.repa_dims and c.repa_depth > c.depth:
        raise UserError(f"config.model.repa_depth {c.repa_depth} is more than config.model.depth {c.depth}")
    if config.data.encoder and not c.repa_dims:
        raise UserError("config.data.encoder is set, but REPA is off: set config.model.repa_dims to its width")


def check_dmf_dit(config: Config) -> None:
    """Raise UserError like `check_transformer`, and if dmf_depth exceeds depth."""
    check_transformer(config)
    c = config.model
    if c.dmf_depth > c.depth:
        raise UserError(f"config.model.dmf_depth {c.dmf_depth} is more than config.model.depth {c.depth}")


def check_imf_dit(config: Config) -> None:
    """Raise UserError like `check_transformer`, and for an odd head width or head_depth above depth."""
    check_transformer(config)
    c = config.model
    if c.width // c.num_heads % 2:
        raise UserError(f"config.model.width {c.width} over model.num_heads must be even, for rotary positions")
    if c.head_depth > c.depth:
        raise UserError(f"config.model.head_depth {c.head_depth} is more than config.model.depth {c.depth}")


def check_levels(config: Config) -> None:
    """Raise UserError for invalid U-Net levels."""
    c = config.model
    if not c.channel_mult or not all(isinstance(mult, int) and mult > 0 for mult in c.channel_mult):
        raise UserError(f"config.model.channel_mult is {c.channel_mult}; give a whole number above 0 for each level")
    halvings = len(c.channel_mult) - 1
    if c.input_size % 2**halvings:
        raise UserError(
            f"config.model.input_size {c.input_size} cannot be halved {halvings} times: config.model.channel_mult "
            f"{c.channel_mult} has one entry per level, each level half as large"
        )
    sizes = [c.input_size >> level for level in range(len(c.channel_mult))]
    if not set(c.attn_resolutions) <= set(sizes):
        raise UserError(f"config.model.attn_resolutions {c.attn_resolutions} are not among the levels' sizes {sizes}")


def check_unet(config: Config) -> None:
    """Raise UserError for invalid U-Net sizes, and for options that need a class-conditional network.

    The network itself checks whatever depends on its levels.
    """
    c = config.model
    check_levels(config)
    if c.width < 4 or c.width % 4:
        raise UserError(f"config.model.width {c.width} must be a multiple of 4")
    if config.evaluation.classifier:
        raise UserError("a U-Net has no classes to score: set --config.evaluation.classifier=False")
    if config.method.guidance or config.sample.cfg_scale != 1:
        raise UserError(
            "config.model.name is unet, a network without classes, which cannot be guided: set "
            "--config.method.guidance=False and --config.sample.cfg_scale=1"
        )
    if not all(map(is_number, c.resample_filter)) or sum(c.resample_filter) == 0:
        raise UserError(f"config.model.resample_filter is {c.resample_filter}; give numbers whose sum is not 0")


def check_edm2(config: Config) -> None:
    """Raise UserError for invalid levels, or a path for which EDM2's preconditioning is not derived."""
    check_levels(config)
    check_interval_embedder(config)
    if config.method.path != "linear":
        raise UserError("config.model.name is edm2, whose preconditioning is that of config.method.path=linear")


class Network(NamedTuple):
    """A network, as seen by configs."""

    options: Callable[[str], Options]  # method name -> the network's options in `config.model`
    check: Callable[[Config], None]


NETWORKS = {
    "dit": Network(dit, check_dit),
    "unet": Network(unet, check_unet),
    "imf_dit": Network(imf_dit, check_imf_dit),
    "dmf_dit": Network(dmf_dit, check_dmf_dit),
    "edm2": Network(edm2, check_edm2),
}
