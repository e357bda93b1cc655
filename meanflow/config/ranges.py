"""The range of every option that is a number, as an interval: [ ] hold an end, ( ) do not.  NaN is in none of them.

`rules.check_method` checks guidance_start and guidance_end, together.
"""

import math

from meanflow.errors import UserError

RANGES = {
    "seed": "[0, 4294967296)",
    "data.num_workers": "[0, inf)",
    "data.prefetch": "[0, inf)",
    "data.augment.prob": "[0, 1]",
    "data.augment.xflip": "[0, inf)",
    "data.augment.yflip": "[0, inf)",
    "data.augment.rotate_int": "[0, inf)",
    "data.augment.translate_int": "[0, inf)",
    "data.augment.scale": "[0, inf)",
    "data.augment.rotate_frac": "[0, inf)",
    "data.augment.aniso": "[0, inf)",
    "data.augment.translate_frac": "[0, inf)",
    "data.augment.brightness": "[0, inf)",
    "data.augment.contrast": "[0, inf)",
    "data.augment.lumaflip": "[0, inf)",
    "data.augment.hue": "[0, inf)",
    "data.augment.saturation": "[0, inf)",
    "model.input_size": "[1, inf)",
    "model.channels": "[1, inf)",
    "model.num_classes": "[1, inf)",
    "model.width": "[1, inf)",
    "model.patch_size": "[1, inf)",
    "model.depth": "[1, inf)",
    "model.num_heads": "[1, inf)",
    "model.mlp_ratio": "(0, inf)",
    "model.repa_depth": "[1, inf)",
    "model.projector_dim": "[1, inf)",
    "model.dmf_depth": "[0, inf)",
    "model.head_depth": "[0, inf)",
    "model.num_class_tokens": "[1, inf)",
    "model.num_omega_tokens": "[1, inf)",
    "model.num_interval_tokens": "[1, inf)",
    "model.num_time_tokens": "[1, inf)",
    "model.channel_mult_emb": "[1, inf)",
    "model.channel_mult_noise": "[1, inf)",
    "model.num_blocks": "[1, inf)",
    "model.dropout": "[0, 1]",  # of a U-Net below 1, see `rules.check_unet`
    "model.augment_dim": "[0, inf)",
    "model.head_width": "[1, inf)",
    "model.logvar_channels": "[0, inf)",
    "model.sigma_data": "(0, inf)",
    "method.flow_time_mean": "(-inf, inf)",
    "method.flow_time_std": "[0, inf)",
    "method.interval_mean": "(-inf, inf)",
    "method.interval_std": "[0, inf)",
    "method.flow_fraction": "[0, 1]",
    "method.label_drop_prob": "[0, 1]",
    "method.omega": "(-inf, inf)",
    "method.kappa": "[0, 1)",
    "method.omega_max": "[1, inf)",
    "method.omega_power": "(-inf, inf)",
    "method.stage1_steps": "[0, inf)",
    "method.distance_clip": "[0, inf)",
    "method.adaptive_power": "[0, inf)",
    "method.adaptive_eps": "[0, inf)",
    "method.repa_coeff": "[0, inf)",
    "train.steps": "[1, inf)",
    "train.batch_size": "[1, inf)",
    "train.accumulate": "[1, inf)",
    "train.fsdp": "[1, inf)",
    "train.learning_rate": "[0, inf)",
    "train.beta1": "[0, 1)",
    "train.beta2": "[0, 1)",
    "train.adam_eps": "[0, inf)",
    "train.weight_decay": "[0, inf)",
    "train.clip_norm": "[0, inf)",
    "train.warmup_steps": "[0, inf)",
    "train.warmup_from": "[0, inf)",
    "train.final_factor": "[0, 1]",
    "train.schedule_steps": "[0, inf)",
    "train.ema_every": "[1, inf)",
    "train.num_threads": "[0, inf)",
    "train.log_every": "[1, inf)",
    "train.sample_every": "[0, inf)",
    "train.evaluate_every": "[0, inf)",
    "train.checkpoint_every": "[1, inf)",
    "train.keep_checkpoints": "[1, inf)",
    "train.keep_every": "[0, inf)",
    "train.snapshot_every": "[0, inf)",
    "sample.steps": "[1, inf)",
    "sample.shift": "(0, inf)",
    "sample.gamma": "[0, 1]",
    "sample.diffusion_scale": "[0, inf)",
    "sample.cfg_scale": "(-inf, inf)",
    "sample.omega": "[1, inf)",
    "sample.batch_size": "[1, inf)",
    "sample.ema": "[-1, inf)",
    "sample.seed": "[0, 18446744073709551616)",
    "evaluation.num_samples": "[2, inf)",
}


def ends(interval: str) -> tuple[float, float]:
    """Return the two ends of an interval as text."""
    least, most = interval[1:-1].split(", ")
    return float(least), float(most)


def contains(interval: str, value: float) -> bool:
    """Return whether the interval has the value."""
    least, most = ends(interval)
    after = value >= least if interval[0] == "[" else value > least
    return after and (value <= most if interval[-1] == "]" else value < most)


def describe(interval: str) -> str:
    """Return the interval in words: "at least 0 and less than 1"."""
    least, most = ends(interval)
    if math.isinf(least):
        return "a finite number"
    words = f"at least {least:.0f}" if interval[0] == "[" else f"a number above {least:.0f}"
    if math.isinf(most):
        return words
    return f"{words} and {'at most' if interval[-1] == ']' else 'less than'} {most:.0f}"


def check(flat: dict) -> None:
    """Raise UserError for the first number, by dotted option, that is out of its range."""
    for key, interval in RANGES.items():
        if not contains(interval, flat[key]):
            finite = " and finite" if flat[key] == math.inf and interval[0] == "[" else ""
            raise UserError(f"config.{key} is {flat[key]}; it must be {describe(interval)}{finite}")
