"""Image metrics of a model: samples, decoded, to features, to metrics, over all devices and processes."""

import pathlib
import types
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from absl import logging

from meanflow import files
from meanflow.commands import frozen_networks, sample
from meanflow.commands.frozen_networks import FrozenNetworks
from meanflow.config import options
from meanflow.errors import UserError
from meanflow.metrics import accumulate, dino, preprocessing, references
from meanflow.metrics.extractor import Extract, Extractor
from meanflow.process_group import ALONE, ProcessGroup
from meanflow.sampling import grids, saving

SHOWN = 64  # samples in the grid
INCEPTION, DINO = {"pool", "logits"}, {"dino"}  # features of each network


class ImageMetrics:
    """Computes config.evaluation.metrics; created once for many models of one config."""

    def __init__(
        self,
        config: options.Config,
        framework: FrozenNetworks,
        group: ProcessGroup = ALONE,
        output: pathlib.Path | None = None,
        save: str | None = None,
    ):
        """save: one of `saving.KINDS`, to write all images into the directory `output`; None writes nothing.

        Raises UserError for an autoencoder, weights or statistics that cannot be read or do not match, for too few
        samples, and for an output that cannot be written.
        """
        c = config.evaluation
        self.metrics, self.group, self.output, self.save = tuple(c.metrics), group, output, save
        self.convention = preprocessing.get(c.convention)
        self.references = read_references(c)
        accumulate.check_numbers(self.metrics, c.num_samples, self.references)
        if self.references:
            side = frozen_networks.image_side(config)
            check_sizes(c, self.references, (side, side))
        if output and save:
            files.check_writable(output / saving.INDEX)
        self.extract = extractor(self.metrics, c, framework, self.references)
        self.decode = frozen_networks.decoder(config, framework)
        self.unsaved: UserError | None = None
        self._check_channels(config)

    def __call__(self, config: options.Config, sampler: sample.Sampler, weights: Any) -> tuple[dict, np.ndarray]:
        """Return {metric: value} for config.evaluation.num_samples samples, and the first samples, [n h w c].

        config: may differ in its sampling options, such as guidance.  sampler, weights: see `sample`.
        Every process calls it; all but the first get no metrics, and their own first samples.  If images cannot be
        saved, the metrics are still computed and `self.unsaved` holds the error.
        """
        num = config.evaluation.num_samples
        saver = saving.Saver(self.output, self.save) if self.save and self.output else None
        collector, shown = accumulate.Collector(self.metrics), []
        for batch in sample.batches(config, sampler, weights, num, group=self.group):
            own = slice(self.group.process, None, self.group.num_processes) if self.group.together else slice(None)
            indices, samples, labels = (rows[own] for rows in batch)
            if not len(indices):
                continue
            images = self._decoded(samples)
            pixels = grids.to_uint8(images, self.convention.rounding)
            collector.add(self.extract(pixels), indices)
            if sum(map(len, shown)) < SHOWN:
                shown.append(images[: SHOWN - sum(map(len, shown))].copy())  # a view would keep the whole batch
            if saver and not self.unsaved:
                self._save(saver.add, indices, pixels, labels)
        if saver:  # every process takes part in this
            self._save(saver.finish, self.group)
        parts = self.group.gather(collector.to_bytes())
        shown = np.concatenate(shown) if shown else np.empty((0, 1, 1, 3), np.float32)
        if self.group.process:
            return {}, shown
        values = accumulate.results(
            accumulate.Collector.merge(parts, self.metrics), self.references, config.evaluation.convention
        )
        return {"num_samples": num} | values, shown

    def _save(self, function: Callable[..., Any], *args: Any) -> None:
        try:
            function(*args)
        except UserError as error:
            logging.error("%s  The images are evaluated nevertheless", error)
            self.unsaved = error

    def _decoded(self, samples: np.ndarray) -> np.ndarray:
        images = samples if self.decode is None else self.decode(samples)
        if not np.isfinite(images).all():
            raise UserError(
                "some samples have values that are not finite: the model has diverged; evaluate an earlier checkpoint"
            )
        return images

    def _check_channels(self, config: options.Config) -> None:
        if self.decode is None and config.model.channels not in (1, 3):
            raise UserError(
                f"the samples have {config.model.channels} channels, but config.evaluation.metrics need images: name "
                "the autoencoder that decodes them by --vae or config.latents.vae, with config.latents.scale"
            )


def read_references(c: options.Config) -> dict[str, references.Reference]:
    """Return {metric: statistics of real images} for the metrics of `config.evaluation` that need them.

    Raises UserError if they cannot be read, have another convention, or lack what a metric compares with.
    """
    found = {metric: references.read(c.reference, metric) for metric in c.metrics if metric != "is"}
    for metric, reference in found.items():
        if metric != "fd_dinov2" and reference.convention not in ("", c.convention):
            raise UserError(
                f"{c.reference} (config.evaluation.reference) holds statistics of the convention "
                f"{reference.convention}, but config.evaluation.convention is {c.convention}: make new ones, or set it"
            )
        if metric in accumulate.BY_ROWS and reference.features is None:
            raise UserError(
                f"{metric} compares with the features of real images, and {c.reference} has only their mean and "
                f"covariance: make one with --make_reference and {metric} among the --metrics"
            )
    return found


def check_sizes(c: options.Config, found: dict[str, references.Reference], size: tuple[int, int]) -> None:
    """Raise UserError if statistics belong to images of another height and width; log it if they do not say.

    c: `config.evaluation`.  size: (h, w) of the images to evaluate.
    """
    for metric, reference in found.items():
        accumulate.check_size(metric, reference, size)
    silent = [metric for metric, reference in found.items() if reference.image_size is None]
    if silent:
        logging.info(
            "%s does not state the size of its images: %s is meaningful only if they have %d x %d pixels, as those "
            "evaluated", c.reference, " and ".join(silent), *size,
        )  # fmt: skip


def extractor(
    metrics: tuple[str, ...],
    c: options.Config,
    framework: FrozenNetworks,
    found: Mapping[str, references.Reference] = types.MappingProxyType({}),
) -> Extract:
    """Return the function from images uint8 [b h w c] to the features that the metrics of `config.evaluation` need.

    Raises UserError if `found`, statistics by metric, has features of another width.
    """
    needed, parts = accumulate.needs(metrics), []
    if needed & INCEPTION:
        parts.append(framework.make_inception(c.inception, c.convention))
    if needed & DINO:
        parts.append(dino.load(c.dino))
    widths: dict[str, int] = {}
    for part in parts:
        widths |= part.widths if isinstance(part, Extractor) else {}
    for metric, reference in found.items():
        if accumulate.FEATURES[metric] in widths:
            accumulate.check_width(metric, reference, widths[accumulate.FEATURES[metric]])

    def extract(images: np.ndarray) -> dict[str, np.ndarray]:
        features: dict[str, np.ndarray] = {}
        for part in parts:
            features |= part(images)
        return {name: features[name] for name in needed}

    return extract


def provenance(c: options.Config) -> dict[str, str]:
    """Return what image metrics depend on besides the images, from `config.evaluation`; empty without metrics."""
    return {"convention": c.convention, "reference": c.reference} if c.metrics else {}
