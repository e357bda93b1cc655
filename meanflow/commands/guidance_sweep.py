"""Evaluates one model under many guidance settings: a row for each, and their table.

A row is {"omega": scale, "interval": (start, end), metric: value, ...}, the metrics as of `data_metrics.evaluate`.
"""

import json
from collections.abc import Callable

import numpy as np
from absl import logging
from tqdm import tqdm

from meanflow.config import options

SHOWN = 36  # samples per scale on the page
# For all other metrics, such as distances, lower is better.
HIGHER_IS_BETTER = ("class_accuracy", "inception_score", "precision", "recall")
Row = dict
Measure = Callable[[options.Config], tuple[dict[str, float], np.ndarray]]


def sweep(configs: list[options.Config], measure: Measure) -> tuple[list[Row], dict[float, np.ndarray]]:
    """Return a row per config, and {omega: first samples [n h w c]} of the configs that have the first one's interval.

    measure: config -> ({metric: value}, samples [n h w c]), called once per config.
    """
    rows, images = [], {}
    for config in tqdm(configs, "guidance", unit="pair", disable=None):
        c = config.sample
        result, samples = measure(config)
        rows.append({"omega": c.omega, "interval": c.interval} | result)
        if result:  # in the first process
            logging.info("%s", json.dumps(rows[-1]))  # in case a later pair fails
        if c.interval == configs[0].sample.interval:
            images[c.omega] = samples[:SHOWN].copy()  # a view would keep them all
    return rows, images


def metrics_of(rows: list[Row]) -> list[str]:
    """Return the names of the metrics that depend on the guidance."""
    others = ("omega", "interval", "num_samples")
    return [n for n in rows[0] if n not in others and not n.startswith("real_") and not n.endswith("_std")]


def best(rows: list[Row]) -> dict[str, Row]:
    """Return {metric: best row}, the first one on ties."""
    sign = {name: -1 if name in HIGHER_IS_BETTER else 1 for name in metrics_of(rows)}
    return {name: min(rows, key=lambda row, name=name: sign[name] * row[name]) for name in sign}


def best_lines(rows: list[Row]) -> list[str]:
    """Return a line per metric: its best value and the flags that reproduce it."""
    return [
        f"best {name}: {row[name]:.4g} with --omega={row['omega']:g} --interval={row['interval'][0]:g},"
        f"{row['interval'][1]:g}"
        for name, row in best(rows).items()
    ]


def cells(rows: list[Row]) -> list[list[str]]:
    """Return the table as text: a header, a line per row, and one for the real test images if they were evaluated."""
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
