"""Cost of sampling: a flow map in a few steps versus a flow model of the same network in many steps, with guidance too.

    python benchmarks/sample.py --framework=jax
    python benchmarks/sample.py --framework=torch --size=B --steps 1 2 4 --flow_steps=50 --batch=16 --json sample.json
    python benchmarks/sample.py --framework=torch --config=configs/imf_imagenet.py:b2

Runs the trainers' samplers with random weights, from noise to images on the host; samplers take turns, and figures are
medians.  Networks that cannot be flow models (improved MeanFlow's and the U-Net) follow u(z, t, t) instead, which takes
the same number of forwards.
"""

import argparse
import copy
import importlib
import statistics
import time

import numpy as np
from tqdm import tqdm

from benchmarks import table
from benchmarks.step import add_common, describe, make_config
from meanflow.config import checks, options
from meanflow.errors import exit_on_user_error

COLUMNS = {
    "sampler": ("case", "{}"),
    "steps": ("steps", "{}"),
    "forwards": ("forwards", "{}"),
    "median s": ("median_s", "{:.4g}"),
    "images/s": ("images_per_s", "{:.4g}"),
    "s a forward": ("s_per_forward", "{:.4g}"),
    "over one step": ("ratio", "{:.2f}"),
}


def flow_model(config):
    """Return the config of a flow model of the same network, or of a flow map that follows u(z, t, t)."""
    if config.model.name not in ("unet", "imf_dit"):
        return options.recompose(config, "edm2" if config.model.name == "edm2" else "dit", "flow")
    config = copy.deepcopy(config)
    config.sample.sampler = "velocity"
    return config


def make_table(config, steps, flow_steps, scale):
    """Return [(name, config, forwards per image)]."""
    config = copy.deepcopy(config)
    config.sample.update(sampler="euler", times=())
    if config.model.name == "imf_dit":
        config.model.v_heads = False  # sampling does not use the head of v
    flow, entries = flow_model(config), []
    if config.method.name != "flow":
        entries += [("flow map", config, num, 1.0) for num in steps]
    entries.append(("flow model", flow, flow_steps, 1.0))
    if config.model.name not in ("unet", "imf_dit"):  # unet has no classes; imf_dit is conditioned on guidance
        entries.append((f"flow model, guided by {scale:g}", flow, flow_steps, scale))
    found = []
    for name, c, num, cfg_scale in entries:
        c = copy.deepcopy(c)
        c.sample.update(steps=num, interval=(0.0, 1.0))
        if "cfg_scale" in c.sample:
            c.sample.cfg_scale = cfg_scale
        found.append((name, checks.check(c), num * (1 if cfg_scale == 1 else 2)))
    return found


def measure(args, config):
    """Return one row per sampler."""
    steps = importlib.import_module(f"benchmarks.{args.framework}_steps")
    steps.start(config)
    c, rng = config.model, np.random.default_rng(0)
    noise = rng.standard_normal((args.batch, c.input_size, c.input_size, c.channels), np.float32)
    labels = rng.integers(0, c.num_classes, args.batch).astype(np.int32)
    entries = make_table(config, args.steps, args.flow_steps, args.cfg_scale)
    runs = [steps.sampling(case, noise, labels) for _, case, _ in entries]
    for run in tqdm(runs, "compiling"):
        run()
    seconds = [[] for _ in runs]
    for _ in tqdm(range(args.runs), "measuring"):
        for run, times in zip(runs, seconds, strict=True):
            began = time.perf_counter()
            run()
            times.append(time.perf_counter() - began)
    rows = []
    for (name, case, forwards), times in zip(entries, seconds, strict=True):
        median = statistics.median(times)
        row = {"case": name, "steps": case.sample.steps, "forwards": forwards, "median_s": median}
        row |= {"images_per_s": args.batch / median, "s_per_forward": median / forwards}
        row["ratio"] = statistics.median(a / b for a, b in zip(times, seconds[0], strict=True))
        rows.append(row | {"batch": args.batch, "framework": args.framework, "device": steps.device()[1]})
    return rows


def main(argv=None):
    """Parse the command line, measure, print and write.  Raises UserError for a wrong flag."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common(parser)
    parser.set_defaults(runs=5)  # each takes many forwards
    parser.add_argument("--steps", type=int, nargs="+", default=(1, 2, 4), help="steps of the flow map")
    parser.add_argument("--flow_steps", type=int, default=50, help="steps of the flow model")
    parser.add_argument("--cfg_scale", type=float, default=1.5, help="guidance scale of the flow model")
    args = parser.parse_args(argv)
    config = make_config(args, args.batch, args.patch)
    table.write(measure(args, config), describe(args, config), args, COLUMNS)


if __name__ == "__main__":
    with exit_on_user_error():
        main()
