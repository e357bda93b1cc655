"""Accumulates features of images over batches and processes, and turns them into the values of metrics."""

import io
from collections.abc import Collection, Iterable, Mapping

import numpy as np
from absl import logging

from meanflow.config.options import METRICS
from meanflow.errors import UserError
from meanflow.metrics import preprocessing
from meanflow.metrics import scores as measures
from meanflow.metrics.moments import Moments
from meanflow.metrics.references import Reference

FEATURES = {"fid": "pool", "is": "logits", "kid": "pool", "pr": "pool", "fd_dinov2": "dino"}
BY_MOMENTS = ("fid", "fd_dinov2")  # all others need every row
BY_ROWS = ("kid", "pr")  # need every row of the real images too
KID_SUBSET = 1000  # rows
LEAST = {"fid": 2, "is": 10, "kid": 2, "pr": 4, "fd_dinov2": 2}  # images needed
UNBIASED = 10_000  # samples from which the bias of a Fréchet distance is small; papers use 50 000


def needs(metrics: Iterable[str]) -> set[str]:
    """Return the features that the metrics need: pool and logits are Inception's, dino is DINOv2's.

    Raises UserError for a metric that is not in `METRICS`.
    """
    unknown = sorted(set(metrics) - set(METRICS))
    if unknown:
        raise UserError(f"{', '.join(unknown)}: unknown metric; choose from {', '.join(METRICS)}")
    return {FEATURES[metric] for metric in metrics}


class Collector:
    """Accumulates what metrics need: moments of the features, and whole features where moments are not enough."""

    def __init__(self, metrics: Iterable[str], keep: Collection[str] = (), chosen: np.ndarray | None = None):
        """metrics: some of `METRICS`, else UserError.  keep: features whose rows to keep even if not needed.

        chosen: indices of the samples whose rows are kept; all if None.
        """
        self.metrics = tuple(metrics)
        self.features = needs(self.metrics) | set(keep)
        with_rows = {FEATURES[metric] for metric in self.metrics if metric not in BY_MOMENTS} | set(keep)
        self.moments = {name: Moments() for name in sorted(self.features - {"logits"})}
        self._rows: dict[str, list[np.ndarray]] = {name: [] for name in sorted(with_rows)}
        self._indices: list[np.ndarray] = []
        self._chosen = chosen
        self._row_indices: list[np.ndarray] = []

    @property
    def count(self) -> int:
        """The number of samples."""
        return sum(map(len, self._indices))

    @property
    def kept(self) -> set[str]:
        """The features whose rows are kept."""
        return set(self._rows)

    def add(self, features: dict[str, np.ndarray], indices: np.ndarray) -> None:
        """Add the features of a batch, {name: [b d]}; names that are not in `self.features` are ignored.

        indices: [b], which samples these are, in any order, each sample once.
        Raises UserError if some are not finite, ValueError for missing features or unequal numbers of rows.
        """
        indices = np.asarray(indices, np.int64)
        for name in sorted(self.features):
            if name not in features or features[name].shape[:1] != indices.shape or features[name].ndim != 2:
                shapes = {key: rows.shape for key, rows in features.items()}
                raise ValueError(f"expected {len(indices)} rows of {name} features, not {shapes}")
            if not np.isfinite(features[name]).all():
                raise UserError(
                    f"some {name} features are not finite: the model has diverged, or the weights of the feature "
                    "network are damaged"
                )
        for name, moments in self.moments.items():
            moments.add(features[name])
        held = np.ones(len(indices), bool) if self._chosen is None else np.isin(indices, self._chosen)
        for name, parts in self._rows.items():
            parts.append(np.array(features[name][held], np.float32))
        self._indices.append(indices)
        self._row_indices.append(indices[held])

    def rows(self, name: str) -> np.ndarray:
        """Return the features [n d] float32 in the order of the sample indices; KeyError if they are not kept."""
        return self._all_rows(name)[np.argsort(joined(self._row_indices))]

    def to_bytes(self) -> bytes:
        """Return everything that was added, as an .npz for `merge` in another process."""
        arrays = {"indices": joined(self._indices), "row_indices": joined(self._row_indices)}
        for name, moments in self.moments.items():
            arrays |= {f"moments/{name}/{key}": array for key, array in moments.to_arrays().items()}
        arrays |= {f"rows/{name}": self._all_rows(name) for name in self._rows}
        buffer = io.BytesIO()
        np.savez(buffer, allow_pickle=False, **arrays)
        return buffer.getvalue()

    @classmethod
    def merge(cls, parts: Iterable[bytes], metrics: Iterable[str]) -> "Collector":
        """Return one collector with the contents of several `to_bytes`, all created with the same arguments.

        Rows are the same for any number of processes; moments are, up to rounding.
        Raises UserError if a sample occurs twice.
        """
        merged = cls(metrics)
        for part in parts:
            with np.load(io.BytesIO(part), allow_pickle=False) as file:
                merged._take({key: file[key] for key in file.files})
        indices = joined(merged._indices)
        if len(np.unique(indices)) < len(indices):
            raise UserError(
                f"{len(indices) - len(np.unique(indices))} of {len(indices)} samples were counted twice: give every "
                "process its own"
            )
        return merged

    def _take(self, arrays: dict[str, np.ndarray]) -> None:
        self._indices.append(arrays["indices"])
        self._row_indices.append(arrays["row_indices"])
        for name in sorted({key.split("/")[1] for key in arrays if key.startswith("moments/")}):
            prefix = f"moments/{name}/"
            values = {key.removeprefix(prefix): array for key, array in arrays.items() if key.startswith(prefix)}
            self.moments.setdefault(name, Moments()).merge(Moments.from_arrays(values))
        for key in arrays:
            if key.startswith("rows/"):
                self._rows.setdefault(key.removeprefix("rows/"), []).append(arrays[key])

    def _all_rows(self, name: str) -> np.ndarray:
        parts = [part for part in self._rows[name] if len(part)]  # a process without samples does not know the width
        return np.concatenate(parts) if parts else np.zeros((0, 0), np.float32)


def joined(indices: list[np.ndarray]) -> np.ndarray:
    """Return the indices of all batches, concatenated; there may be no batches."""
    return np.concatenate([np.zeros(0, np.int64), *indices])


def results(collector: Collector, references: dict[str, Reference], convention: str) -> dict[str, float]:
    """Return the values of the collector's metrics.

    fid; is: inception_score, inception_score_std; kid: kid, kid_std; pr: precision, recall; fd_dinov2.
    references: statistics of the real images by metric; the Inception score needs none.
    convention: how the images were preprocessed (see `preprocessing`).  KID draws subsets of 1000 rows, or as many as
    the smaller set has.
    Raises UserError for a reference that is missing, has other features, or lacks those that a metric needs.
    """
    distances = [metric for metric in collector.metrics if metric in BY_MOMENTS]
    if distances and collector.count < UNBIASED:
        logging.warning(
            "%s of %d samples is biased upwards: compare only with as many samples; papers use 50000",
            " and ".join(distances), collector.count,
        )  # fmt: skip
    values = {}
    for metric in collector.metrics:
        if metric == "is":
            values |= _inception_score(collector, convention)
            continue
        reference = _reference(metric, collector, references)
        if metric in BY_MOMENTS:
            values[metric] = _frechet_distance(metric, collector, reference)
        else:
            values |= _by_rows(metric, collector, reference)
    return values


def to_reference(
    collector: Collector, metric: str, convention: str, image_size: tuple[int, int] | None = None
) -> Reference:
    """Return the statistics of real images for `metric` (any but `is`), including features if they are kept.

    image_size: height and width of the images.  Raises UserError for fewer than two images.
    """
    name = FEATURES[metric]
    moments, rows = collector.moments[name], collector.rows(name) if name in collector.kept else None
    return Reference(moments.mean, moments.covariance, moments.count, rows, convention, image_size)


def _reference(metric: str, collector: Collector, references: dict[str, Reference]) -> Reference:
    if metric not in references:
        raise UserError(f"{metric} needs statistics of real images: make them by --make_reference")
    reference = references[metric]
    check_width(metric, reference, len(collector.moments[FEATURES[metric]].mean))
    return reference


def check_width(metric: str, reference: Reference, width: int) -> None:
    """Raise UserError unless a reference has as many features as the images."""
    if len(reference.mean) != width:
        raise UserError(
            f"the reference statistics for {metric} have {len(reference.mean)} features, but the images have "
            f"{width} of {FEATURES[metric]}: use those of the same network, or make them by --make_reference"
        )


def check_numbers(metrics: Iterable[str], num: int, references: Mapping[str, Reference]) -> None:
    """Raise UserError naming a metric for which `num` images, or the real ones with kept features, are too few."""
    for metric in metrics:
        features = references[metric].features if metric in references else None
        for what, there in (("samples", num), ("real images", num if features is None else len(features))):
            if there < LEAST[metric]:
                raise UserError(
                    f"{metric} needs at least {LEAST[metric]} {what}, but there are {there}: use more, or drop it from "
                    "--metrics"
                )


def check_size(metric: str, reference: Reference, size: tuple[int, int]) -> None:
    """Raise UserError if the real images differ in height or width from the generated ones, `size` (h, w)."""
    if reference.image_size not in (None, size):
        theirs, ours = (" x ".join(map(str, a)) for a in (reference.image_size, size))
        raise UserError(
            f"the reference statistics for {metric} belong to images of {theirs} pixels, the images have {ours} "
            f"(h x w): use those of that size, or make them by --make_reference with --image_size={size[0]}"
        )


def _frechet_distance(metric: str, collector: Collector, reference: Reference) -> float:
    moments = collector.moments[FEATURES[metric]]
    return measures.frechet_distance_of(moments.mean, moments.covariance, reference.mean, reference.covariance)


def _inception_score(collector: Collector, convention: str) -> dict[str, float]:
    how = preprocessing.get(convention).score
    mean, std = measures.inception_score(collector.rows("logits"), convention=how)
    return {"inception_score": mean, "inception_score_std": std}


def _by_rows(metric: str, collector: Collector, reference: Reference) -> dict[str, float]:
    if reference.features is None:
        raise UserError(
            f"{metric} needs the features of the real images, but the reference has only their mean and covariance: "
            f"make one with --make_reference and {metric} among the metrics"
        )
    rows = collector.rows(FEATURES[metric])
    if metric == "pr":
        precision, recall, _ = measures.precision_recall(rows, reference.features)
        return {"precision": precision, "recall": recall}
    size = min(KID_SUBSET, len(rows), len(reference.features))
    if size < KID_SUBSET:
        logging.warning("KID uses subsets of %d samples instead of %d: there are no more", size, KID_SUBSET)
    mean, std = measures.kernel_distance(rows, reference.features, subset_size=size)
    return {"kid": mean, "kid_std": std}
