"""The evaluate commands: one evaluation of a model, or one for each guidance setting of a sweep."""

import copy
import functools
import json
import os
import pathlib
from collections.abc import Callable

import numpy as np
from absl import flags, logging

from meanflow import files
from meanflow.commands import data_metrics, evaluate_images, guidance_sweep, image_metrics
from meanflow.commands import sample as sampling
from meanflow.commands.frozen_networks import FrozenNetworks
from meanflow.config import checks, options, paths
from meanflow.config.flags import config as config_flag
from meanflow.config.flags import workdir
from meanflow.config.workdir import read_workdir
from meanflow.errors import UserError
from meanflow.process_group import ProcessGroup
from meanflow.sampling import grids

JSON_NAME, PAGE_NAME = "sweep.json", "sweep.html"
GRID_NAME, GRID_SAMPLES = "evaluation.png", 64
SAVED = "evaluation"  # directory of --save, in the work directory
OPTIONS = ("num_samples", "metrics", "reference", "inception", "convention", "dino")  # flags that set config.evaluation
Start = Callable[[options.Config], ProcessGroup]

flags.disclaim_key_flags()  # --help lists the flags under the command that defines them


def define_flags() -> None:
    """Define the flags of the evaluate commands."""
    sampling.define_flags()
    sampling.define_saving_flags()
    flags.DEFINE_list("metrics", None, "Image metrics: fid, is, kid, pr, fd_dinov2; default: evaluation.metrics.")
    flags.DEFINE(paths.READ, "reference", None, "Statistics of real images: an .npz with mu and sigma, or EDM2's .pkl.")
    flags.DEFINE(paths.READ, "inception", None, "Inception's weights: a .safetensors from python -m parity.convert.")
    flags.DEFINE_enum("convention", None, options.CONVENTIONS, "Preprocessing for Inception.")
    flags.DEFINE(paths.READ, "dino", None, "DINOv2 for fd_dinov2: a directory, or a name on the Hugging Face hub.")
    flags.DEFINE_list("omegas", None, "Guidance scales to evaluate, each with each of --intervals, e.g. 1,2,4,8.")
    flags.DEFINE_list("intervals", None, "Guidance intervals to evaluate, each start:end, e.g. 0:1,0.4:0.65.")
    evaluate_images.define_flags()


def evaluate(load: sampling.Load, framework: FrozenNetworks, start: Start) -> None:
    """Evaluate as the command line says, once or for every pair of --omegas and --intervals; print and write results.

    load: see `sampling.sample`.  start: config -> the process group, called before anything is computed.
    If the directory turns out not to be writable before sampling, results are only printed.
    Raises UserError for what cannot be read or sampled, and, after printing the results, if writing them fails.
    """
    without_model = {"make_reference": evaluate_images.make_reference, "samples": evaluate_images.evaluate_samples}
    for flag, run in without_model.items():
        if flags.FLAGS[flag].value:
            run(framework, start, overridden(options.get_config()))
            return
    sampling.check_source()
    source = flags.FLAGS.weights
    output = sampling.output_directory() if source else flags.FLAGS.output or workdir()
    if source:
        group = start(config_flag() or options.get_config())
        config, sampler, weights = load(None, source, config_flag())
    else:
        group = start(read_workdir(workdir()))
        config, sampler, weights = load(workdir(), "", None)
    config = overridden(config)
    configs = guided(config)
    if configs and flags.FLAGS.save:
        raise UserError("--save keeps the images of a single guidance setting: choose it by --omega and --interval")
    measure = make_measure(config, framework, group, pathlib.Path(output))
    writable = not group.process and is_writable(output)
    if configs:
        rows, images = guidance_sweep.sweep(configs, lambda config: measure(config, sampler, weights))
        if not group.process:
            print(guidance_sweep.table(rows))
            print("\n".join(guidance_sweep.best_lines(rows)), flush=True)
        if writable:
            print(write(output, config, rows, images))
        return
    result, images = measure(config, sampler, weights)
    if not group.process:
        result |= image_metrics.provenance(config.evaluation)
        print(json.dumps(result), flush=True)  # before it is written, which may fail
    if writable:
        data_metrics.write_evaluation(output, result)
        grids.save_png(pathlib.Path(output) / GRID_NAME, images[:GRID_SAMPLES])
    if not group.process and isinstance(measure, image_metrics.ImageMetrics) and measure.unsaved:
        raise measure.unsaved


def is_writable(path: str) -> bool:
    """Return whether results can be written to a directory; otherwise log that they are only printed."""
    try:
        files.check_writable(pathlib.Path(path) / data_metrics.FILE_NAME)
    except UserError as error:
        logging.warning("%s  Results are printed but not written", error)
        return False
    return True


def overridden(config: options.Config) -> options.Config:
    """Return a copy of the config with the evaluation flags that were given.  Raises UserError as `checks.check`."""
    given = {name: flags.FLAGS[name].value for name in OPTIONS}
    given = {name: value for name, value in given.items() if value is not None}
    given |= {"metrics": tuple(given["metrics"])} if "metrics" in given else {}
    config = copy.deepcopy(config)
    config.evaluation.update(given)
    if not flags.FLAGS.make_reference:
        checks.check(config)
    return config


def make_measure(
    config: options.Config, framework: FrozenNetworks, group: ProcessGroup, output: pathlib.Path
) -> Callable:
    """Return the function (config, sampler, weights) -> ({metric: value}, samples [n h w c]).

    output: the directory for --save.
    """
    if config.evaluation.metrics:
        return image_metrics.ImageMetrics(config, framework, group, output / SAVED, flags.FLAGS.save)
    if flags.FLAGS.save:
        raise UserError("--save needs --metrics here; the sample command saves images without metrics")
    real = data_metrics.load_real(config)
    data_metrics.check_real(config, real)
    return functools.partial(data_metrics.evaluate, real=real, group=group)


def guided(config: options.Config) -> list[options.Config]:
    """Return copies of the config for all pairs of --omegas and --intervals, interval by interval.

    A flag that is not given takes the config's value; without either the list is empty.
    Raises UserError for invalid values, and for a network that is not conditioned on guidance.
    """
    f = flags.FLAGS
    given = [name for name in ("omegas", "intervals") if f[name].value is not None]
    sampling.check_told(config, given)
    for name in given:
        if not f[name].value or f[name.removesuffix("s")].value is not None:
            raise UserError(f"--{name} needs at least one value and excludes --{name.removesuffix('s')}")
    if not given:
        return []
    omegas, intervals = (config.sample.omega,), (config.sample.interval,)
    if "omegas" in given:
        omegas = sampling.numbers("omegas", f.omegas)
    if "intervals" in given:
        intervals = [sampling.numbers("intervals", text.split(":")) for text in f.intervals]
        if any(len(interval) != 2 for interval in intervals):
            raise UserError(f"--intervals takes start:end each, e.g. 0:1,0.4:0.65, not {','.join(f.intervals)}")
    configs = []
    for interval, omega in dict.fromkeys((i, o) for i in intervals for o in omegas):
        configs.append(copy.deepcopy(config))
        configs[-1].sample.update(omega=omega, interval=interval)
        checks.check(configs[-1])
    return configs


def write(
    workdir: str | os.PathLike, config: options.Config, rows: list[guidance_sweep.Row], images: dict[float, np.ndarray]
) -> pathlib.Path:
    """Write the rows to sweep.json and a page to sweep.html, each atomically.  Returns the page's path.

    Raises UserError if they cannot be written.
    """
    from meanflow.commands import guidance_sweep_page  # matplotlib takes a second to import

    path = pathlib.Path(workdir)
    files.replace_text(path / JSON_NAME, json.dumps(rows, indent=2) + "\n")
    files.replace_text(path / PAGE_NAME, guidance_sweep_page.html(config, rows, images))
    return path / PAGE_NAME
