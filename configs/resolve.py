"""Checks a config, and keeps it in the work directory as text."""

import json
import os
import pathlib

import ml_collections

from configs import base
from configs.errors import UserError

CHOICES = {
    "model.name": ("dit", "unet", "imf_dit"),
    "model.embedding_type": ("positional", "fourier"),
    "model.encoder_type": ("standard", "skip", "residual"),
    "model.decoder_type": ("standard", "skip"),
    "model.time_embedding": ("joint", "separate"),
    "model.qkv_layout": ("split", "interleaved"),
    "model.compute_dtype": ("float32", "bfloat16", "float64"),
    "method.name": ("meanflow", "improved"),
    "method.path": ("linear", "cosine"),
    "method.time_sampler": ("logit_normal", "uniform"),
    "method.time_order": ("sorted", "truncated"),
    "method.flow_rows": ("split", "front", "coin"),
    "method.label_drop": ("coin", "front"),
    "method.weighting": ("adaptive", "adaptive_squared", "uniform"),
    "train.optimizer": ("adam", "adamw"),
    "train.schedule": ("constant", "cosine"),
    "train.cosine_end": ("steps", "early"),
    "train.compile_backend": ("inductor", "aot_eager"),
    "train.matmul_precision": ("highest", "default"),
}
# Least and largest value of numbers; None: no bound.
RANGES = {
    "model.depth": (1, None),
    "model.width": (1, None),
    "model.num_heads": (1, None),
    "model.patch_size": (1, None),
    "model.num_classes": (1, None),
    "model.head_depth": (0, None),
    "model.num_class_tokens": (1, None),
    "model.num_omega_tokens": (1, None),
    "model.num_interval_tokens": (1, None),
    "model.num_time_tokens": (1, None),
    "model.num_blocks": (1, None),
    "model.channel_mult_emb": (1, None),
    "model.channel_mult_noise": (1, None),
    "model.augment_dim": (0, None),
    "model.dropout": (0, 1),
    "data.augment.prob": (0, 1),
    "method.flow_fraction": (0, 1),
    "method.label_drop_prob": (0, 1),
    "method.kappa": (0, 1),
    "method.omega_max": (1, None),
    "train.steps": (1, None),
    "train.batch_size": (1, None),
    "train.accumulate": (1, None),
    "train.fsdp": (1, None),
    "train.ema_every": (1, None),
    "train.num_threads": (0, None),
    "train.log_every": (1, None),
    "train.checkpoint_every": (1, None),
    "train.keep_checkpoints": (1, None),
    "sample.steps": (1, None),
    "sample.omega": (1, None),
    "sample.batch_size": (1, None),
    "evaluation.num_samples": (2, None),
}
# A run may be resumed with other values of these: they change what is reported or how far it goes, not its steps.
FREE = (
    "name", "data.dir", "data.num_workers", "train.steps", "train.accumulate", "train.fsdp", "train.compile",
    "train.num_threads", "train.log_every", "train.sample_every", "train.evaluate_every", "train.checkpoint_every",
    "train.keep_checkpoints", "sample.", "evaluation.",
)  # fmt: skip
FILE_NAME = "config.json"
FRAMEWORKS = {"jax": "JAX", "torch": "PyTorch"}


def flatten(config: base.Config, prefix: str = "") -> dict[str, object]:
    """Return {dotted option: value}."""
    flat = {}
    for key, value in config.items():
        nested = isinstance(value, ml_collections.ConfigDict)
        flat |= flatten(value, f"{prefix}{key}.") if nested else {prefix + key: value}
    return flat


def check(config: base.Config) -> base.Config:
    """Return `config`.  Raises UserError naming the first option that is missing, unknown or has no sense."""
    if config is None:
        raise UserError("--config is missing: name the file of the run, e.g. --config=configs/digits.py")
    flat, known = flatten(config), flatten(base.get_config())
    for key in flat.keys() ^ known.keys():
        raise UserError(f"config.{key} is {'unknown' if key in flat else 'missing'}; configs/base.py lists the options")
    for key, allowed in CHOICES.items():
        if flat[key] not in allowed:
            raise UserError(f"config.{key} is {flat[key]!r}; choose one of {', '.join(allowed)}")
    for key, (least, most) in RANGES.items():
        if not flat[key] >= least or (most is not None and not flat[key] <= most):  # NaN is neither
            raise UserError(
                f"config.{key} is {flat[key]}; it must be at least {least}" + (f" and at most {most}" if most else "")
            )
    {"dit": check_dit, "unet": check_unet, "imf_dit": check_imf_dit}[config.model.name](config)
    if (config.method.name == "improved") != (config.model.name == "imf_dit"):
        raise UserError(
            f"config.method.name {config.method.name} cannot use config.model.name {config.model.name}: improved and "
            "imf_dit belong together"
        )
    start, end = pair(config.sample.interval, "sample.interval", "the start and the end of the interval")
    if not 0 <= start <= end <= 1:
        raise UserError(f"config.sample.interval is {config.sample.interval}; it must rise and stay in [0, 1]")
    for key in ("time_mean", "time_std"):
        pair(config.method[key], f"method.{key}", "for t and for r")
    if not config.train.ema_decays or not all(0 <= d < 1 for d in config.train.ema_decays):
        raise UserError(f"config.train.ema_decays is {config.train.ema_decays}; name at least one decay in [0, 1)")
    if not -1 <= config.sample.ema < len(config.train.ema_decays):
        raise UserError(f"config.sample.ema is {config.sample.ema}, but there are {len(config.train.ema_decays)} EMAs")
    return config


def check_dit(config: base.Config) -> None:
    """Raise UserError for sizes of which no transformer can be built."""
    c = config.model
    if c.input_size % c.patch_size:
        raise UserError(
            f"config.model.patch_size {c.patch_size} does not divide config.model.input_size {c.input_size}"
        )
    if c.width % c.num_heads or c.width % 4:
        raise UserError(f"config.model.width {c.width} must be a multiple of model.num_heads and of 4")


def check_imf_dit(config: base.Config) -> None:
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


def check_unet(config: base.Config) -> None:
    """Raise UserError for sizes of which no U-Net can be built, and for what only a network with classes can do.

    The network itself checks what depends on its levels.
    """
    c = config.model
    sizes = [c.input_size >> level for level in range(len(c.channel_mult))]
    if c.width < 4 or c.width % 4:
        raise UserError(f"config.model.width {c.width} must be a multiple of 4")
    if not all(isinstance(mult, int) and mult > 0 for mult in c.channel_mult):
        raise UserError(f"config.model.channel_mult is {c.channel_mult}; give a whole number above 0 for each level")
    if not set(c.attn_resolutions) <= set(sizes):
        raise UserError(f"config.model.attn_resolutions {c.attn_resolutions} are not among the levels' sizes {sizes}")
    if config.evaluation.classifier:
        raise UserError("a U-Net knows no classes to be scored: set --config.evaluation.classifier=False")
    if config.method.guidance or config.sample.cfg_scale != 1:
        raise UserError(
            "config.model.name is unet, a network without classes, which cannot be guided: set "
            "--config.method.guidance=False and --config.sample.cfg_scale=1"
        )
    if config.model.dropout == 1:
        raise UserError("config.model.dropout is 1; it must be less, or nothing is left")


def pair(value: object, key: str, what: str) -> tuple[float, float]:
    """Return `value` if it is two numbers.  Raises UserError naming the option `key` and what they are."""
    if not isinstance(value, tuple) or len(value) != 2 or not all(isinstance(v, int | float) for v in value):
        raise UserError(f"config.{key} is {value}; give two numbers, {what}")
    return value


def check_trainable(config: base.Config) -> None:
    """Raise UserError if the network lacks what only training needs."""
    if config.model.name == "imf_dit" and not config.model.v_heads:
        raise UserError(
            "config.model.v_heads is False: without the head of v, which released weights leave out, a network can "
            "sample but not be trained"
        )


def check_divisible(config: base.Config, devices: int, kind: str) -> None:
    """Raise UserError unless every device gets whole rows: kind is what the message calls the `devices`."""
    batch, parts = config.train.batch_size, devices * config.train.accumulate
    if batch % parts:
        raise UserError(
            f"config.train.batch_size {batch} is not divisible by {parts} ({devices} {kind} times "
            f"config.train.accumulate {config.train.accumulate}); {batch // parts * parts or parts} is"
        )
    if devices % config.train.fsdp:
        raise UserError(f"config.train.fsdp {config.train.fsdp} does not divide the {devices} {kind}")


def to_json(config: base.Config) -> str:
    """Return the config as indented JSON."""
    return json.dumps(config.to_dict(), indent=2) + "\n"


def from_json(text: str) -> base.Config:
    """Return the config of a JSON text, every option as in `configs/base.py`.

    Raises UserError for an unknown or a missing option, such as one of another version of this project.
    """
    config = base.get_config()
    given = flatten(ml_collections.ConfigDict(json.loads(text)))
    for key in given.keys() ^ flatten(config).keys():
        raise UserError(f"the stored config {'has the unknown' if key in given else 'lacks the'} option {key}")
    for key, value in given.items():
        config.update_from_flattened_dict({key: tuple(value) if isinstance(value, list) else value})
    return config


def open_workdir(workdir: str | os.PathLike, config: base.Config, framework: str) -> None:
    """Make the work directory of a run and write its config there.

    framework: `jax` or `torch`, the writer of its checkpoints.
    A run that is there already goes on if its config is the same but for what may change (`FREE`).
    Raises UserError naming the options that differ, if the run is one of the other framework, or if the directory
    cannot be written.
    """
    path = pathlib.Path(workdir) / FILE_NAME
    for other in FRAMEWORKS.keys() - {framework}:
        if (path.parent / "checkpoints" / other).is_dir():
            raise UserError(
                f"{workdir} is the work directory of a run in {FRAMEWORKS[other]}, this is {FRAMEWORKS[framework]}.  "
                "Choose another --workdir; parity/convert.py carries weights over"
            )
    if path.exists():
        old, new = flatten(read_workdir(workdir)), flatten(config)
        differing = [key for key in new if new[key] != old[key] and not key.startswith(FREE)]
        if differing:
            shown = ", ".join(f"{key} ({old[key]!r} there, {new[key]!r} here)" for key in differing)
            raise UserError(
                f"{workdir} was written by another config: {shown}.  Choose another --workdir, or delete it"
            )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}")
        unfinished.write_text(to_json(config))
        unfinished.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}.  Choose a --workdir on a disk with room") from error


def read_workdir(workdir: str | os.PathLike) -> base.Config:
    """Return the config that a run left in its work directory.  Raises UserError if there is none."""
    path = pathlib.Path(workdir) / FILE_NAME
    try:
        return from_json(path.read_text())
    except OSError as error:
        raise UserError(f"{workdir} is not the work directory of a run: cannot read {path}") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is damaged: {error}") from error
