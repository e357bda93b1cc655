"""Metrics of generated data against the dataset itself; the result is kept in the work directory."""

import copy
import functools
import json
import os
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from meanflow import files
from meanflow.commands import sample as sampling
from meanflow.config import options
from meanflow.data import loader, sources
from meanflow.errors import UserError
from meanflow.metrics import scores
from meanflow.process_group import ALONE, ProcessGroup

FILE_NAME = "evaluation.json"
TEST_SPLIT = "test"
Features = dict[str, Callable[[np.ndarray], np.ndarray]]


class Real(NamedTuple):
    """The real data that samples are compared with; see `load_real`."""

    images: np.ndarray  # [n h w c] in data units, of the split config.evaluation.split
    labels: np.ndarray  # [n]
    bound: dict[str, float]  # {real_metric: value} that a perfect model would reach


def load_real(config: options.Config) -> Real:
    """Return the real images, and the `real_...` metrics of the split `test` unless that is the split itself.

    Raises UserError as `load_arrays` does.
    """
    config = copy.deepcopy(config)
    config.data.name = config.evaluation.dataset or config.data.name
    images, labels = loader.load_arrays(config, config.evaluation.split)
    splits = sources.split_names(config.data.name, config.data.dir)
    bound = {}
    if config.evaluation.classifier and TEST_SPLIT in splits and config.evaluation.split != TEST_SPLIT:
        bound = _compare(*loader.load_arrays(config, TEST_SPLIT), images, labels, config)
    return Real(images, labels, {f"real_{name}": value for name, value in bound.items()})


def evaluate(
    config: options.Config,
    sampler: sampling.Sampler,
    weights: Any,
    features: Features | None = None,
    real: Real | None = None,
    group: ProcessGroup = ALONE,
) -> tuple[dict[str, float], np.ndarray]:
    """Return {metric: value} of config.evaluation.num_samples samples, and the samples [n h w c].

    sampler, weights: see `sampling`.  features, real: see `evaluate_samples`.  Several processes share the sampling,
    and the first one computes the metrics: the others get none.
    """
    if not group.process:
        real = real or load_real(config)
        check_real(config, real)
    images, labels = sampling.generate(config, sampler, weights, config.evaluation.num_samples, group=group)
    if group.process:
        return {}, images
    return evaluate_samples(images, labels, config, features, real), images


def evaluate_emas(
    config: options.Config, sampler: sampling.Sampler, emas: Any, measure: Callable | None = None
) -> dict[str, float]:
    """Return {metric_ema_DECAY: value} of each of config.train.ema_decays, and {metric: value} of the sampled one.

    measure: (config, sampler, weights) -> {metric: value}, samples; `evaluate` if None.
    """
    measure = measure or functools.partial(evaluate, real=load_real(config))
    results = [measure(config, sampler, ema)[0] for ema in emas]
    named = zip(config.train.ema_decays, results, strict=True)
    values = {
        f"{name}_ema_{d}": value for d, result in named for name, value in result.items() if name != "num_samples"
    }
    return values | (results[config.sample.ema] if config.sample.ema >= 0 else {})


def evaluate_samples(
    images: np.ndarray,
    labels: np.ndarray,
    config: options.Config,
    features: Features | None = None,
    real: Real | None = None,
) -> dict[str, float]:
    """Compare generated images with the real split config.evaluation.split.

    images: [n h w c] in data units, n >= 2.  labels: [n], the classes they were generated for.
    features: {metric: function of images [n h w c] in data units -> features [n d]}, for further Fréchet distances.
    real: the result of `load_real`, to share between calls; loaded if None.
    Returns num_samples; frechet_distance_pixels (of raw pixels, so not an FID); the distances in the spaces of
    `features`; with config.evaluation.classifier also class_accuracy in [0, 1] and, if the dataset has a separate split
    `test`, both metrics of its real images as `real_...`, which a perfect model would reach.
    Raises UserError for images that are not finite, too few or of the wrong shape, and as `load_arrays` does.
    """
    real = real or load_real(config)
    _check(images, labels, real.images)
    result = _compare(images, labels, real.images, real.labels, config, features)
    return {"num_samples": len(images)} | result | real.bound


def check_real(config: options.Config, real: Real) -> None:
    """Raise UserError for real images that samples cannot be compared with.  Call it before sampling."""
    c = config.evaluation
    if len(real.images) < 2:
        raise UserError(f"a distance needs at least two real images: config.evaluation.split {c.split} has fewer")
    if c.classifier and len(np.unique(real.labels)) < 2:
        raise UserError("all real images have the same class: set --config.evaluation.classifier=False")


def write_evaluation(workdir: str | os.PathLike, result: dict[str, Any]) -> str:
    """Write `result` to WORKDIR/evaluation.json, atomically, and return it as one line of JSON.

    Raises UserError if the file cannot be written.
    """
    line = json.dumps(result)
    files.replace_text(pathlib.Path(workdir) / FILE_NAME, line + "\n")
    return line


def _compare(images, labels, real_images, real_labels, config, features=None) -> dict[str, float]:
    result = {}
    if config.evaluation.classifier:
        result["class_accuracy"] = scores.class_accuracy(images, labels, real_images, real_labels)
    result["frechet_distance_pixels"] = scores.frechet_distance(
        images.reshape(len(images), -1), real_images.reshape(len(real_images), -1)
    )
    for name, function in (features or {}).items():
        result[name] = scores.frechet_distance(function(images), function(real_images))
    return result


def _check(images: np.ndarray, labels: np.ndarray, real_images: np.ndarray) -> None:
    if images.shape[1:] != real_images.shape[1:] or labels.shape != images.shape[:1]:
        raise UserError(
            f"samples of shape {images.shape} with labels {labels.shape} cannot be compared with real images of shape "
            f"{real_images.shape}: both must come from one config"
        )
    if len(images) < 2:
        raise UserError("a distance needs at least two samples: set --config.evaluation.num_samples")
    num_bad = int(np.sum(~np.isfinite(images).all(axis=(1, 2, 3))))
    if num_bad:
        raise UserError(
            f"{num_bad} of {len(images)} samples have values that are not finite: the model has diverged; evaluate an "
            "earlier checkpoint, or train again with a lower --config.train.learning_rate"
        )
