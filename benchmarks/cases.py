"""The steps to compare: each system's cases, with config and lower bound in forward passes."""

import ast
import copy
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from meanflow.commands import flops
from meanflow.config import checks
from meanflow.config import options as base
from meanflow.config.networks import DIT_SIZES
from meanflow.config.sections import find
from meanflow.data import draws
from meanflow.errors import UserError

FLOW_MATCHING = "flow matching"
NETWORKS = {  # network and method of each system
    "meanflow": ("dit", "meanflow"), "improved": ("imf_dit", "improved"), "decoupled": ("dmf_dit", "decoupled"),
    "rectified": ("dit", "rectified"),
}  # fmt: skip
SYSTEMS = tuple(NETWORKS)
GUIDANCE = ("none", "kappa0", "kappa", "all")
OPTIONS_OF = {  # options of config.method by kind of guidance
    "none": {"guidance": False},
    "kappa0": {"guidance": True, "omega": 3.0, "kappa": 0.0},
    "kappa": {"guidance": True, "omega": 1.0, "kappa": 0.5},
}


class Case(NamedTuple):
    """One step to measure."""

    name: str
    config: base.Config
    limit: float  # forwards F in a step (backward = 2F) / the 3F of flow matching
    of: str = ""  # for a variant: name of the base case
    variant: str = ""  # eager | remat | none


def system_config(system: str, size: str, head_depth: int) -> base.Config:
    """Return the config of a system on 32x32x4 ImageNet latents, with a network of a DiT size."""
    config = base.get_config(*NETWORKS[system])
    config.model.update(DIT_SIZES[size], patch_size=4, input_size=32, channels=4, num_classes=1000)
    if system == "improved":
        config.model.update(mlp_ratio=8 / 3, head_depth=head_depth)
    if system == "decoupled":
        config.model.dmf_depth = config.model.depth * 5 // 7  # 20 of 28 in XL
        config.method.update(omega=0.6, guidance_end=0.7, time_mean=(0.4, -1.2))
    if system == "rectified":
        config.method.update(omega_sampler="uniform", omega_max=2.5)
    return config


def override(config: base.Config, settings: Sequence[str]) -> base.Config:
    """Return the config with `OPTION=VALUE` settings.  Raises UserError for an unknown option or an invalid value."""
    config = copy.deepcopy(config)
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals:
            raise UserError(f"--set {setting}: write OPTION=VALUE, such as train.batch_size=32")
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            value = text
        try:
            find(config, name)
            config.update_from_flattened_dict({name: value})
        except (TypeError, UserError) as error:
            raise UserError(f"--set {setting}: {error}") from error
    return config


def meanflow_cases(config: base.Config, shares: Iterable[float], kinds: Sequence[str]) -> Iterator[tuple]:
    """Yield (name, options by dotted name or a config).  First flow matching: only flow rows, no guidance.

    Re-MeanFlow's guidance always needs both forwards; the U-Net is unconditional, so it has no guidance.
    """
    yield FLOW_MATCHING, {"method.flow_fraction": 1.0, "method.flow_rows": "split", "method.guidance": False}
    possible = ("none", "kappa") if config.method.name == "rectified" else ("none", "kappa0", "kappa")
    for p in shares:
        for kind in possible if config.model.name != "unet" else ("none",):
            options = {f"method.{name}": value for name, value in OPTIONS_OF[kind].items()}
            if kind in kinds:
                yield f"p={p:g}, guidance {kind}", options | {"method.flow_fraction": 1 - p}


def improved_cases(config: base.Config, shares: Iterable[float], kinds: Sequence[str]) -> Iterator[tuple]:
    """Yield the same for improved MeanFlow.

    Flow matching is on flow rows only, with a single head, as many blocks as u, no guidance and no JVP.
    """
    one_head = {"model.head_depth": 0, "method.guidance": False}
    yield FLOW_MATCHING, one_head | {"method.flow_fraction": 1.0, "method.flow_rows": "split"}
    for p in shares:
        for kind in ("none", "all"):
            if kind in kinds:
                options = {"method.flow_fraction": 1 - p, "method.guidance": kind == "all"}
                yield f"p={p:g}, guidance {kind}", options


def decoupled_cases(config: base.Config, shares: Iterable[float], kinds: Sequence[str]) -> Iterator[tuple]:
    """Yield the same for decoupled MeanFlow, relative to the flow model it starts from."""
    yield FLOW_MATCHING, base.recompose(config, "dit", "flow")
    for kind, guidance in (("none", "default"), ("all", "mg")):
        if kind in kinds:
            yield f"guidance {kind}", {"method.guidance_type": guidance}


def flow_cases(config: base.Config, shares: Iterable[float], kinds: Sequence[str]) -> Iterator[tuple]:
    """Yield the only case of a flow model."""
    yield FLOW_MATCHING, {}


CASES = {
    "meanflow": meanflow_cases, "rectified": meanflow_cases, "improved": improved_cases, "decoupled": decoupled_cases,
    "flow": flow_cases,
}  # fmt: skip


def check_measurable(config: base.Config) -> None:
    """Raise UserError for a step that needs a teacher."""
    if "guidance_type" in config.method and config.method.guidance_type == "distill":
        raise UserError("a teacher is not measured: leave config.method.guidance_type at mg or default")


def make_cases(
    config: base.Config, shares: Sequence[float], kinds: Sequence[str] = GUIDANCE, variants: Sequence[str] = ()
) -> list[Case]:
    """Return the cases for `config.method.name`, each followed by its variants.

    shares: fractions of rows with r < t; () for the system's default.  variants: eager (PyTorch, not compiled), remat.
    Raises UserError for a config that cannot be trained as it is.
    """
    check_measurable(config)
    changes = {"eager": {"train.compile": False}, "remat": {"train.remat": True}}
    table = []
    for name, options in CASES[config.method.name](config, shares or default_shares(config), kinds):
        made = make_config(config, options)
        case = Case(name, made, flops.forwards(made) / 3)
        table.append(case)
        for variant in variants:
            varied = make_config(case.config, changes[variant])
            table.append(Case(f"{name}, {variant}", varied, case.limit, name, variant))
    return table


def default_shares(config: base.Config) -> tuple[float, ...]:
    """Return the default fractions of rows with r < t."""
    return (0.5,) if config.method.name == "improved" else (0.25,)


def make_config(config: base.Config, options: dict | base.Config) -> base.Config:
    """Return the config with options applied, a single stage and no micro-batches; checked for one device.

    options: {dotted name: value}, or a whole config to use instead.
    """
    config = copy.deepcopy(config if isinstance(options, dict) else options)
    one_stage = {"method.stage1_steps": 0} if "stage1_steps" in config.method else {}
    changes = options if isinstance(options, dict) else {}
    config.update_from_flattened_dict(one_stage | {"train.accumulate": 1, "train.fsdp": 1} | changes)
    checks.check(config)
    checks.check_trainable(config)
    checks.check_divisible(config, config.train.fsdp, "devices")
    return config


def make_batch(config: base.Config) -> dict[str, np.ndarray]:
    """Return a random batch of `config.train.batch_size` rows with every input of the method and the network."""
    c, num, rng = config.model, config.train.batch_size, np.random.default_rng(0)
    shape = (num, c.input_size, c.input_size, c.channels)
    batch = {
        "image": rng.standard_normal(shape, np.float32),
        "label": rng.integers(0, c.num_classes, num).astype(np.int32),
    }
    if config.method.name == "rectified":
        batch["noise"] = rng.standard_normal(shape, np.float32)
    if "augment_dim" in c and c.augment_dim:
        batch["augment"] = rng.standard_normal((num, c.augment_dim), np.float32)
    if "repa_dims" in c and c.repa_dims:
        batch["features"] = rng.standard_normal((num, num_tokens(config), sum(c.repa_dims)), np.float32)
    return batch | draws.of_process(config, step=0)


def num_tokens(config: base.Config) -> int:
    """Return the number of tokens of an image: patches for a transformer, pixels for a U-Net."""
    c = config.model
    return (c.input_size // c.patch_size) ** 2 if "patch_size" in c else c.input_size**2
