"""The framework-free half of the reflow commands: flags, checks of teacher and guide, and the couplings."""

import os
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from absl import flags, logging
from ml_collections import config_flags

from meanflow.commands import snapshots
from meanflow.config import checks, latents, options, paths, store
from meanflow.config.flags import config as config_flag
from meanflow.config.workdir import read_workdir
from meanflow.data import couplings, digests, records, sources
from meanflow.errors import UserError
from meanflow.sampling import edm
from meanflow.weights import hub, reading, times

SEED = 1  # differs from config.sample.seed, or a student would be evaluated on the noise of its own couplings
EDM2_SIGMA_MAX = 80.0  # the largest noise level its networks are conditioned on
ALIKE = ("model.input_size", "model.channels", "model.num_classes")  # equal in teacher and guide

flags.disclaim_key_flags()  # --help lists the flags under the command that defines them


class Model(NamedTuple):
    """A flow model."""

    config: options.Config
    weights: dict[str, np.ndarray] | None  # canonical; None until a run's are read
    published: bool = False  # whether nothing gave the config, see `reading.Network`


Start = Callable[[options.Config], tuple[int, int]]
ReadRun = Callable[[str, int, int | None], tuple[options.Config, dict[str, np.ndarray]]]
MakeCoupler = Callable[[list[tuple], tuple[float, ...], float], couplings.Coupler]


def define_flags() -> None:
    """Define the flags of the reflow commands, except --config."""
    define_teacher_flags()
    flags.DEFINE(paths.READ, "guide", "", "A weaker flow model to guide away from (autoguidance), with --guidance.")
    config_flags.DEFINE_config_file("guide_config", None, "Config of --guide if that is no work directory.")
    flags.DEFINE_float("guidance", 1.0, "Guidance scale, away from no class or, if given, --guide; 1: none.")
    flags.DEFINE(paths.WRITTEN, "output", "", "Directory of the dataset; an unfinished one is continued.")
    flags.DEFINE_enum("labels", "random", ["random", "dataset"], "Random labels, or those of the teacher's dataset.")
    flags.DEFINE_integer("num_samples", None, "Number of pairs, with --labels=random.", lower_bound=1)
    flags.DEFINE_integer("num_passes", None, "Passes through the data of --labels=dataset; default: 1.", lower_bound=1)
    flags.DEFINE_integer("steps", 32, "Sampler steps, two evaluations each except the last.", lower_bound=1)
    flags.DEFINE_float("sigma_min", 0.002, "Smallest noise level before 0.")
    flags.DEFINE_float("sigma_max", 80.0, "Initial noise level.")
    flags.DEFINE_float("rho", 7.0, "Noise levels are uniform in sigma^(1/rho).")
    flags.DEFINE_float("distance_clip", 0.0, "Keep pairs with mean squared distance below this; 0: all.", lower_bound=0)
    flags.DEFINE_integer("batch_size", 128, "Pairs that a process makes at once.", lower_bound=1)
    flags.DEFINE_integer(
        "shard_size", couplings.SHARD_SIZE, "Pairs per file; if killed, each process redoes one.", lower_bound=1
    )
    flags.DEFINE_integer("seed", SEED, "Seed of noise and random labels; differs from that of sampling.", lower_bound=0)


def define_teacher_flags() -> None:
    """Define the flags that name a flow model."""
    flags.DEFINE(
        paths.READ, "teacher", "", "Flow model: a work directory, or any weights that parity.convert reads, such as an "
        "official file or hf://OWNER/NAME/FILE, with --config where they do not show it.",
    )  # fmt: skip
    flags.DEFINE_integer("ema", None, "EMA of --teacher; -1: raw parameters; default: config.sample.ema, or the first.")
    flags.DEFINE_integer("step", None, "Checkpoint of a directory; default: newest.", lower_bound=0)
    flags.DEFINE_enum("time", None, times.DIRECTIONS, "How the time of a --teacher that is no work directory runs.")


def reflow(start: Start, read_run: ReadRun, make_coupler: MakeCoupler) -> None:
    """Make the couplings that the command line asks for, and print their directory.

    start: (config) -> (index of this process, number of processes).  read_run: (work directory, EMA, step) -> config
    and canonical weights; called after `start`.
    make_coupler: (models, noise levels, guidance) -> coupler, see `couplings.make`; the models are (config, canonical
    weights) of the teacher and, optionally, its guide.  Raises UserError for what cannot be read, made or written.
    """
    f = flags.FLAGS
    if not f.output:
        raise UserError("--output is missing: name the directory of the couplings")
    schedule = edm.Schedule(f.steps, f.sigma_min, f.sigma_max, f.rho)
    sigmas = edm.noise_levels(schedule)
    models = read_models()
    configs = [model.config for model in models]
    if f.sigma_max > EDM2_SIGMA_MAX and any(config.model.name == "edm2" for config in configs):
        raise UserError(f"--sigma_max is {f.sigma_max}; EDM2 networks know no noise above {EDM2_SIGMA_MAX:g}")
    process, num_processes = start(configs[0])
    plan = make_plan(models[0])
    models = [
        with_weights(model, path, step, read_run)
        for model, path, step in zip(models, (f.teacher, f.guide), (f.step, None), strict=False)
    ]
    coupler = make_coupler([model[:2] for model in models], sigmas, f.guidance)
    settings = {"guidance": f.guidance, **schedule._asdict(), "labels": f.labels}
    if f.labels == "dataset":
        settings |= {"dataset": configs[0].data.name, "split": configs[0].data.split}
    for name, model in zip(("teacher", "guide"), models, strict=False):
        settings |= {
            f"{name}.weights": digests.of_weights(model.weights or {}),
            **store.flatten(model.config.model, f"{name}.model."),
        }
    metadata: dict[str, Any] = {"teacher": whole_path(f.teacher), "guide": f.guide and whole_path(f.guide)}
    convention = latents.of(configs[0])
    if convention:  # the couplings have that of the teacher's data
        metadata |= {"convention": latents.to_dict(convention), "vae": configs[0].latents.vae}
    missing = couplings.make(pathlib.Path(f.output), plan, coupler, settings, metadata, process, num_processes)
    records.announce(f.output, missing)


def whole_path(source: str) -> str:
    return source if hub.is_address(source) else os.path.abspath(source)


def with_weights(model: Model, path: str, step: int | None, read_run: ReadRun) -> Model:
    """Return the model with its weights.  Raises UserError as `read_run`."""
    if model.weights is not None:
        return model
    return model._replace(weights=read_run(path, model.config.sample.ema, step)[1])


def read_models() -> list[Model]:
    """Return --teacher and, if given, --guide.

    Raises UserError for contradictory flags, and unless both are flow models on the linear path with the same image
    size, channels and classes.
    """
    f = flags.FLAGS
    if f.workdir:
        raise UserError("--workdir is for training and sampling: name the flow model by --teacher")
    if not f.teacher:
        raise UserError("--teacher is missing: name the work directory of a flow model, or its weights")
    if f.guide and f.guidance == 1:
        raise UserError("--guide has no effect with --guidance=1: set the scale")
    if f.guide_config is not None and not f.guide:
        raise UserError("--guide_config is the config of a --guide, which is missing")
    teacher = read_model("teacher", f.teacher, "config", config_flag(), reading.Choice(f.ema, "", f.step, f.time))
    if not f.guide:
        return [teacher]
    guide = read_model("guide", f.guide, "guide_config", f.guide_config)
    ours, theirs = store.flatten(teacher.config), store.flatten(guide.config)
    for name in ALIKE:
        if ours[name] != theirs[name]:
            raise UserError(
                f"--guide {f.guide} has config.{name} {theirs[name]}, --teacher {ours[name]}: they must be equal"
            )
    if (ours["model.compute_dtype"] == "float64") != (theirs["model.compute_dtype"] == "float64"):
        raise UserError(
            f"--guide {f.guide} has config.model.compute_dtype {theirs['model.compute_dtype']}, --teacher "
            f"{ours['model.compute_dtype']}: either both or neither must compute in float64"
        )
    return [teacher, guide]


def read_model(flag: str, source: str, of_config: str, config: Any, choice: reading.Choice = reading.FIRST) -> Model:
    """Return the flow model that --`flag` names, a work directory without its weights.

    of_config: the flag that gives `config`.  Raises UserError as `reading.network`, and for a model that makes no
    couplings.
    """
    if os.path.isdir(source) and "distributed" in flags.FLAGS and flags.FLAGS.distributed:  # JAX's flag
        raise UserError(
            f"--{flag} {source} is a directory, which --distributed processes cannot read independently: convert it to "
            "a .safetensors with python -m parity.convert, and name that"
        )
    if snapshots.is_run(source):
        if config is not None or choice.time is not None:
            option = "time" if config is None else of_config
            raise UserError(f"--{option} goes with other weights: --{flag} {source} is a work directory, with its own")
        config = read_workdir(source)
        config.sample.ema = config.sample.ema if choice.ema is None else choice.ema
        model = Model(checks.check(config), None)
    else:
        found = reading.network(source, config, choice)
        logging.info("%s: %s", source, found.kind)
        model = Model(found.config, found.weights, found.published)
    method: Any = model.config.method
    if method.name != "flow":
        raise UserError(f"--{flag} {source} has config.method.name {method.name}: couplings need a flow model")
    if method.path != "linear":
        raise UserError(f"--{flag} {source} has config.method.path {method.path}: couplings need the linear path")
    return model


def make_plan(teacher: Model) -> couplings.Plan:
    """Return the plan that the flags describe.  Raises UserError for contradictory flags."""
    f, config, c, labels = flags.FLAGS, teacher.config, teacher.config.model, None
    if (f.num_samples if f.labels == "dataset" else f.num_passes) is not None:
        other = {"dataset": "num_samples goes with --labels=random", "random": "num_passes goes with --labels=dataset"}
        raise UserError(f"--{other[f.labels]}, not with --labels={f.labels}")
    if f.labels == "dataset":
        if teacher.published:
            raise UserError(
                f"--labels=dataset: --teacher {f.teacher} does not say what data it has seen: give --config"
            )
        labels = sources.open_labels(config.data.name, config.data.split, config.data.dir)
        num_samples = (f.num_passes or 1) * len(labels)
    elif f.num_samples is None:
        raise UserError("--num_samples is missing: say how many pairs to make")
    else:
        num_samples = f.num_samples
    return couplings.Plan(
        (c.input_size, c.input_size, c.channels), num_samples, c.num_classes, f.seed, labels, f.distance_clip,
        f.shard_size, f.batch_size,
    )  # fmt: skip
