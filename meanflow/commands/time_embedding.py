"""What both time-embedding commands share: flags, and the fit of two time embeddings to the one of a teacher.

A network of two times embeds (t, r) as the sum of two linear maps of Fourier features, over sqrt(2); EDM2's, of one
time, as one map of the features of log(sigma) / 4.  The rows of all three maps have a fixed length, for the network
normalises them.  So the fit is, row by row, least squares under two constraints of length.
"""

import os
from collections.abc import Callable
from typing import Any

import numpy as np
from absl import flags, logging

from meanflow.commands import reflow
from meanflow.config import options as base
from meanflow.config import paths, resolve
from meanflow.config.flags import config as config_flag
from meanflow.errors import UserError

TIME_MIN, TIME_MAX = 1 / 501, 80 / 81  # of the times at which embeddings are compared, as in the official code
NUM_TIMES = 20_000  # pairs of times that the exact fit sees, and as many others that the error is measured on
ROUNDS, BISECTIONS = 50, 100  # of the exact fit: later rounds gain less than 1 %
ADAM = {"steps": 10_000, "batch_size": 1024, "learning_rate": 1e-3}  # the official ones, but for the batch
ONE, TWO = "unet.emb_noise.weight", ("unet.emb_noise_t.weight", "unet.emb_noise_r.weight")
LOG_VARIANCE = "logvar_"  # canonical names of what only EDM2's own training uses begin so

flags.disclaim_key_flags()  # the flags are those of the command that has them defined, and --help shows them as such

Weights = dict[str, np.ndarray]


def define_flags() -> None:
    """Define the flags of the time-embedding commands, --config aside."""
    flags.DEFINE(paths.READ, "teacher", "", "Flow model: a work directory, or a canonical .safetensors with --config.")
    flags.DEFINE_integer("ema", None, "Which EMA of a work directory; -1: the raw parameters; default: its own choice.")
    flags.DEFINE_integer("step", None, "Checkpoint of the --teacher's work directory; default: newest.", lower_bound=0)
    flags.DEFINE(paths.WRITTEN, "output", "", "The .safetensors to write, for --config.train.load_from.")
    flags.DEFINE_enum("fit", "exact", ["exact", "adam"], "exact: least squares; adam: by gradient, as official code.")
    flags.DEFINE_integer("steps", None, f"Steps of adam; default: {ADAM['steps']}.", lower_bound=1)
    flags.DEFINE_integer("batch_size", None, f"Pairs of times of a step; {ADAM['batch_size']}.", lower_bound=1)
    flags.DEFINE_float("learning_rate", None, f"Of adam; default: {ADAM['learning_rate']}.")
    flags.DEFINE_integer("seed", 0, "Of the times.", lower_bound=0)


def time_embedding(
    set_precision: Callable[[base.Config], None],
    load: Callable[[str, base.Config, int | None], Weights],
    save: Callable[[str, Weights, dict], None],
    fit: Callable[..., tuple[Weights, Any]],
    error: Callable[..., float],
) -> None:
    """Fit as the command line says, write the weights, and print the remaining error and their path.

    set_precision: called with the teacher's config before anything is loaded.
    load: (path, config, step) -> canonical weights.  save: (path, weights, metadata).
    fit: (config, weights, teacher's config and weights, times, learning rate) -> weights and losses, by Adam.
    error: (config, weights, teacher's config and weights, t, r) -> mean squared error of the embedding.
    Raises UserError for what cannot be read, fitted or written.
    """
    f = flags.FLAGS
    if not f.output.endswith(".safetensors"):
        raise UserError(f"--output is {f.output!r}; name the .safetensors to write")
    given_options = {name: f[name].value for name in ADAM if f[name].value is not None}
    if given_options and f.fit != "adam":
        raise UserError(f"--{next(iter(given_options))} is for --fit=adam, and --fit is {f.fit}")
    if f.workdir:
        raise UserError("--workdir is for training and sampling: name the flow model by --teacher")
    teacher = reflow.read_config("teacher", f.teacher, "config", config_flag(), f.ema, f.step)
    set_precision(teacher)
    given, config = load(f.teacher, teacher, f.step), two_times(teacher)
    options: dict[str, Any] = {**ADAM, **given_options}
    if ONE not in given:
        raise UserError(f"--teacher {f.teacher} has no {ONE}: it is not of a network of one time")
    weights, rng = start(given), np.random.default_rng(f.seed)
    if f.fit == "exact":
        t, r = draw_times(rng, NUM_TIMES)
        fitted = fit_exactly(given["unet.emb_fourier.freqs"], given["unet.emb_fourier.phases"], given[ONE], t, r)
        weights |= dict(zip(TWO, fitted, strict=True))
    else:
        times = np.stack([draw_times(rng, options["batch_size"]) for _ in range(options["steps"])])
        weights, _ = fit(config, weights, teacher, given, times, options["learning_rate"])
    save(f.output, weights, {"format": "canonical", "source": f"{os.path.basename(f.teacher)}, two time embeddings"})
    weights = load(f.output, config, None)  # what the trainer will read
    left = error(config, weights, teacher, given, *draw_times(rng, NUM_TIMES))
    before = error(config, start(given), teacher, given, *draw_times(rng, NUM_TIMES))
    logging.info("mean squared error of the embedding, whose entries have variance 1: %.4f, before %.4f", left, before)
    print(f"{f.output}: error {left:.4f}")


def two_times(teacher: base.Config) -> base.Config:
    """Return the config of the network of two times from a teacher's.  Raises UserError if that is no EDM2."""
    config = base.get_config()
    if teacher.model.name != "edm2":
        raise UserError(
            f"--teacher is of config.model.name {teacher.model.name}: only edm2 embeds a time that is to be fitted; a "
            "student of another network starts from the teacher itself by --config.train.load_from"
        )
    config.model.update(teacher.model, interval_embedder=True, logvar_channels=0)
    config.method.update(name="rectified", time_sampler="re2_truncate")
    return resolve.check(config)


def start(teacher: Weights) -> Weights:
    """Return weights of two times that begin as a teacher's: both embeddings are copies of its own."""
    kept = {name: a for name, a in teacher.items() if name != ONE and not name.startswith(LOG_VARIANCE)}
    return kept | {name: teacher[ONE] for name in TWO}


def draw_times(rng: np.random.Generator, num: int) -> tuple[np.ndarray, np.ndarray]:
    """Return `num` pairs t >= r of times: uniform ones, in order, and not beyond `TIME_MIN` and `TIME_MAX`."""
    drawn = np.clip(rng.random((2, num)), TIME_MIN, TIME_MAX).astype(np.float32)
    return drawn.max(0), drawn.min(0)


def fit_exactly(
    freqs: np.ndarray, phases: np.ndarray, one: np.ndarray, t: np.ndarray, r: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the weights [d n] of t and of r whose summed embedding is nearest to that of the teacher's weights `one`.

    freqs, phases: [n], of the Fourier features.  t, r: [k] the times of which the mean squared error is least.
    Each is fitted in turn, exactly, to what the other leaves: the error never rises.  All in float64.
    """
    freqs, phases, one = (np.asarray(a, np.float64) for a in (freqs, phases, one))
    of_t, of_r, of_sigma = (
        np.sqrt(2) * np.cos(np.outer(a, freqs) + phases)
        for a in (t, r, np.log(np.float64(t) / (1 - np.float64(t))) / 4)
    )
    unit = one / np.linalg.norm(one, axis=1, keepdims=True)
    target = np.sqrt(2) * of_sigma @ unit.T  # both sides times sqrt(2)
    t_t, t_r, r_r, t_y, r_y = of_t.T @ of_t, of_t.T @ of_r, of_r.T @ of_r, of_t.T @ target, of_r.T @ target
    w_r = unit.T
    for _ in range(ROUNDS):
        w_t = unit_least_squares(t_t, t_y - t_r @ w_r)
        w_r = unit_least_squares(r_r, r_y - t_r.T @ w_t)
    scale = np.sqrt(len(freqs))  # entries of variance 1, as fresh ones
    return np.array(scale * w_t.T, np.float32, order="C"), np.array(scale * w_r.T, np.float32, order="C")


def unit_least_squares(gram: np.ndarray, moment: np.ndarray) -> np.ndarray:
    """Return W [n d] of columns of length 1 that minimise tr(W' gram W) - 2 tr(W' moment): |X W - Y|^2 but a constant.

    gram: X'X [n n].  moment: X'Y [n d].  A column is (gram + l)^-1 moment with the l, above minus the least eigenvalue,
    that makes its length 1; the length falls with l, so that bisection finds it.
    """
    values, vectors = np.linalg.eigh(gram)
    moment = vectors.T @ moment
    low = np.full(moment.shape[1], -values[0])
    high = low + np.linalg.norm(moment, axis=0)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        long = np.square(moment / (values[:, None] + middle)).sum(0) > 1
        low, high = np.where(long, middle, low), np.where(long, high, middle)
    w = moment / np.maximum(values[:, None] + high, np.finfo(np.float64).tiny)
    return vectors @ (w / np.linalg.norm(w, axis=0))
