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
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core.download import download_manager, util

from configs.errors import UserError
from data import (
    digits,  # noqa: F401  TFDS knows a builder once its module is imported
    quiet,
)

FILE_FORMAT = "array_record"
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EEXIST)


@dataclasses.dataclass(frozen=True)
class ImageSource:
    """Random access to one split: `source[i]` is {'image': [h w c] as stored, 'label': int}; images may differ in size.

    Can be pickled, so that loader processes open it for themselves.
    """

    records: Sequence[dict]

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, np.ndarray | int]:
        record = self.records[index]
        return {"image": record["image"], "label": int(record["label"])}


def open_source(name: str, split: str, directory: str) -> ImageSource:
    """Return split `split` of dataset `name`, downloading and preparing it first if need be.

    name: `digits`, any TFDS name (`mnist`, `cifar10`, `cifar10_corrupted/fog_1`), a builder of your own whose module
        has been imported (in the config file, say), or the path of a prepared directory (.../name/1.0.0).
    split: a TFDS split: `train`, `test`, `train[:90%]`.
    directory: where TFDS keeps datasets; empty: TFDS_DATA_DIR, else ~/tensorflow_datasets.
    Processes of one machine may call it at once: one prepares, the others wait for it.
    Raises UserError: unknown name or split, no `image` or `label`, stored in a format without random access,
        download impossible, directory not writable, disk full.
    """
    builder = _open(name, directory)
    _check(builder, name, split)
    return ImageSource(builder.as_data_source(split))  # pyright: ignore  # a subclass takes the source


def split_names(name: str, directory: str) -> tuple[str, ...]:
    """Return the splits of a dataset, preparing it first if need be.  Arguments and errors as `open_source`."""
    return tuple(_open(name, directory).info.splits)


def _open(name: str, directory: str) -> tfds.core.DatasetBuilder:
    """Return the builder of a dataset that is on disk."""
    quiet.silence_tensorflow()
    builder = _find_builder(name, directory)
    if builder.data_path.exists():
        return builder
    return _prepare(name, directory, pathlib.Path(builder.data_dir_root))


def _find_builder(name: str, directory: str) -> tfds.core.DatasetBuilder:
    if pathlib.Path(name, "features.json").is_file():
        return tfds.builder_from_directory(name)
    data_dir = os.path.expanduser(directory) or None
    try:
        return tfds.builder(name, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError as error:
        close = difflib.get_close_matches(name, tfds.list_builders(with_community_datasets=False), cutoff=0.7)
        hint = f"did you mean {' or '.join(close)}?" if close else "see https://www.tensorflow.org/datasets/catalog"
        raise UserError(
            f"no dataset {name!r} (config.data.name): {hint}  A builder of your own is known once the config file "
            "imports its module."
        ) from error
    except (ValueError, AssertionError) as error:  # TFDS's own words on a malformed name, a wrong config or version
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
