"""Options of each method: `config.method`, and the sampling options its models add to `config.sample`."""

from collections.abc import Callable
from typing import NamedTuple

from meanflow.config import features
from meanflow.config.features import Needs
from meanflow.config.sections import Config, Options, choice, number, pair
from meanflow.errors import UserError


def all_methods() -> Options:
    """Options that every method has."""
    return {
        "path": choice("linear", "cosine"),  # z(t): (1-t)x + te | cos(pi t/2)x + sin(pi t/2)e
        # Distribution of times: logit_normal, arXiv:2403.03206 | uniform | arctan: 2/pi atan(exp(normal)), the
        # counterpart of logit_normal for the cosine path | arctan_official: without exp; may be negative.
        "time_sampler": choice("logit_normal", "uniform", "arctan", "arctan_official"),
        "label_drop": choice("coin", "front"),  # which rows lose their label: each at random | the first, a fixed share
        "label_drop_prob": number(0.1, "[0, 1]"),  # probability (coin) or share (front)
    }


def two_times() -> Options:
    """Options of the times t and r."""
    return {
        "time_mean": (-0.4, -0.4),  # means of the normals inside the logistic, for the first and second time
        "time_std": (1.0, 1.0),  # their standard deviations
        "time_order": choice("sorted", "truncated"),  # (t, r): (larger, smaller) | (first, min(first, second))
    }


def flow_time() -> Options:
    """Options of the time t in flow matching."""
    return {
        "flow_time_mean": number(0.0, "(-inf, inf)"),  # mean of the normal inside the logistic
        "flow_time_std": number(1.0, "[0, inf)"),  # its standard deviation
    }


def flow_rows() -> Options:
    """Options of methods in which some rows of a batch have r = t, and of the error weighting."""
    return {
        "flow_rows": choice("split", "front", "coin"),  # r = t on: a fixed share (cheapest) | first rows | random rows
        # Fraction of rows with r = t; whole rows per device and micro-batch (split), or per batch (front).
        "flow_fraction": number(0.75, "[0, 1]"),
        "weighting": choice("adaptive", "adaptive_squared", "uniform"),  # of errors; adaptive_squared: reproduction
        "adaptive_power": number(1.0, "[0, inf)"),  # p in 1 / (error + eps)^p
        "adaptive_eps": number(0.01, "[0, inf)"),  # eps
    }


def interval() -> Options:
    """Options for when the training target is guided."""
    return {
        "guidance_start": number(0.0, "[0, 1]"),  # guide where guidance_start <= t <= guidance_end
        "guidance_end": number(1.0, "[0, 1]"),
    }


def meanflow() -> Options:
    """MeanFlow, arXiv:2505.13447."""
    return {
        **all_methods(),
        **two_times(),
        **flow_rows(),
        **interval(),
        "guidance": True,  # learn a guided velocity: v_g = w v + k u(y) + (1-w-k) u(no class)
        "omega": number(1.0, "(-inf, inf)"),  # w; the effective guidance scale is w / (1-k)
        "kappa": number(0.5, "[0, 1)"),  # k
        "clip_interval": True,  # clip t - r to [0, 1] in the target, as the official JAX code does
    }


def improved() -> Options:
    """Improved MeanFlow, arXiv:2512.02012."""
    return {
        **all_methods(),
        **two_times(),
        **flow_rows(),
        "guidance": True,  # learn the velocity at every guidance scale; False: at scale 1 only
        "omega_max": number(8.0, "[1, inf)"),  # largest guidance scale drawn; the smallest is 1
        "omega_power": number(1.0, "(-inf, inf)"),  # scales are drawn with density proportional to omega^-omega_power
    }


def flow() -> Options:
    """Flow matching with logit-normal times, arXiv:2403.03206, and REPA, arXiv:2410.06940."""
    return {
        **all_methods(),
        **flow_time(),
        "repa_coeff": number(0.5, "[0, inf)"),  # weight of the REPA term
    }


def decoupled() -> Options:
    """Decoupled MeanFlow, arXiv:2510.24474."""
    return {
        **all_methods(),
        **two_times(),
        **flow_time(),
        **interval(),
        "guidance_type": choice("mg", "default", "distill"),  # by the model itself | none | from a frozen teacher
        "teacher": "",  # distill: work directory of a flow model, or its weights if it has the same sizes
        "omega": number(1.0, "(-inf, inf)"),  # w: v + w (v(y) - v(no class)), distill: v(no class) + w (...)
        "adaptive_eps": number(0.01, "[0, inf)"),  # eps in log(error / variance + eps)
        "log_variance_pairs": choice("row", "all"),  # pairs of errors and variances; all: official bug; one device
    }


def rectified() -> Options:
    """Re-MeanFlow (2025), trained on couplings: pairs of noise and data."""
    return {
        **all_methods(),
        **flow_rows(),
        "path": choice("linear"),  # z(t): (1-t)x + te; couplings have straight trajectories
        # t U-shaped, t - r logit-normal, r = 0 where t > 0.8 and r < 0.4 | uniform
        "time_sampler": choice("re2_truncate", "uniform"),
        "interval_mean": number(-0.8, "(-inf, inf)"),  # re2_truncate: mean of the normal inside the logistic, for t - r
        "interval_std": number(1.0, "[0, inf)"),  # its standard deviation
        "guidance": True,  # learn a guided velocity: v_g = w v + k u(y) + (1-w-k) u(no class)
        "omega": number(1.0, "(-inf, inf)"),  # w; the effective guidance scale is w / (1-k)
        "kappa": number(0.5, "[0, 1)"),  # k
        "omega_sampler": choice("constant", "uniform"),  # from omega, kappa | effective scale uniform in [1, omega_max]
        "omega_max": number(8.0, "[1, inf)"),  # largest effective guidance scale drawn
        "stage1_steps": number(0, "[0, inf)"),  # steps of the first of two stages; 0: a single stage, set by `guidance`
        "stage_order": choice("plain_first", "guided_first"),  # official code | the paper's text
        "distance_clip": number(0.0, "[0, inf)"),  # train only on pairs with a smaller mean squared distance; 0: on all
    }


def flow_map() -> Options:
    """Options for sampling any average velocity."""
    return {
        # euler | restart (jump to 0, add new noise) | ctm (in between, set by gamma) | velocity (Euler with u(z, t, t))
        "sampler": choice("euler", "restart", "ctm", "velocity"),
        "gamma": number(0.5, "[0, 1]"),  # ctm: 0 is euler, 1 is restart; in between, part of the noise is redrawn
        "official": False,  # ctm: as in the official code, too little noise, and linear on the cosine path too
    }


def flow_map_sampling() -> Options:
    """Options for sampling an average velocity that may be guided at sampling time."""
    return {
        **flow_map(),
        "cfg_scale": number(1.0, "(-inf, inf)"),  # guidance at sampling, for models trained without it; 1: none
        "interval": (0.0, 1.0),  # times between which cfg_scale guides
    }


def improved_sampling() -> Options:
    """Options for sampling a network conditioned on guidance."""
    return {
        **flow_map(),
        "omega": number(1.0, "[1, inf)"),  # guidance scale
        "interval": (0.0, 1.0),  # times between which it guides
    }


def flow_sampling() -> Options:
    """Options for sampling the velocity of a flow model."""
    return {
        "sampler": choice("euler", "heun", "sde"),
        "diffusion": choice("sigma", "elbo"),  # sde: 2 sigma | 2 sigma (sigma' - sigma alpha'/alpha), infinite at t = 1
        "diffusion_scale": number(1.0, "[0, inf)"),  # sde: multiplies that coefficient; 0 is euler
        "official": False,  # euler, heun: skip unguided steps, a bug in the official code
        "cfg_scale": number(1.0, "(-inf, inf)"),  # guidance scale; 1: none
        "interval": (0.0, 1.0),  # times between which cfg_scale guides
    }


def check_times(config: Config) -> None:
    """Raise UserError for invalid means or deviations of the two times."""
    c = config.method
    for key in ("time_mean", "time_std"):
        pair(c[key], f"method.{key}", "for t and for r")
    if min(c.time_std) < 0:
        raise UserError(f"config.method.time_std is {c.time_std}; deviations are at least 0")


def check_interval(config: Config) -> None:
    """Raise UserError like `check_times`, and for a guidance interval that ends before it starts."""
    check_times(config)
    c = config.method
    if c.guidance_start > c.guidance_end:
        raise UserError(
            f"config.method.guidance_start {c.guidance_start} is after config.method.guidance_end {c.guidance_end}"
        )


def check_decoupled(config: Config) -> None:
    """Raise UserError like `check_interval`, and for distillation without a teacher."""
    check_interval(config)
    if config.method.guidance_type == "distill" and not config.method.teacher:
        raise UserError(
            "config.method.guidance_type is distill, but there is no teacher: set --config.method.teacher to the work "
            "directory or the .safetensors of a flow model"
        )


def check_rectified(config: Config) -> None:
    """Raise UserError for two stages without guidance."""
    c = config.method
    if c.stage1_steps and not c.guidance:
        raise UserError(
            "config.method.stage1_steps separates plain from guided steps, but config.method.guidance is False: set "
            "--config.method.stage1_steps=0 for plain steps alone, or --config.method.guidance=True"
        )


class Method(NamedTuple):
    """A method, as seen by configs."""

    networks: tuple[str, ...]  # the networks it can train
    options: Callable[[], Options]  # of `config.method`
    sampling: Callable[[], Options]  # of `config.sample`
    check: Callable[[Config], None] = lambda config: None  # checks beyond the ranges of single options
    needs: Callable[[Config], Needs] = lambda config: Needs()  # in addition to images and labels


METHODS = {
    "meanflow": Method(("dit", "unet"), meanflow, flow_map_sampling, check_interval),
    "improved": Method(("imf_dit",), improved, improved_sampling, check_times),
    "flow": Method(("dit", "edm2"), flow, flow_sampling, needs=features.repa),
    "decoupled": Method(("dmf_dit",), decoupled, flow_map_sampling, check_decoupled),
    "rectified": Method(("edm2", "dit"), rectified, flow_map_sampling, check_rectified, features.couplings),
}
