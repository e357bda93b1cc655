"""What the options of a config may be: choices, ranges, and which of them go together."""

import itertools
import math

from meanflow.config import options, ranges
from meanflow.errors import UserError

CHOICES = {
    "latents.pixels": ("symmetric", "unit"),
    "model.name": ("dit", "unet", "imf_dit", "dmf_dit", "edm2"),
    "model.attention": ("plain", "fused"),
    "model.attention_jvp": ("plain", "fused", "flash"),
    "model.embedding_type": ("positional", "fourier"),
    "model.encoder_type": ("standard", "skip", "residual"),
    "model.decoder_type": ("standard", "skip"),
    "model.time_embedding": ("joint", "separate"),
    "model.qkv_layout": ("split", "interleaved"),
    "model.compute_dtype": ("float32", "bfloat16", "float64"),
    "method.name": ("meanflow", "improved", "flow", "decoupled", "rectified"),
    "method.path": ("linear", "cosine"),
    "method.time_sampler": ("logit_normal", "uniform", "arctan", "arctan_official", "re2_truncate"),
    "method.time_order": ("sorted", "truncated"),
    "method.flow_rows": ("split", "front", "coin"),
    "method.label_drop": ("coin", "front"),
    "method.guidance_type": ("default", "mg", "distill"),
    "method.omega_sampler": ("constant", "uniform"),
    "method.stage_order": ("plain_first", "guided_first"),
    "method.log_variance_pairs": ("row", "all"),
    "method.weighting": ("adaptive", "adaptive_squared", "uniform"),
    "train.optimizer": ("adam", "adamw"),
    "train.clip_stage": ("all", "guided"),
    "train.schedule": ("constant", "cosine"),
    "train.cosine_end": ("steps", "early"),
    "train.compile_backend": ("inductor", "aot_eager"),
    "train.matmul_precision": ("highest", "default"),
    "sample.sampler": ("euler", "restart", "ctm", "velocity", "heun", "sde"),
    "sample.diffusion": ("sigma", "elbo"),
    "evaluation.convention": ("torch_fidelity", "jax_meanflow", "pytorch_fid"),
}
METRICS = ("fid", "is", "kid", "pr", "fd_dinov2")
NETWORKS = {
    "meanflow": ("dit", "unet"), "improved": ("imf_dit",), "flow": ("dit", "edm2"), "decoupled": ("dmf_dit",),
    "rectified": ("edm2", "dit"),
}  # fmt: skip
FLOW_SAMPLERS, FLOW_MAP_SAMPLERS = ("euler", "heun", "sde"), ("euler", "restart", "ctm", "velocity")


def check_dit(config: options.Config) -> None:
    """Raise UserError for sizes of which no transformer can be built."""
    c = config.model
    if c.attention_jvp == "fused":
        raise UserError(
            "config.model.attention_jvp is fused, but neither cuDNN's nor PyTorch's fused attention has the "
            "forward-mode derivative that a JVP needs: leave it plain, or in PyTorch on a GPU set flash; "
            "config.model.attention=fused holds wherever no tangent passes"
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
    if c.repa_dims and not all(isinstance(dim, int) and dim > 0 for dim in c.repa_dims):
        raise UserError(f"config.model.repa_dims is {c.repa_dims}; give a whole number above 0 for each encoder")
    if c.name == "dit" and c.repa_dims and c.repa_depth > c.depth:
        raise UserError(f"config.model.repa_depth {c.repa_depth} is more than config.model.depth {c.depth}")


def check_dmf_dit(config: options.Config) -> None:
    """Raise UserError for sizes of which no decoupled transformer can be built."""
    check_dit(config)
    c = config.model
    if c.dmf_depth > c.depth:
        raise UserError(f"config.model.dmf_depth {c.dmf_depth} is more than config.model.depth {c.depth}")


def check_imf_dit(config: options.Config) -> None:
    """Raise UserError for sizes of which no transformer with two heads can be built."""
    check_dit(config)
    c = config.model
    if c.width // c.num_heads % 2:
        raise UserError(f"config.model.width {c.width} over model.num_heads must be even, for rotary positions")
    if c.head_depth > c.depth:
        raise UserError(f"config.model.head_depth {c.head_depth} is more than config.model.depth {c.depth}")
    if config.sample.cfg_scale != 1:
        raise UserError(
            f"config.sample.cfg_scale is {config.sample.cfg_scale}, which is for models trained without guidance; this "
            "one is told its scale: leave it at 1 and choose the scale by --omega or --config.sample.omega"
        )


def check_levels(config: options.Config) -> None:
    """Raise UserError for levels of which no network can be built."""
    c = config.model
    if not c.channel_mult or not all(isinstance(mult, int) and mult > 0 for mult in c.channel_mult):
        raise UserError(f"config.model.channel_mult is {c.channel_mult}; give a whole number above 0 for each level")
    halvings = len(c.channel_mult) - 1
    if c.input_size % 2**halvings:
        raise UserError(
            f"config.model.input_size {c.input_size} cannot be halved {halvings} times: config.model.channel_mult "
            f"{c.channel_mult} has one entry a level, each level half as large"
        )
    sizes = [c.input_size >> level for level in range(len(c.channel_mult))]
    if not set(c.attn_resolutions) <= set(sizes):
        raise UserError(f"config.model.attn_resolutions {c.attn_resolutions} are not among the levels' sizes {sizes}")


def check_unet(config: options.Config) -> None:
    """Raise UserError for sizes of which no U-Net can be built, and for what only a network with classes can do.

    The network itself checks what depends on its levels.
    """
    c = config.model
    check_levels(config)
    if c.width < 4 or c.width % 4:
        raise UserError(f"config.model.width {c.width} must be a multiple of 4")
    if config.evaluation.classifier:
        raise UserError("a U-Net knows no classes to be scored: set --config.evaluation.classifier=False")
    if config.method.guidance or config.sample.cfg_scale != 1:
        raise UserError(
            "config.model.name is unet, a network without classes, which cannot be guided: set "
            "--config.method.guidance=False and --config.sample.cfg_scale=1"
        )
    if not all(map(is_number, c.resample_filter)) or sum(c.resample_filter) == 0:
        raise UserError(f"config.model.resample_filter is {c.resample_filter}; give numbers whose sum is not 0")
    if config.model.dropout == 1:
        raise UserError("config.model.dropout is 1; it must be less, or nothing is left")


def check_edm2(config: options.Config) -> None:
    """Raise UserError for what no U-Net of EDM2 can be, or that its preconditioning does not hold for."""
    check_levels(config)
    if config.method.path != "linear":
        raise UserError("config.model.name is edm2, whose preconditioning is that of config.method.path=linear")


NETWORK_CHECKS = {
    "dit": check_dit, "unet": check_unet, "imf_dit": check_imf_dit, "dmf_dit": check_dmf_dit, "edm2": check_edm2,
}  # fmt: skip


def check_values(flat: dict) -> None:
    """Raise UserError for the first value, by dotted option, that is no choice or out of its range."""
    for key, allowed in CHOICES.items():
        if flat[key] not in allowed:
            raise UserError(f"config.{key} is {flat[key]!r}; choose one of {', '.join(allowed)}")
    ranges.check(flat)


def check_method(config: options.Config) -> None:
    """Raise UserError for a method that cannot train the network, or options of no sense for it."""
    c, net = config.method, config.model
    if net.name not in NETWORKS[c.name]:
        raise UserError(
            f"config.method.name {c.name} cannot use config.model.name {net.name}: it trains "
            f"{' or '.join(NETWORKS[c.name])}"
        )
    if net.name in ("dit", "edm2") and net.interval_embedder != (c.name in ("meanflow", "rectified")):
        raise UserError(
            f"config.model.interval_embedder is {net.interval_embedder}: meanflow and rectified need it, for their "
            "networks are told both times; flow needs a network without it"
        )
    if (c.time_sampler == "re2_truncate") != (c.name == "rectified") and c.time_sampler != "uniform":
        raise UserError(
            f"config.method.time_sampler is {c.time_sampler}: config.method.name=rectified takes re2_truncate or "
            "uniform, and re2_truncate is for no other method"
        )
    if c.name == "rectified":
        check_rectified(config)
    if c.name != "flow" and net.name == "dit" and net.repa_dims:
        raise UserError("config.model.repa_dims: only config.method.name=flow trains the projectors of REPA")
    if config.data.encoder and not (net.name == "dit" and net.repa_dims):
        raise UserError(
            "config.data.encoder is set, which is for REPA: for config.method.name=flow, with the encoder's width in "
            "config.model.repa_dims"
        )
    if c.name == "decoupled" and c.guidance_type == "distill" and not c.teacher:
        raise UserError(
            "config.method.guidance_type is distill, but there is no teacher: set --config.method.teacher to the work "
            "directory or the .safetensors of a flow model"
        )
    if c.name in ("meanflow", "decoupled") and not 0 <= c.guidance_start <= c.guidance_end <= 1:
        raise UserError(
            f"config.method.guidance_start and guidance_end are {c.guidance_start} and {c.guidance_end}; they must "
            "rise and stay in [0, 1]"
        )
    for key in ("time_mean", "time_std"):
        pair(c[key], f"method.{key}", "for t and for r")
    if min(c.time_std) < 0:
        raise UserError(f"config.method.time_std is {c.time_std}; deviations are at least 0")


def check_rectified(config: options.Config) -> None:
    """Raise UserError for stages that cannot be, or a path that couplings do not have."""
    c = config.method
    if c.path != "linear":
        raise UserError(
            "config.method.name is rectified, whose trajectories are straight: config.method.path is linear"
        )
    if c.stage1_steps and not c.guidance:
        raise UserError(
            "config.method.stage1_steps parts plain from guided steps, but config.method.guidance is False: set "
            "--config.method.stage1_steps=0 for plain steps alone, or --config.method.guidance=True"
        )


def check_evaluation(config: options.Config) -> None:
    """Raise UserError for metrics that there are not, or that lack what they compare with or compute by."""
    c = config.evaluation
    unknown = sorted(set(c.metrics) - set(METRICS))
    if unknown:
        raise UserError(f"config.evaluation.metrics has {unknown[0]!r}; choose of {', '.join(METRICS)}")
    least = {"is": 10, "pr": 4, "kid": 2}  # shares of the samples; neighbours, and the sample itself; a variance
    for metric in c.metrics:
        if c.num_samples < least.get(metric, 2):
            raise UserError(
                f"config.evaluation.num_samples is {c.num_samples}, but {metric} needs at least {least[metric]}"
            )
    if set(c.metrics) - {"fd_dinov2"} and not c.inception:
        raise UserError(
            f"config.evaluation.metrics is {', '.join(c.metrics)}, but config.evaluation.inception names no weights: "
            "python parity/convert.py pt_inception-2015-12-05-6726825d.pth inception.safetensors makes them of what "
            "torch-fidelity and pytorch-fid download"
        )
    if set(c.metrics) - {"is"} and not c.reference:
        raise UserError(
            f"config.evaluation.metrics is {', '.join(c.metrics)}, but config.evaluation.reference names no statistics "
            "of real images: evaluate --make_reference=IMAGES --reference=FILE.npz makes them"
        )


def check_sampling(config: options.Config) -> None:
    """Raise UserError for a sampler that the model does not have, or an interval of no sense."""
    c, samplers = config.sample, FLOW_SAMPLERS if config.method.name == "flow" else FLOW_MAP_SAMPLERS
    if c.sampler not in samplers:
        raise UserError(
            f"config.sample.sampler is {c.sampler}, but a model of config.method.name {config.method.name} is sampled "
            f"by one of {', '.join(samplers)}"
        )
    if c.times and not (all(map(is_number, c.times)) and falls(c.times) and c.times[0] <= 1 and c.times[-1] >= 0):
        raise UserError(
            f"config.sample.times is {c.times}: sampling times must fall from at most 1 to at least 0, in one step or "
            "more"
        )
    start, end = pair(c.interval, "sample.interval", "the start and the end of the interval")
    if not 0 <= start <= end <= 1:
        raise UserError(f"config.sample.interval is {c.interval}; it must rise and stay in [0, 1]")


def falls(values: tuple[float, ...]) -> bool:
    """Return whether there are two values or more, each less than the one before."""
    return len(values) > 1 and all(a > b for a, b in itertools.pairwise(values))


def pair(value: object, key: str, what: str) -> tuple[float, float]:
    """Return `value` if it is two finite numbers.  Raises UserError naming the option `key` and what they are."""
    if not isinstance(value, tuple) or len(value) != 2 or not all(is_number(v) for v in value):
        raise UserError(f"config.{key} is {value}; give two numbers, {what}")
    return value


def is_number(value: object) -> bool:
    """Return whether a value is a finite number."""
    return isinstance(value, int | float) and math.isfinite(value)
