"""Checks a config, and keeps it in the work directory as text."""

import copy
import inspect
import os
import pathlib
import runpy

from absl import logging

from meanflow.config import division, latents, locks, options, paths, rules
from meanflow.config.store import flatten, from_json, read_content, read_file, to_json  # noqa: F401  for others, too
from meanflow.errors import UserError

# A run may be resumed with other values of these options, and of whole sections.
FREE = {
    "name", "sample", "evaluation", "latents.vae",  # what is reported, and how finished weights are used
    "train.log_every", "train.sample_every", "train.evaluate_every",
    "train.checkpoint_every", "train.keep_checkpoints", "train.keep_every", "train.checkpoint_at_start",
    "train.snapshot_every",  # what is kept
    "train.steps", "train.schedule_steps",  # how far it goes; `schedule_length` sees to the rates of steps done
    "data.dir", "data.name", "data.encoder", "method.teacher",  # where things are; `contents` sees to what they hold
    "data.num_workers", "data.prefetch", "train.num_threads", "train.accumulate", "train.fsdp",  # how it is divided
    "train.remat", "train.compile", "train.compile_backend", "model.attention", "model.attention_jvp",  # how rounded
    "train.load_from",  # read before the first checkpoint only
}  # fmt: skip
CONTENTS = ("data.name", "data.encoder", "method.teacher")  # compared by what they hold, if that was stored
# What a model and one that it starts or learns from have in common.
ALIKE = ("model.input_size", "model.channels", "model.num_classes", "method.path")
FILE_NAME = "config.json"
FRAMEWORKS = {"jax": "JAX", "torch": "PyTorch"}


def check(config: options.Config) -> options.Config:
    """Return `config`, the `~` of its paths expanded.

    Raises UserError naming the first option that is missing, unknown or has no sense.
    """
    if config is None:
        raise UserError("--config is missing: name the file of the run, e.g. --config=configs/digits.py")
    flat, known = flatten(config), flatten(options.get_config())
    for key in flat.keys() ^ known.keys():
        raise UserError(
            f"config.{key} is {'unknown' if key in flat else 'missing'}; meanflow/config/options.py lists the options"
        )
    paths.expand_options(config)
    rules.check_values(flat)
    rules.NETWORK_CHECKS[config.model.name](config)
    rules.check_method(config)
    rules.check_sampling(config)
    rules.check_evaluation(config)
    convention = latents.of(config)
    if convention:
        latents.check(convention, config.model.channels)
    decays = config.train.ema_decays
    if not decays or not all(rules.is_number(d) and 0 <= d < 1 for d in decays):
        raise UserError(f"config.train.ema_decays is {decays}; name at least one decay in [0, 1)")
    if not -1 <= config.sample.ema < len(config.train.ema_decays):
        raise UserError(f"config.sample.ema is {config.sample.ema}, but there are {len(config.train.ema_decays)} EMAs")
    return config


def check_trainable(config: options.Config) -> None:
    """Raise UserError if the network lacks what only training needs; warn of options that are less than they say."""
    if config.model.name == "imf_dit" and not config.model.v_heads:
        raise UserError(
            "config.model.v_heads is False: without the head of v, which released weights leave out, a network can "
            "sample but not be trained"
        )
    c = config.method
    if c.name == "rectified" and c.stage1_steps >= config.train.steps:
        logging.warning(
            "all of config.train.steps %d are in the first stage (config.method.stage1_steps %d)",
            config.train.steps, c.stage1_steps,
        )  # fmt: skip
    net = config.model
    flash = net.name in ("dit", "imf_dit", "dmf_dit") and net.attention_jvp == "flash"
    if flash and net.compute_dtype == "float32" and config.train.matmul_precision == "highest":
        logging.warning(
            "config.train.matmul_precision is highest, but the kernel of config.model.attention_jvp flash multiplies "
            "float32 in TF32; --config.model.attention_jvp=plain does not"
        )
    if config.model.name == "edm2" and config.model.logvar_channels:
        raise UserError(
            f"config.model.logvar_channels is {config.model.logvar_channels}: no method here trains EDM2's "
            "log-variance; set it to 0, and config.train.load_from leaves it out of the weights"
        )


def check_teacher(config: options.Config, teacher: options.Config | None) -> options.Config:
    """Return the config of the frozen flow model that `method.teacher` names; None: one of the sizes of `config`.

    It computes as this run does, whatever it was trained in.  Raises UserError if it is no flow model, or one of other
    images, classes or another path.
    """
    flow, of = copy.deepcopy(config if teacher is None else teacher), config.method.teacher
    if teacher is None:
        flow.model.update(name="dit", interval_embedder=False, repa_dims=())
        flow.method.name = "flow"
    if flow.method.name != "flow":
        raise UserError(f"config.method.teacher {of} is of config.method.name {flow.method.name}, not flow")
    check_alike(config, flow, "method.teacher", ALIKE)
    flow.model.update(attention=config.model.attention, compute_dtype=config.model.compute_dtype)
    return flow


def check_alike(config: options.Config, other: options.Config | None, key: str, names: tuple[str, ...] = ()) -> None:
    """Raise UserError if the model that the option `key` names differs in what its weights do not show.

    other: its config, None if only its weights are known.  names: dotted options; by default those of `ALIKE`, and
    `num_heads` of transformers, head width and preconditioning of EDM2's network.
    """
    heads = {"unet": (), "edm2": ("model.head_width", "model.sigma_data")}.get(config.model.name, ("model.num_heads",))
    theirs, ours = flatten(other or config), flatten(config)
    for name in names or ALIKE + heads:
        if theirs[name] != ours[name]:
            raise UserError(
                f"config.{key} {ours[key]} has config.{name} {theirs[name]}, this model {ours[name]}: they must agree"
            )


def check_divisible(config: options.Config, devices: int, kind: str) -> None:
    """Raise UserError unless a batch can be divided among the devices: kind is what the message calls them."""
    division.check(config, devices, kind)
    fsdp = config.train.fsdp
    if devices % fsdp:
        fit = " or ".join(str(n) for n in range(1, devices + 1) if devices % n == 0)
        raise UserError(f"config.train.fsdp {fsdp} does not divide the {devices} {kind}: set it to {fit}")


def load_file(name: str) -> options.Config:
    """Return the config of FILE.py[:variant], or of a work directory's config.json.

    Raises UserError if there is no such file or variant.
    """
    file, _, variant = paths.expand(name).partition(":")
    path = pathlib.Path(file)
    if not path.is_file():
        raise UserError(f"there is no config file {path}; configs/digits.py is one that is")
    if path.suffix not in (".py", ".json"):
        raise UserError(f"--config {path} is neither a .py nor a .json file")
    try:
        get_config = runpy.run_path(file).get("get_config") if path.suffix == ".py" else None
    except SyntaxError as error:
        raise UserError(f"{error.filename}, line {error.lineno}: {error.msg}") from error
    if path.suffix == ".py" and get_config is None:
        raise UserError(f"--config {path} defines no get_config(); configs/digits.py shows how a config looks")
    if variant and (get_config is None or not inspect.signature(get_config).parameters):
        raise UserError(f"--config {name}: {path.name} has no variants, so leave out :{variant}")
    if get_config is None:
        return read_file(path)
    try:
        return get_config(variant) if variant else get_config()
    except ValueError as error:
        raise UserError(f"--config {name}: {error}") from error


def open_workdir(
    workdir: str | os.PathLike, config: options.Config, framework: str, contents: dict[str, str] | None = None
) -> locks.Lock:
    """Make the work directory of a run, write its config there and return the lock on it: close it when the run ends.

    framework: `jax` or `torch`, the writer of its checkpoints.  contents: {option: digest} of what `CONTENTS` hold.
    A run that is there already goes on if its config is the same but for what may change (`FREE`), and its paths hold
    what they held.  Raises UserError naming what differs, if another run uses the directory or it is one of the other
    framework, or if it cannot be written.
    """
    path, contents = pathlib.Path(workdir) / FILE_NAME, contents or {}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = locks.Lock(path.parent)
        try:
            check_workdir(workdir, config, framework)
            if path.exists():
                _check_contents(workdir, config, contents)
                contents = read_content(path) | contents
            unfinished = path.with_suffix(f".{os.getpid()}")
            with open(unfinished, "w", encoding="utf-8") as file:
                file.write(to_json(config, contents))
                file.flush()
                os.fsync(file.fileno())  # else a power loss may leave an empty file
            unfinished.replace(path)
        except BaseException:
            lock.close()
            raise
    except OSError as error:
        raise UserError(f"cannot write {path.parent}: {error.strerror}.  Choose another --workdir") from error
    return lock


def check_workdir(workdir: str | os.PathLike, config: options.Config, framework: str, alone: bool = False) -> None:
    """Raise UserError unless the run of a work directory, if there is one, can go on with `config`; write nothing.

    alone: this process is a whole run, so whatever process holds the lock of the directory is of another.
    """
    path = pathlib.Path(workdir) / FILE_NAME
    if alone and (path.parent / locks.FILE_NAME).exists():
        locks.Lock(path.parent).close()
    for other in FRAMEWORKS.keys() - {framework}:
        if (path.parent / "checkpoints" / other).is_dir():
            raise UserError(
                f"{workdir} is the work directory of a run in {FRAMEWORKS[other]}, this is {FRAMEWORKS[framework]}.  "
                "Choose another --workdir; parity/convert.py carries weights over"
            )
    if not path.exists():
        return
    there = read_workdir(workdir)
    old, new = flatten(there), flatten(config)
    differing = [key for key in new if new[key] != old[key] and not {key, key.split(".")[0]} & FREE]
    if differing:
        shown = ", ".join(f"{key} ({old[key]!r} there, {new[key]!r} here)" for key in differing)
        raise UserError(
            f"{workdir} was written by another config: {shown}.  Set them back, or choose another --workdir"
        )
    lengths = schedule_length(there), schedule_length(config)
    if lengths[0] != lengths[1]:
        raise UserError(
            f"{workdir} has a cosine schedule of {lengths[0]} steps, and this config one of {lengths[1]}, under which "
            f"the steps done would have had other learning rates.  To go on at its last rate, set "
            f"--config.train.schedule_steps={lengths[0]}; for another schedule, choose another --workdir and "
            "--config.train.load_from"
        )
    if old["train.load_from"] != new["train.load_from"]:
        logging.info("config.train.load_from %r: a run with a checkpoint goes on from that", new["train.load_from"])


def schedule_length(config: options.Config) -> int | None:
    """Return the steps that the schedule of the learning rate spans; None for one that does not depend on them."""
    c = config.train
    return None if c.schedule == "constant" else c.schedule_steps or c.steps


def _check_contents(workdir: str | os.PathLike, config: options.Config, contents: dict[str, str]) -> None:
    """Raise UserError if a path of the config holds something else than that of the run that is there."""
    path = pathlib.Path(workdir) / FILE_NAME
    stored, old, new = read_content(path), flatten(read_file(path)), flatten(config)
    for key in CONTENTS:
        known = key in stored and key in contents  # else the run is from before digests were stored
        differs = stored[key] != contents[key] if known else old[key] != new[key]
        if differs:
            moved = f"{new[key]!r}, and that" if old[key] != new[key] else "the same path, which by now"
            raise UserError(
                f"{workdir} is of config.{key} {old[key]!r}; this config names {moved} holds something else.  Set it "
                "back, or choose another --workdir"
            )


def read_workdir(workdir: str | os.PathLike) -> options.Config:
    """Return the config that a run left in its work directory.  Raises UserError if there is none."""
    path = pathlib.Path(workdir) / FILE_NAME
    if not path.exists():
        raise UserError(
            f"{workdir} is not the work directory of a run: there is no {path}.  If it holds other weights, "
            "parity/convert.py reads them"
        )
    return read_file(path)
