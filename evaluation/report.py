"""Judges generated images against the real ones, and keeps the verdict in the work directory."""

import json
import os
import pathlib
from collections.abc import Callable

import numpy as np

from configs import base
from configs.errors import UserError
from data import datasets, loader
from evaluation import files, metrics

FILE_NAME = "evaluation.json"
TEST_SPLIT = "test"
Features = dict[str, Callable[[np.ndarray], np.ndarray]]


def evaluate_samples(
    images: np.ndarray, labels: np.ndarray, config: base.Config, features: Features | None = None
) -> dict[str, float]:
    """Compare generated images with the real split config.evaluation.split.

    images [n h w c] in data units, n >= 2; labels [n], the classes they were generated for.
    features: {metric: function of images [n h w c] in data units -> features [n d]}: spaces for more such distances.
    Returns num_samples; frechet_distance_pixels (of raw pixels, not of Inception features: not an FID); the distances
    in the spaces of `features`; with
    config.evaluation.classifier also class_accuracy in [0, 1], and, if the dataset has another split `test`, the same
    two numbers of its real images, `real_...`: what a perfect model would reach.
    Raises UserError for images that are not finite, too few or of the wrong shape, and whatever `load_arrays` raises.
    """
    real_images, real_labels = loader.load_arrays(config, config.evaluation.split)
    _check(images, labels, real_images)
    result = {"num_samples": len(images), **_compare(images, labels, real_images, real_labels, config, features)}
    splits = datasets.split_names(config.data.name, config.data.dir)
    if config.evaluation.classifier and TEST_SPLIT in splits and config.evaluation.split != TEST_SPLIT:
        test_images, test_labels = loader.load_arrays(config, TEST_SPLIT)
        bound = _compare(test_images, test_labels, real_images, real_labels, config)
        result |= {f"real_{name}": value for name, value in bound.items()}
    return result


def write_evaluation(workdir: str | os.PathLike, result: dict[str, float]) -> str:
    """Write `result` to WORKDIR/evaluation.json, atomically, and return it as one line of JSON.

    Raises UserError if the file cannot be written.
    """
    line = json.dumps(result)
    files.replace_text(pathlib.Path(workdir) / FILE_NAME, line + "\n")
    return line


def _compare(images, labels, real_images, real_labels, config, features=None) -> dict[str, float]:
    result = {}
    if config.evaluation.classifier:
        result["class_accuracy"] = metrics.class_accuracy(images, labels, real_images, real_labels)
    result["frechet_distance_pixels"] = metrics.frechet_distance(
        images.reshape(len(images), -1), real_images.reshape(len(real_images), -1)
    )
    for name, function in (features or {}).items():
        result[name] = metrics.frechet_distance(function(images), function(real_images))
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
