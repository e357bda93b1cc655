"""The framework-free half of the sample commands: flags, and images from a trained model.

A sampler is a function (weights, noise [b h w c], labels [b], c, fresh) -> images [b h w c] in data units.  All are
numpy except the weights, which are as its framework holds them.  c: a `config.sample`, from which the sampler reads the
guidance that the network is conditioned on (omega, interval); everything else is fixed when it is made.  fresh: fresh
noise for the steps that add some, [k b h w c]; None for samplers without.
"""

import copy
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from absl import flags, logging
from tqdm import tqdm

from meanflow import files
from meanflow.commands import frozen_networks
from meanflow.commands.frozen_networks import FrozenNetworks
from meanflow.config import checks, options, paths
from meanflow.config.flags import config as config_flag
from meanflow.config.flags import workdir
from meanflow.errors import UserError, naming
from meanflow.process_group import ALONE, ProcessGroup, gather_rows, pack
from meanflow.sampling import grids, saving
from meanflow.sampling import noise as noise_and_labels
from meanflow.weights import reading, times

NUM_SAMPLES = 100  # images that the sample commands generate by default
# Flags that set config.sample.
OPTIONS = (
    "steps", "times", "shift", "sampler", "gamma", "diffusion", "diffusion_scale", "official", "cfg_scale", "omega",
    "interval", "ema", "batch_size", "seed",
)  # fmt: skip
SAMPLERS = ("euler", "restart", "ctm", "velocity", "heun", "sde")  # of flow maps, and of flow models
V_HEADS = "v_heads."  # prefix of the canonical names of the v head's blocks
Sampler = Callable[[Any, np.ndarray, np.ndarray, options.Config, np.ndarray | None], np.ndarray]
Load = Callable[[str | None, str, options.Config | None], tuple[options.Config, Sampler, Any]]

flags.disclaim_key_flags()  # --help lists the flags under the command that defines them


def define_flags() -> None:
    """Define the flags of all commands that sample: those in `OPTIONS` and the number of images."""
    flags.DEFINE_integer(
        "num_samples", None, f"Images; {NUM_SAMPLES}, or config.evaluation.num_samples to evaluate.", lower_bound=1
    )
    flags.DEFINE_integer("steps", None, "Sampling steps; default: config.sample.steps.", lower_bound=1)
    flags.DEFINE_list("times", None, "Times from 1 down to 0, instead of uniform steps, e.g. 1,0.5,0.")
    flags.DEFINE_float("shift", None, "Shift of uniform steps towards noise; 1: none.")
    flags.DEFINE_enum("sampler", None, SAMPLERS, "Sampler; default: config.sample.sampler.")
    flags.DEFINE_float("gamma", None, "Fraction of the noise that the sampler ctm replaces, in [0, 1].")
    flags.DEFINE_enum("diffusion", None, ["sigma", "elbo"], "Diffusion coefficient of the sampler sde.")
    flags.DEFINE_float("diffusion_scale", None, "Factor of that coefficient.")
    flags.DEFINE_bool("official", None, "Reproduce the mistakes of the official samplers; docs/differences.md.")
    flags.DEFINE_float("cfg_scale", None, "Guidance scale at sampling, for models trained without guidance; 1: none.")
    flags.DEFINE_float("omega", None, "Guidance scale the network is conditioned on; improved MeanFlow only.")
    flags.DEFINE_list("interval", None, "Guidance interval in time, e.g. 0.4,0.65.")
    flags.DEFINE_integer("ema", None, "EMA to sample from; -1: the raw parameters.")
    flags.DEFINE_integer("step", None, "Checkpoint or snapshot to read; default: the newest checkpoint.", lower_bound=0)
    flags.DEFINE_integer("batch_size", None, "Images generated at once.", lower_bound=1)
    flags.DEFINE_integer("seed", None, "Seed of noise and labels.", lower_bound=0)
    flags.DEFINE(
        paths.READ, "weights", "", "Instead of --workdir: any weights that parity.convert reads, such as an official "
        "file or hf://OWNER/NAME/FILE, with --config where they do not show it.",
    )  # fmt: skip
    flags.DEFINE(paths.WRITTEN, "output", "", "Directory for what is written; default: that of the run.")
    flags.DEFINE_enum("time", None, times.DIRECTIONS, "How the time of a flow model's --weights runs.")


def define_saving_flags() -> None:
    """Define the flags for what is written besides the grid."""
    flags.DEFINE_enum("save", None, saving.KINDS, "Also write every image: PNG files, or one .npz of uint8.")
    flags.DEFINE(paths.READ, "vae", None, "Autoencoder to decode latents: directory or hub name; empty: do not decode.")


def define_sample_flags() -> None:
    """Define the flags of the sample commands."""
    define_flags()
    define_saving_flags()
    flags.DEFINE_list("labels", [], "Classes to cycle through, e.g. 0,1,2; default: random.")


def sample(load: Load, framework: FrozenNetworks) -> None:
    """Load, generate, decode and write as the command line says, and print the PNG's path.

    load: (work directory, path of weights, config) -> config, sampler, its weights; given either the first or the
    others.  Raises UserError for what cannot be read, sampled or written.
    """
    f = flags.FLAGS
    check_source()
    output, labels = output_directory("samples"), numbers("labels", f.labels, int)
    for name in ("samples.npz", "samples.png"):
        files.check_writable(os.path.join(output, name))
    with naming(f.weights or workdir()):
        config, sampler, weights = load(None if f.weights else workdir(), f.weights, config_flag())
    if labels and config.model.name == "unet":
        raise UserError("--labels: this network is unconditional (config.model.name is unet)")
    decode = frozen_networks.decoder(config, framework)
    if f.save and decode is None and config.model.channels not in (1, 3):
        raise UserError(
            f"--save writes images, but the samples have {config.model.channels} channels: name the autoencoder that "
            "decodes them by --vae or config.latents.vae, with config.latents.scale"
        )
    samples, labels = generate(config, sampler, weights, f.num_samples or NUM_SAMPLES, labels)
    images = samples if decode is None else decode(samples)
    path = write(output, images, labels, None if decode is None else samples)
    if f.save:
        saver = saving.Saver(pathlib.Path(output), f.save)
        saver.add(np.arange(len(images)), grids.to_uint8(images), labels)
        saver.finish(ALONE)
    print(path)


def generate(
    config: options.Config,
    sampler: Sampler,
    weights: Any,
    num_samples: int,
    labels: Sequence[int] = (),
    group: ProcessGroup = ALONE,
) -> tuple[np.ndarray, np.ndarray]:
    """Return `num_samples` images float32 [n h w c] in data units and their labels int32 [n], as numpy.

    Several processes share the work; all but the first get empty arrays.  Arguments and errors as in `batches`.
    """
    assert not group.together, "then each process has all batches: call `batches`"
    parts = batches(config, sampler, weights, num_samples, labels, group)
    rows = gather_rows([{"indices": i, "images": x, "labels": y} for i, x, y in parts], group)
    none = np.empty((0, 1, 1, 1), np.float32), np.empty(0, np.int32)
    return (rows["images"], rows["labels"]) if rows else none


def batches(
    config: options.Config,
    sampler: Sampler,
    weights: Any,
    num_samples: int,
    labels: Sequence[int] = (),
    group: ProcessGroup = ALONE,
    progress: bool = True,
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield the indices [b], images float32 [b h w c] in data units and labels int32 [b] of this process's batches.

    Sample i depends only on (config.sample.seed, i).  The batches are the same for any number of processes, which take
    them in turn or (group.together) each make all of them.  labels: classes to cycle through; drawn at random if empty.
    progress: whether a terminal shows it.  Raises UserError for a label that is not a class.
    """
    c, shape = config.sample, (config.model.input_size, config.model.input_size, config.model.channels)
    check_labels(labels, config.model.num_classes)
    num_fresh, size = noise_and_labels.num_fresh(c), min(c.batch_size, num_samples)
    starts = range(0, num_samples, size)
    if not group.together:
        starts = starts[group.process :: group.num_processes]
    disable = True if group.process or not progress else None  # None: unless stderr is a terminal
    for start in tqdm(starts, "sampling", unit="batch", disable=disable, leave=None):
        indices = np.arange(start, min(start + size, num_samples))
        noise, y, fresh = noise_and_labels.draw(indices, shape, config.model.num_classes, c.seed, num_fresh)
        y = np.asarray(labels, np.int32)[indices % len(labels)] if len(labels) else y
        missing = size - len(indices)  # pad the last batch, so that everything compiles once
        noise, padded = (np.pad(a, [(0, missing)] + [(0, 0)] * (a.ndim - 1)) for a in (noise, y))
        if fresh is not None and missing:
            fresh = np.pad(fresh, [(0, 0), (0, missing)] + [(0, 0)] * len(shape))
        yield indices, sampler(weights, noise, padded, c, fresh)[: len(indices)], y


def check_labels(labels: Sequence[int], num_classes: int) -> None:
    """Raise UserError for a label outside [0, num_classes]; num_classes itself means no class."""
    for label in labels:
        if not 0 <= label <= num_classes:
            raise UserError(f"label {label} is outside the classes 0 to {num_classes - 1} ({num_classes}: no class)")


def override(config: options.Config, without: tuple[str, ...] = ()) -> options.Config:
    """Return a copy of the config with the sampling flags that were given.

    without: names of flags to leave out.  Raises UserError for times or intervals that are not numbers, for --omega if
    the network is not conditioned on guidance, and as `checks.check` does.
    """
    given = {name: flags.FLAGS[name].value for name in OPTIONS if name not in without}
    given = {name: value for name, value in given.items() if value is not None}
    check_told(config, given.keys() & {"omega"})
    for name in given.keys() - set(config.sample):
        flags_of = ", ".join(f"--{option}" for option in OPTIONS if option in config.sample)
        raise UserError(f"--{name}: a model of config.method.name {config.method.name} is sampled by {flags_of}")
    given |= {name: numbers(name, given[name]) for name in ("times", "interval") if name in given}
    if "steps" in given:
        given.setdefault("times", ())
    config = copy.deepcopy(config)
    config.sample.update(given)
    return checks.check(config)


def step() -> int | None:
    """Return --step, the checkpoint of the work directory to read; None for the newest."""
    return flags.FLAGS.step


def check_told(config: options.Config, names: Iterable[str]) -> None:
    """Raise UserError if flags of these names are given for a network that is not conditioned on guidance."""
    names = sorted(names)
    if names and "omega" not in config.sample:
        raise UserError(
            f"--{names[0]} is for networks conditioned on guidance, but config.method.name is "
            f"{config.method.name}: one trained without guidance takes --cfg_scale"
        )


def numbers(flag: str, texts: Iterable[str], kind: type = float) -> tuple:
    """Return the values of the list flag --`flag` as numbers.  Raises UserError if one is not a number."""
    try:
        return tuple(kind(text) for text in texts)
    except ValueError as error:
        raise UserError(f"--{flag}: {error}") from error


def without_v_heads(
    config: options.Config, weights: dict[str, np.ndarray]
) -> tuple[options.Config, dict[str, np.ndarray]]:
    """Return the config and the canonical weights {name: array} of the network to sample from.

    Improved MeanFlow samples without its v head, and released weights lack it: it is removed from both, so that weights
    with and without it load alike.  Other networks are unchanged.
    """
    if config.model.name != "imf_dit":
        return config, weights
    config = copy.deepcopy(config)
    config.model.v_heads = False
    return config, {name: a for name, a in weights.items() if not name.startswith(V_HEADS)}


def check_source() -> None:
    """Raise UserError for flags of a work directory beside --weights, or the other way round."""
    f = flags.FLAGS
    if f.weights:
        return
    if config_flag() is not None:
        raise UserError(
            "--config goes with --weights: a work directory has its own, whose sampling options are set by flags"
        )
    if f.time:
        raise UserError("--time goes with --weights: the time of a run runs our way")


def read_weights(source: str, config: options.Config | None) -> tuple[options.Config, dict[str, np.ndarray]]:
    """Return the config, with the sampling flags that were given, and the canonical weights of --weights.

    config: see `reading.network`, as which it raises UserError, and as `override`.
    """
    f = flags.FLAGS
    found = reading.network(source, config, reading.Choice(ema=f.ema, step=f.step, time=f.time))
    logging.info("%s: %s", source, found.kind)
    return without_v_heads(override(found.config, without=("ema",)), found.weights)


def output_directory(name: str = "") -> str:
    """Return the directory for results, `name` in that of the run.  Raises UserError if no flag names one."""
    if flags.FLAGS.output:
        return flags.FLAGS.output
    if flags.FLAGS.weights and not flags.FLAGS.workdir:
        raise UserError("--output is missing: name a directory for what is written")
    return os.path.join(workdir(), name) if name else workdir()


def write(
    output: str | os.PathLike, images: np.ndarray, labels: np.ndarray, undecoded: np.ndarray | None = None
) -> pathlib.Path:
    """Write samples.npz (images [n h w c], labels [n]) and samples.png into a directory.  Returns the PNG's path.

    undecoded: the latents that the images were decoded from, [n h w c]; written to samples.npz too.
    """
    output = pathlib.Path(output)
    kept = {"images": images, "labels": labels} | ({} if undecoded is None else {"latents": undecoded})
    files.replace_bytes(output / "samples.npz", pack(kept))
    grids.save_png(output / "samples.png", images)
    return output / "samples.png"
