"""Opens an image dataset by its TFDS name, preparing it in ArrayRecord on first use."""

import contextlib
import dataclasses
import difflib
import errno
import fcntl
import os
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core.download import download_manager, util

from meanflow import tensorflow_logging
from meanflow.data.images import digits  # noqa: F401  TFDS knows a builder once its module is imported
from meanflow.errors import UserError

FILE_FORMAT = "array_record"
SETTINGS = "settings.json"  # in a directory that `meanflow.data.records` writes, from the start
IMAGES = ("image", "moments", "moments_flip")  # a record's image, or those of its autoencoder's posterior
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EEXIST)


class NoDatasetError(UserError):
    """There is no dataset of a name."""


class Extra(NamedTuple):
    """A feature that each record is to have beside `image` and `label`."""

    key: str
    shape: tuple[int | None, ...]  # None: any size, the same for all records
    kind: type[np.generic]  # of its values: a type of NumPy, or a family of them
    remedy: str  # what the user can do where it is missing, for messages


@dataclasses.dataclass(frozen=True)
class LabelSource:
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
    record holds that feature too, an array as stored.
    Can be pickled, so that loader processes open it for themselves.
    """

    records: Sequence[dict]
    extra: str = ""

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, np.ndarray | int]:
        record = self.records[index]
        kept = {key: record[key] for key in (*IMAGES, self.extra) if key in record}
        return kept | {"label": int(record["label"])}


def open_source(name: str, split: str, directory: str, extra: Extra | None = None) -> ImageSource:
    """Return split `split` of dataset `name`, downloading and preparing it first if need be.

    name: `digits`, any TFDS name (`mnist`, `cifar10`, `cifar10_corrupted/fog_1`), a builder of your own whose module
        has been imported (in the config file, say), or the path of a prepared directory (.../name/1.0.0).
    split: a TFDS split: `train`, `test`, `train[:90%]`.
    directory: where TFDS keeps datasets; empty: TFDS_DATA_DIR, else ~/tensorflow_datasets.
    extra: one more feature that the records are to have; all others are left out.
    Processes of one machine may call it at once: one prepares, the others wait for it.
    Raises UserError: unknown name or split, no `image` or `label`, no such `extra` or one of another shape, stored in a
        format without random access, download impossible, directory not writable, disk full.
    """
    try:
        builder = _open(name, directory)
    except NoDatasetError as error:
        raise UserError(f"{error}  {extra.remedy[0].upper()}{extra.remedy[1:]}" if extra else str(error)) from error
    _check(builder, name, split)
    if extra:
        _check_extra(builder, name, extra)
    key = extra.key if extra else ""
    return ImageSource(_read(builder, split, {"image", key}), key)


def open_labels(name: str, split: str, directory: str) -> LabelSource:
    """Return the labels of a split.  Arguments and errors as `open_source`."""
    builder = _open(name, directory)
    _check(builder, name, split)
    return LabelSource(_read(builder, split, set()))


def open_records(name: str, split: str, directory: str) -> Sequence[dict]:
    """Return the whole records of a split, images as stored, undecoded.  Arguments and errors as `open_source`."""
    builder = _open(name, directory)
    _check(builder, name, split)
    return _read(builder, split, set())


def split_names(name: str, directory: str) -> tuple[str, ...]:
    """Return the splits of a dataset, preparing it first if need be.  Arguments and errors as `open_source`."""
    return tuple(_open(name, directory).info.splits)


def _open(name: str, directory: str) -> tfds.core.DatasetBuilder:
    """Return the builder of a dataset that is on disk."""
    tensorflow_logging.silence_tensorflow()
    builder = _find_builder(name, directory)
    if builder.data_path.exists():
        return builder
    return _prepare(name, directory, pathlib.Path(builder.data_dir_root))


def _find_builder(name: str, directory: str) -> tfds.core.DatasetBuilder:
    if pathlib.Path(name, "features.json").is_file():
        return tfds.builder_from_directory(name)
    if pathlib.Path(name, SETTINGS).is_file():
        raise UserError(
            f"dataset {name} (config.data.name) is not whole: run the command that writes it again, until it misses no "
            "shard"
        )
    data_dir = os.path.expanduser(directory) or None
    try:
        return tfds.builder(name, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError as error:
        if os.sep in name:
            raise NoDatasetError(f"{name} (config.data.name) is not the directory of a dataset.") from error
        close = difflib.get_close_matches(name, tfds.list_builders(with_community_datasets=False), cutoff=0.7)
        hint = f"did you mean {' or '.join(close)}?" if close else "see https://www.tensorflow.org/datasets/catalog"
        raise NoDatasetError(
            f"no dataset {name!r} (config.data.name): {hint}  A builder of your own is known once the config file "
            "imports its module."
        ) from error
    except (ValueError, AssertionError) as error:  # TFDS's own words on a malformed name, a wrong config or version
        if os.sep in name and not name.partition(os.sep)[0].isidentifier():
            raise NoDatasetError(f"{name} (config.data.name) is not the directory of a dataset.") from error
        raise UserError(f"cannot open dataset {name!r} (config.data.name): {error}") from error


def _prepare(name: str, directory: str, root: pathlib.Path) -> tfds.core.DatasetBuilder:
    """Write the dataset below `root` unless another process is faster; return a builder that sees it."""
    try:
        # TFDS reports on stdout, which belongs to the results of a command.
        with _lock(root, name), contextlib.redirect_stdout(sys.stderr):
            builder = _find_builder(name, directory)
            if not builder.data_path.exists():
                builder.download_and_prepare(file_format=FILE_FORMAT)
    except OSError as error:
        raise UserError(f"cannot prepare dataset {name!r} in {root}: {error}.  {_way_out(error)}") from error
    except (AssertionError, util.DownloadError, download_manager.NonMatchingChecksumError) as error:
        # AssertionError is how TFDS asks for files that must be fetched by hand (ImageNet, for one).
        raise UserError(f"cannot download dataset {name!r}: {error}") from error
    return _find_builder(name, directory)


@contextlib.contextmanager
def _lock(root: pathlib.Path, name: str) -> Iterator[None]:
    """Hold the one lock of this dataset on this machine; the kernel releases it if the holder dies."""
    root.mkdir(parents=True, exist_ok=True)
    with open(root / f".{name.replace('/', '_')}.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _way_out(error: OSError) -> str:
    if error.errno in DISK_FULL or "disk space" in str(error):
        return "Free space on that disk, or set --config.data.dir to another."
    if error.errno in NOT_WRITABLE:
        return "Set --config.data.dir to a directory that you can write."
    return "If this machine has no network, prepare the dataset on one that has, and copy its directory here."


def _read(builder: tfds.core.DatasetBuilder, split: str, keys: set[str]) -> Sequence[dict]:
    """Return the records of a split; images other than those of `keys` stay as stored, for decoding takes its time."""
    features: Any = builder.info.features
    images = {name for name, feature in features.items() if isinstance(feature, tfds.features.Image)}
    decoders = {name: tfds.decode.SkipDecoding() for name in images - keys}
    return builder.as_data_source(split, decoders=decoders)  # pyright: ignore  # it does not see the arguments


def _check(builder: tfds.core.DatasetBuilder, name: str, split: str) -> None:
    formats = {file_format.value for file_format in builder.info.available_file_formats()}
    if FILE_FORMAT not in formats:
        stored = ", ".join(sorted(formats)) or "an incomplete copy"
        raise UserError(
            f"dataset {name!r} in {builder.data_dir} is stored as {stored}, which has no random access.  "
            f"Set --config.data.dir to another directory to prepare it anew, or convert it: "
            f"tfds convert_format --dataset_version_dir={builder.data_dir} --out_file_format={FILE_FORMAT}"
        )
    features: Any = builder.info.features
    missing = [key for key in ("image", "label") if key not in features]
    if "image" in missing and "moments" in features:
        missing.remove("image")
    if missing:
        raise UserError(
            f"dataset {name!r} has no feature {' and no '.join(map(repr, missing))}, only "
            f"{', '.join(features)}: choose a dataset of labelled images (config.data.name)"
        )
    options = f"(config.data.split, config.evaluation.split); there are {', '.join(builder.info.splits)}"
    try:
        num_examples = builder.info.splits[split].num_examples
    except (KeyError, ValueError) as error:
        raise UserError(f"no split {split!r} of dataset {name!r} {options}") from error
    if num_examples == 0:
        raise UserError(f"split {split!r} of dataset {name!r} is empty {options}")


def _check_extra(builder: tfds.core.DatasetBuilder, name: str, extra: Extra) -> None:
    features: Any = builder.info.features
    if extra.key not in features:
        raise UserError(
            f"dataset {name!r} (config.data.name) has no feature {extra.key!r}, only {', '.join(features)}: "
            f"{extra.remedy}"
        )
    feature = features[extra.key]
    fits = len(feature.shape) == len(extra.shape) and all(
        size is not None and wanted in (None, size) for size, wanted in zip(feature.shape, extra.shape, strict=True)
    )
    if not fits or not np.issubdtype(feature.np_dtype, extra.kind):
        raise UserError(
            f"feature {extra.key!r} of dataset {name!r} (config.data.name) is {feature}, but it must be "
            f"{extra.kind.__name__} of shape {extra.shape}: {extra.remedy}"
        )
