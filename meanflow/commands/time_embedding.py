"""The time-embedding commands: flags, and the fit of two time embeddings to the single one of a teacher.

A network of two times embeds (t, r) as the sum of two linear maps of Fourier features, divided by sqrt(2); EDM2's
network of one time uses one linear map of the features of log(sigma) / 4.  The network normalises the rows of all three
maps to a fixed length, so the fit is a least-squares problem per row with two length constraints.
"""

import os
from collections.abc import Callable

import numpy as np
from absl import flags, logging

from meanflow.commands import reflow
from meanflow.config import checks, paths
from meanflow.config import options as base
from meanflow.config.flags import config as config_flag
from meanflow.errors import UserError
from meanflow.weights import files, reading

TIME_MIN, TIME_MAX = 1 / 501, 80 / 81  # range of the times at which embeddings are compared, as in the official code
NUM_TIMES = 20_000  # pairs of times to fit, and as many others to measure the error
ROUNDS, BISECTIONS = 50, 100  # further rounds gain less than 1 %
ONE, TWO = "unet.emb_noise.weight", ("unet.emb_noise_t.weight", "unet.emb_noise_r.weight")
LOG_VARIANCE = "logvar_"  # prefix of the weights that only EDM2's own training uses

flags.disclaim_key_flags()  # --help lists the flags under the command that defines them

Weights = dict[str, np.ndarray]


def define_flags() -> None:
    """Define the flags of the time-embedding commands, except --config."""
    reflow.define_teacher_flags()
    flags.DEFINE(paths.WRITTEN, "output", "", "The .safetensors to write, for --config.train.load_from.")
    flags.DEFINE_integer("seed", 0, "Seed of the times.", lower_bound=0)


def time_embedding(
    set_precision: Callable[[base.Config], None],
    read_run: reflow.ReadRun,
    save: Callable[[str, Weights, dict], None],
    error: Callable[..., float],
) -> None:
    """Fit as the command line says, write the weights, and print the remaining error and their path.

    set_precision: called with the teacher's config before a run is read.
    read_run: (work directory, EMA, step) -> config and canonical weights.  save: (path, weights, metadata).
    error: (config, weights, teacher's config and weights, t, r) -> mean squared error of the embedding.
    Raises UserError for what cannot be read, fitted or written.
    """
    f = flags.FLAGS
    if not f.output.endswith(".safetensors"):
        raise UserError(f"--output is {f.output!r}; name the .safetensors to write")
    if f.workdir:
        raise UserError("--workdir is for training and sampling: name the flow model by --teacher")
    choice = reading.Choice(f.ema, "", f.step, f.time)
    model = reflow.read_model("teacher", f.teacher, "config", config_flag(), choice)
    teacher, config = model.config, two_times(model.config)
    set_precision(teacher)
    given = reflow.with_weights(model, f.teacher, f.step, read_run).weights or {}
    if ONE not in given:
        raise UserError(f"--teacher {f.teacher} has no {ONE}: it does not belong to a network of one time")
    rng = np.random.default_rng(f.seed)
    fitted = fit(given, *draw_times(rng, NUM_TIMES))
    save(f.output, fitted, {"format": "canonical", "source": f"{os.path.basename(f.teacher)}, two time embeddings"})
    fitted = files.load(f.output)  # what the trainer will read
    left, before = (error(config, w, teacher, given, *draw_times(rng, NUM_TIMES)) for w in (fitted, copied(given)))
    logging.info("mean squared error of the embedding, whose entries have variance 1: %.4f, before %.4f", left, before)
    print(f"{f.output}: error {left:.4f}")


def two_times(teacher: base.Config) -> base.Config:
    """Return the config of the network of two times for a teacher's.  Raises UserError unless that is EDM2."""
    if teacher.model.name != "edm2":
        raise UserError(
            f"--teacher has config.model.name {teacher.model.name}: only edm2 has a time embedding to fit; a student "
            "of another network starts from the teacher itself by --config.train.load_from"
        )
    config = base.get_config("edm2", "rectified")
    config.model.update(teacher.model, interval_embedder=True, logvar_channels=0)
    return checks.check(config)


def copied(teacher: Weights) -> Weights:
    """Return a teacher's weights for a network of two times whose embeddings are both copies of the teacher's one."""
    kept = {name: a for name, a in teacher.items() if name != ONE and not name.startswith(LOG_VARIANCE)}
    return kept | {name: teacher[ONE] for name in TWO}


def fit(teacher: Weights, t: np.ndarray, r: np.ndarray) -> Weights:
    """Return a teacher's weights for a network of two times with embeddings fitted at times t >= r [k]."""
    freqs, phases = (teacher[f"unet.emb_fourier.{name}"] for name in ("freqs", "phases"))
    return copied(teacher) | dict(zip(TWO, fit_embeddings(freqs, phases, teacher[ONE], t, r), strict=True))


def draw_times(rng: np.random.Generator, num: int) -> tuple[np.ndarray, np.ndarray]:
    """Return `num` pairs of times t >= r: sorted uniforms, clipped to [TIME_MIN, TIME_MAX]."""
    drawn = np.clip(rng.random((2, num)), TIME_MIN, TIME_MAX).astype(np.float32)
    return drawn.max(0), drawn.min(0)


def fit_embeddings(
    freqs: np.ndarray, phases: np.ndarray, one: np.ndarray, t: np.ndarray, r: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the weights [d n] of t and of r whose summed embedding is closest to that of the teacher's weights `one`.

    freqs, phases: [n], of the Fourier features.  t, r: [k], the times over which the squared error is minimised.
    Alternates exact fits of one to the residual of the other, so the error never rises.  Computed in float64.
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
    """Return W [n d] with columns of length 1 that minimises |X W - Y|^2 = tr(W' gram W) - 2 tr(W' moment) + constant.

    gram: X'X [n n].  moment: X'Y [n d].  A column is (gram + l)^-1 moment with the l > -(smallest eigenvalue) that
    makes its length 1; the length decreases in l, so bisection finds it.
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
