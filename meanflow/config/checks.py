"""Validates configs: their values, whether they can be trained, and that they match the models they build on."""

import copy

from absl import logging

from meanflow.config import division, latents, options, paths
from meanflow.config.methods import METHODS
from meanflow.config.networks import NETWORKS
from meanflow.config.sections import check_values
from meanflow.config.store import flatten
from meanflow.errors import UserError

# Options that must match in the model that a run starts from, and in one that it learns from.
ALIKE = ("model.channels", "method.path")
ALIKE_TEACHER = ("model.input_size", "model.num_classes", *ALIKE)
UNSEEN = ("model.num_heads", "model.head_width", "model.sigma_data")  # not visible in a network's weights


def check(config: options.Config) -> options.Config:
    """Return `config` with `~` expanded in its paths.

    Raises UserError naming the first option that is missing, unknown or invalid.
    """
    if config is None:
        raise UserError("--config is missing: name the file of the run, e.g. --config=configs/digits.py")
    network, method = config.model.name, config.method.name
    check_values(config, options.sections(network, method))
    paths.expand_options(config)
    options.check_start(config)
    options.check_ema(config)
    options.check_sampling(config)
    options.check_evaluation(config)
    NETWORKS[network].check(config)
    METHODS[method].check(config)
    convention = latents.of(config)
    if convention:
        latents.check(convention, config.model.channels)
    return config


def check_trainable(config: options.Config) -> None:
    """Raise UserError if the network can only sample, not train; warn about options with less effect than expected."""
    c, net = config.method, config.model
    if "v_heads" in net and not net.v_heads:
        raise UserError(
            "config.model.v_heads is False: without the head of v, which released weights leave out, a network can "
            "sample but not be trained"
        )
    if "stage1_steps" in c and c.stage1_steps >= config.train.steps:
        logging.warning(
            "all of config.train.steps %d are in the first stage (config.method.stage1_steps %d)",
            config.train.steps, c.stage1_steps,
        )  # fmt: skip
    in_float32 = net.compute_dtype == "float32" and config.train.matmul_precision == "highest"
    if in_float32 and "attention_jvp" in net and net.attention_jvp == "flash":
        logging.warning(
            "config.train.matmul_precision is highest, but the kernel of config.model.attention_jvp flash multiplies "
            "float32 in TF32; --config.model.attention_jvp=plain does not"
        )
    if "logvar_channels" in net and net.logvar_channels:
        raise UserError(
            f"config.model.logvar_channels is {net.logvar_channels}: no method here trains EDM2's "
            "log-variance; set it to 0, and config.train.load_from leaves it out of the weights"
        )


def check_teacher(config: options.Config, teacher: options.Config | None) -> options.Config:
    """Return the config of the frozen flow model that `method.teacher` names.

    teacher: its own config; if None, only its weights are known, and it has the sizes in `config`.
    The teacher runs in this run's precision.  Raises UserError unless it is a flow model with the same images, classes
    and path.
    """
    flow = options.recompose(config, "dit", "flow") if teacher is None else copy.deepcopy(teacher)
    of = config.method.teacher
    if flow.method.name != "flow":
        raise UserError(f"config.method.teacher {of} has config.method.name {flow.method.name}, not flow")
    check_alike(config, flow, "method.teacher", ALIKE_TEACHER)
    flow.model.update(attention=config.model.attention, compute_dtype=config.model.compute_dtype)
    return flow


def check_alike(config: options.Config, other: options.Config | None, key: str, names: tuple[str, ...] = ()) -> None:
    """Raise UserError if the model named by option `key` differs in options that its weights do not reveal.

    other: its config; if None, only its weights are known.  names: dotted options to compare where both models have
    them; by default `ALIKE` and `UNSEEN`.
    """
    theirs, ours = flatten(other or config), flatten(config)
    for name in names or ALIKE + UNSEEN:
        if name in theirs and name in ours and theirs[name] != ours[name]:
            raise UserError(
                f"config.{key} {ours[key]} has config.{name} {theirs[name]}, this model {ours[name]}: they must agree"
            )


def check_divisible(config: options.Config, devices: int, kind: str) -> None:
    """Raise UserError unless a batch can be divided among the devices.  kind: what messages call devices."""
    division.check(config, devices, kind)
    fsdp = config.train.fsdp
    if devices % fsdp:
        fit = " or ".join(str(n) for n in range(1, devices + 1) if devices % n == 0)
        raise UserError(f"config.train.fsdp {fsdp} does not divide the {devices} {kind}: set it to {fit}")
