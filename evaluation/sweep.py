"""Judges one model under many guidances: the evaluate commands, and their table and page of a sweep.

A row is {"omega": scale, "interval": (start, end), metric: value, ...}, the metrics as of `report.evaluate_samples`.
"""

import copy
import json
import os
import pathlib
from collections.abc import Callable

import numpy as np
from absl import flags
from tqdm import tqdm

from configs import base, resolve
from configs.errors import UserError
from configs.flags import workdir
from evaluation import files, report, sampling

JSON_NAME, PAGE_NAME = "sweep.json", "sweep.html"
SHOWN = 36  # samples of each scale on the page
HIGHER_IS_BETTER = ("class_accuracy",)  # of the metrics; of any other, such as a distance, lower is
Row = dict
Judge = Callable[[base.Config], tuple[dict[str, float], np.ndarray]]

flags.disclaim_key_flags()  # the flags are those of the command that has them defined, and --help shows them as such


def define_flags() -> None:
    """Define the flags of the evaluate commands."""
    sampling.define_flags()
    flags.DEFINE_list("omegas", None, "Guidance scales to judge, each with each of --intervals, e.g. 1,2,4,8.")
    flags.DEFINE_list("intervals", None, "Guidance intervals to judge, start:end each, e.g. 0:1,0.4:0.65.")


def evaluate(load: sampling.Load) -> None:
    """Load and judge as the command line says: once, or every pair of --omegas and --intervals; print and write that.

    load: as of `sampling.sample`.  Raises UserError for what cannot be read, sampled or written.
    """
    config, sampler, weights = load(workdir(), "", None)
    if flags.FLAGS.num_samples is not None:
        config.evaluation.num_samples = flags.FLAGS.num_samples
    configs = guided(config)
    real = report.load_real(config)

    def judge(config):
        return report.evaluate(config, sampler, weights, real=real)

    if configs:
        rows, images = sweep(configs, judge)
        print(table(rows))
        print("\n".join(best_lines(rows)))
        print(write(workdir(), config, rows, images))
    else:
        print(report.write_evaluation(workdir(), judge(config)[0]))


def guided(config: base.Config) -> list[base.Config]:
    """Return copies of the config for all pairs of --omegas and --intervals, every omega of one interval after another.

    Without one of the flags its pairs have the config's value; without both the list is empty.
    Raises UserError for values of no sense, and for guidance that the network cannot be told.
    """
    f = flags.FLAGS
    given = [name for name in ("omegas", "intervals") if f[name].value is not None]
    sampling.check_told(config, given)
    for name in given:
        if not f[name].value or f[name.removesuffix("s")].value is not None:
            raise UserError(f"--{name} must name one value or more, and not stand beside --{name.removesuffix('s')}")
    omegas, intervals = (config.sample.omega,), (config.sample.interval,)
    if "omegas" in given:
        omegas = sampling.numbers("omegas", f.omegas)
    if "intervals" in given:
        intervals = [sampling.numbers("intervals", text.split(":")) for text in f.intervals]
        if any(len(interval) != 2 for interval in intervals):
            raise UserError(f"--intervals takes start:end each, e.g. 0:1,0.4:0.65, not {','.join(f.intervals)}")
    configs = []
    for interval, omega in dict.fromkeys((i, o) for i in intervals for o in omegas) if given else ():
        configs.append(copy.deepcopy(config))
        configs[-1].sample.update(omega=omega, interval=interval)
        resolve.check(configs[-1])
    return configs


def sweep(configs: list[base.Config], judge: Judge) -> tuple[list[Row], dict[float, np.ndarray]]:
    """Return a row for each config, and {omega: the first samples [n h w c]} of those with the first one's interval.

    judge: config -> ({metric: value}, samples [n h w c]), called once for each.
    """
    rows, images = [], {}
    for config in tqdm(configs, "guidance", unit="pair", disable=None):
        c = config.sample
        result, samples = judge(config)
        rows.append({"omega": c.omega, "interval": c.interval} | result)
        if c.interval == configs[0].sample.interval:
            images[c.omega] = samples[:SHOWN].copy()  # a view would keep them all
    return rows, images


def metrics_of(rows: list[Row]) -> list[str]:
    """Return the names of the metrics that depend on the guidance."""
    return [n for n in rows[0] if n not in ("omega", "interval", "num_samples") and not n.startswith("real_")]


def best(rows: list[Row]) -> dict[str, Row]:
    """Return {metric: the best row}, the first of equals."""
    sign = {name: -1 if name in HIGHER_IS_BETTER else 1 for name in metrics_of(rows)}
    return {name: min(rows, key=lambda row, name=name: sign[name] * row[name]) for name in sign}


def best_lines(rows: list[Row]) -> list[str]:
    """Return a line for each metric: the best value, and the flags that sample so."""
    return [
        f"best {name}: {row[name]:.4g} with --omega={row['omega']:g} --interval={row['interval'][0]:g},"
        f"{row['interval'][1]:g}"
        for name, row in best(rows).items()
    ]


def cells(rows: list[Row]) -> list[list[str]]:
    """Return the table as texts: the names, a line for each row, and one of the real test images where they count."""
    names = metrics_of(rows)
    lines = [["omega", "interval", *names]]
    for row in rows:
        lines.append([f"{row['omega']:g}", interval_text(row["interval"]), *(f"{row[name]:.4g}" for name in names)])
    real = {name: rows[0].get(f"real_{name}") for name in names}
    if any(value is not None for value in real.values()):
        lines.append(["real", "", *("" if value is None else f"{value:.4g}" for value in real.values())])
    return lines


def table(rows: list[Row]) -> str:
    """Return the table in Markdown, its columns aligned."""
    lines = cells(rows)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    texts = ["| " + " | ".join(c.rjust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in lines]
    rule = "|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|"
    return "\n".join([texts[0], rule, *texts[1:]])


def interval_text(interval: tuple[float, float]) -> str:
    """Return an interval as --intervals takes it."""
    return f"{interval[0]:g}:{interval[1]:g}"


def write(
    workdir: str | os.PathLike, config: base.Config, rows: list[Row], images: dict[float, np.ndarray]
) -> pathlib.Path:
    """Write the rows to sweep.json and the page to sweep.html, each atomically.  Returns the page's path.

    Raises UserError if they cannot be written.
    """
    from evaluation import sweep_page  # matplotlib takes a second to import

    path = pathlib.Path(workdir)
    files.replace_text(path / JSON_NAME, json.dumps(rows, indent=2) + "\n")
    files.replace_text(path / PAGE_NAME, sweep_page.html(config, rows, images))
    return path / PAGE_NAME
