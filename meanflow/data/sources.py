"""Opens datasets by name: those that `records` wrote, which need neither TensorFlow nor TFDS, and those of TFDS."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from meanflow.config.features import Feature
from meanflow.data import record_reader
from meanflow.errors import UserError

IMAGES = ("image", "moments", "moments_flip")  # a record's image, or those of its autoencoder's posterior


class Dataset(Protocol):
    """An open dataset."""

    @property
    def features(self) -> Mapping[str, Any]:
        """Features by name, with their `shape` and `np_dtype`."""
        ...

    @property
    def splits(self) -> Sequence[str]:
        """Names of the splits."""
        ...

    def num_examples(self, split: str) -> int:
        """Return the length of a split.  Raises KeyError or ValueError if there is none of this name."""
        ...

    def read(self, split: str, decoded: set[str]) -> Sequence[dict]:
        """Return the records of a split; images other than `decoded` stay encoded."""
        ...


@dataclasses.dataclass(frozen=True)
class LabelSource(Sequence):
    """Random access to the labels of one split: `source[i]` is an int.  Images are not decoded."""

    records: Sequence[dict]

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> int:
        return int(self.records[index]["label"])


@dataclasses.dataclass(frozen=True)
class ImageSource:
    """Random access to one split: `source[i]` is {'image': [h w c] as stored, 'label': int}; images may differ in size.

    In place of the image a dataset of latents has `moments` and perhaps `moments_flip`, [h w 2c].  With `extra` a
    record also holds that feature, an array as stored.
    It can be pickled: each loader process opens it for itself.
    """

    records: Sequence[dict]
    extra: str = ""

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, np.ndarray | int]:
        record = self.records[index]
        kept = {key: record[key] for key in (*IMAGES, self.extra) if key in record}
        return kept | {"label": int(record["label"])}


def open_source(name: str, split: str, directory: str, extra: Feature | None = None) -> ImageSource:
    """Return split `split` of dataset `name`, downloading and preparing it first if necessary.

    name: `digits`, any TFDS name (`mnist`, `cifar10`, `cifar10_corrupted/fog_1`), a builder of your own whose module
        has been imported (in the config file, say), or the path of a prepared directory (.../name/1.0.0).
    split: a TFDS split: `train`, `test`, `train[:90%]`.
    directory: where TFDS keeps datasets; empty: TFDS_DATA_DIR, else ~/tensorflow_datasets.
    extra: one more feature that the records must have; all others are left out.
    Several processes on a machine may call it at once: one prepares, the others wait for it.
    Raises UserError: unknown name or split, no `image` or `label`, no such `extra` or one of another shape, stored in a
        format without random access, download impossible, directory not writable, disk full.
    """
    dataset = _open(name, directory, extra.remedy if extra else "")
    _check(dataset, name, split)
    if extra:
        _check_extra(dataset, name, extra)
    key = extra.key if extra else ""
    return ImageSource(dataset.read(split, {"image", key}), key)


def open_labels(name: str, split: str, directory: str) -> LabelSource:
    """Return the labels of a split.  Arguments and errors as `open_source`."""
    return LabelSource(open_records(name, split, directory))


def open_records(name: str, split: str, directory: str) -> Sequence[dict]:
    """Return the whole records of a split, images encoded as stored.  Arguments and errors as `open_source`."""
    dataset = _open(name, directory)
    _check(dataset, name, split)
    return dataset.read(split, set())


def split_names(name: str, directory: str) -> Sequence[str]:
    """Return the splits of a dataset, preparing it first if necessary.  Arguments and errors as `open_source`."""
    return _open(name, directory).splits


def _open(name: str, directory: str, remedy: str = "") -> Dataset:
    dataset = record_reader.open_dataset(name)
    if dataset is None:
        from meanflow.data.images import tfds_images  # imports TFDS, which our own datasets have no use for

        dataset = tfds_images.open_dataset(name, directory, remedy)
    return dataset


def _check(dataset: Dataset, name: str, split: str) -> None:
    """Raise UserError unless a dataset has labelled images, and some in the split."""
    missing = [key for key in ("image", "label") if key not in dataset.features]
    if "image" in missing and "moments" in dataset.features:
        missing.remove("image")
    if missing:
        raise UserError(
            f"dataset {name!r} has no feature {' and no '.join(map(repr, missing))}, only "
            f"{', '.join(dataset.features)}: choose a dataset of labelled images (config.data.name)"
        )
    options = f"(config.data.split, config.evaluation.split); there are {', '.join(dataset.splits)}"
    try:
        num_examples = dataset.num_examples(split)
    except (KeyError, ValueError) as error:
        raise UserError(f"no split {split!r} of dataset {name!r} {options}") from error
    if num_examples == 0:
        raise UserError(f"split {split!r} of dataset {name!r} is empty {options}")


def _check_extra(dataset: Dataset, name: str, extra: Feature) -> None:
    """Raise UserError unless a dataset has a feature of this type and shape."""
    if extra.key not in dataset.features:
        raise UserError(
            f"dataset {name!r} (config.data.name) has no feature {extra.key!r}, only {', '.join(dataset.features)}: "
            f"{extra.remedy}"
        )
    feature = dataset.features[extra.key]
    fits = len(feature.shape) == len(extra.shape) and all(
        size is not None and wanted in (None, size) for size, wanted in zip(feature.shape, extra.shape, strict=True)
    )
    if not fits or not np.issubdtype(feature.np_dtype, extra.kind):
        raise UserError(
            f"feature {extra.key!r} of dataset {name!r} (config.data.name) is {np.dtype(feature.np_dtype)} of shape "
            f"{feature.shape}, but it must be {extra.kind.__name__} of shape {extra.shape}: {extra.remedy}"
        )
