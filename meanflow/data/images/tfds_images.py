"""Opens datasets of TFDS, by name or directory, preparing them in ArrayRecord on first use."""

import contextlib
import difflib
import errno
import fcntl
import os
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import tensorflow_datasets as tfds
from tensorflow_datasets.core.download import download_manager, util

from meanflow import tensorflow_logging
from meanflow.data.images import digits  # noqa: F401  importing the module registers its builder
from meanflow.data.record_reader import FEATURES, FILE_FORMAT
from meanflow.errors import UserError

FREE_SPACE = "Free space on that disk, or set --config.data.dir to another."
UNWRITTEN = "write() failed: "  # in the RuntimeErrors of array_record
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EEXIST)


class TfdsDataset:
    """A dataset of TFDS that is on disk."""

    def __init__(self, builder: tfds.core.DatasetBuilder):
        self.features: Any = builder.info.features
        self.splits = tuple(builder.info.splits)
        self._builder = builder

    def num_examples(self, split: str) -> int:
        """Return the length of a split.  Raises KeyError or ValueError if there is none of this name."""
        return self._builder.info.splits[split].num_examples

    def read(self, split: str, decoded: set[str]) -> Sequence[dict]:
        """Return the records of a split; images other than `decoded` stay encoded: decoding takes time."""
        images = {name for name, feature in self.features.items() if isinstance(feature, tfds.features.Image)}
        decoders = {name: tfds.decode.SkipDecoding() for name in images - decoded}
        return self._builder.as_data_source(split, decoders=decoders)  # pyright: ignore  # it does not see the arguments


def open_dataset(name: str, directory: str, remedy: str = "") -> TfdsDataset:
    """Return a dataset, prepared first if necessary.  Arguments and errors as `sources.open_source`.

    remedy: what a message adds if there is no dataset of this name.
    """
    tensorflow_logging.silence_tensorflow()
    builder = _find_builder(name, directory, remedy)
    if not builder.data_path.exists():
        builder = _prepare(name, directory, pathlib.Path(builder.data_dir_root))
    formats = {file_format.value for file_format in builder.info.available_file_formats()}
    if FILE_FORMAT not in formats:
        stored = ", ".join(sorted(formats)) or "an incomplete copy"
        raise UserError(
            f"dataset {name!r} in {builder.data_dir} is stored as {stored}, which has no random access.  "
            f"Set --config.data.dir to another directory to prepare it anew, or convert it: "
            f"tfds convert_format --dataset_version_dir={builder.data_dir} --out_file_format={FILE_FORMAT}"
        )
    return TfdsDataset(builder)


def _find_builder(name: str, directory: str, remedy: str = "") -> tfds.core.DatasetBuilder:
    if pathlib.Path(name, FEATURES).is_file():
        return tfds.builder_from_directory(name)
    remedy = remedy and f"  {remedy[0].upper()}{remedy[1:]}"
    data_dir = os.path.expanduser(directory) or None
    try:
        return tfds.builder(name, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError as error:
        if os.sep in name:
            raise UserError(f"{name} (config.data.name) is not the directory of a dataset.{remedy}") from error
        close = difflib.get_close_matches(name, tfds.list_builders(with_community_datasets=False), cutoff=0.7)
        hint = f"did you mean {' or '.join(close)}?" if close else "see https://www.tensorflow.org/datasets/catalog"
        raise UserError(
            f"no dataset {name!r} (config.data.name): {hint}  A builder of your own is known once the config file "
            f"imports its module.{remedy}"
        ) from error
    except (ValueError, AssertionError) as error:  # raised by TFDS for a malformed name, a wrong config or version
        if os.sep in name and not name.partition(os.sep)[0].isidentifier():
            raise UserError(f"{name} (config.data.name) is not the directory of a dataset.{remedy}") from error
        raise UserError(f"cannot open dataset {name!r} (config.data.name): {error}") from error


def _prepare(name: str, directory: str, root: pathlib.Path) -> tfds.core.DatasetBuilder:
    """Write the dataset below `root` unless another process does; return a builder of the prepared dataset."""
    try:
        # TFDS writes to stdout, which is reserved for the results of a command.
        with _lock(root, name), contextlib.redirect_stdout(sys.stderr):
            builder = _find_builder(name, directory)
            if not builder.data_path.exists():
                builder.download_and_prepare(file_format=FILE_FORMAT)
    except OSError as error:
        raise UserError(f"cannot prepare dataset {name!r} in {root}: {error}.  {_way_out(error)}") from error
    except RuntimeError as error:  # of array_record's writer
        if UNWRITTEN not in str(error):
            raise
        reason = str(error).split(UNWRITTEN)[1].split(";")[0]
        raise UserError(f"cannot prepare dataset {name!r} in {root}: {reason}.  {FREE_SPACE}") from error
    except (AssertionError, util.DownloadError, download_manager.NonMatchingChecksumError) as error:
        # TFDS raises AssertionError for files that must be fetched by hand (ImageNet, for example).
        raise UserError(f"cannot download dataset {name!r}: {error}") from error
    return _find_builder(name, directory)


@contextlib.contextmanager
def _lock(root: pathlib.Path, name: str) -> Iterator[None]:
    """Hold the lock of this dataset on this machine; the kernel releases it if the holder dies."""
    root.mkdir(parents=True, exist_ok=True)
    with open(root / f".{name.replace('/', '_')}.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _way_out(error: OSError) -> str:
    if error.errno in DISK_FULL or "disk space" in str(error):
        return FREE_SPACE
    if error.errno in NOT_WRITABLE:
        return "Set --config.data.dir to a directory that you can write."
    return "If this machine has no network, prepare the dataset on one that has, and copy its directory here."
