"""Reads datasets that `records` wrote, without TensorFlow or TFDS, which loader processes would have to import."""

import io
import json
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
from array_record.python.array_record_data_source import ArrayRecordDataSource

from meanflow.data import tf_example
from meanflow.errors import UserError

SETTINGS, FEATURES, INFO = "settings.json", "features.json", "dataset_info.json"
FILE_FORMAT = "array_record"
# How features.json calls the class of a feature and where it has its shape; and what its values are.
CLASSES = {
    "tensor_feature.Tensor": ("array", "tensor"),
    "image_feature.Image": ("image", "image"),
    "scalar.Scalar": ("integer", "tensor"),
    "text_feature.Text": ("text", "text"),
}
DTYPES = {"array": np.float32, "image": np.uint8, "integer": np.int64, "text": np.object_}


class Feature(NamedTuple):
    """How a feature is stored: a key of `DTYPES`, and its shape."""

    kind: str
    shape: tuple[int, ...] = ()

    @property
    def np_dtype(self) -> type[np.generic]:
        """Type of its values."""
        return DTYPES[self.kind]


class Part(NamedTuple):
    """The records of a shard that are in a split, as ArrayRecord takes them."""

    filename: str
    skip: int
    take: int
    examples_in_shard: int


class Records(Sequence):
    """Random access to records {name: value}: arrays float32, images uint8, integers, and texts as bytes."""

    def __init__(self, parts: list[Part], features: dict[str, Feature], encoded: set[str]):
        """encoded: images to leave as they are stored."""
        self._source = ArrayRecordDataSource(parts)  # pyright: ignore  # its protocol lacks `readonly`
        self._features, self._encoded = features, encoded

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        values = tf_example.parse(self._source[range(len(self))[index]])  # IndexError at the end, as of any sequence
        return {name: self._decode(name, values[name][0]) for name in self._features}

    def _decode(self, name: str, value: Any) -> Any:
        kind, shape = self._features[name]
        if kind == "array":
            return np.frombuffer(value, np.float32).reshape(shape)
        if kind == "integer":
            return value
        if kind == "text" or name in self._encoded:
            return bytes(value)
        with PIL.Image.open(io.BytesIO(value)) as image:
            return np.asarray(image).reshape(shape)


class Dataset:
    """A dataset that `records.write` has completed."""

    def __init__(self, directory: str, features: dict[str, Feature]):
        """features: those of its records."""
        self.features, self._directory = features, directory
        info = json.loads(pathlib.Path(directory, INFO).read_text())
        self._name = info["name"]
        self._lengths = {one["name"]: list(map(int, one["shardLengths"])) for one in info["splits"]}
        self.splits = tuple(self._lengths)

    def num_examples(self, split: str) -> int:
        """Return the length of a split.  Raises KeyError or ValueError if there is none of this name."""
        return sum(part.take for part in self._parts(split))

    def read(self, split: str, decoded: set[str]) -> Records:
        """Return the records of a split; images other than `decoded` stay encoded."""
        images = {name for name, feature in self.features.items() if feature.kind == "image"}
        return Records(self._parts(split), self.features, images - decoded)

    def _parts(self, split: str) -> list[Part]:
        if split not in self._lengths:  # train[:90%], say
            import tensorflow_datasets as tfds  # only for these, and never in a loader process

            found = tfds.builder_from_directory(self._directory).info.splits[split].file_instructions
            return [Part(str(one.filename), one.skip, one.take, one.examples_in_shard) for one in found]
        lengths = self._lengths[split]
        name = f"{self._directory}/{self._name}-{split}.{FILE_FORMAT}"
        return [Part(f"{name}-{i:05}-of-{len(lengths):05}", 0, n, n) for i, n in enumerate(lengths)]


def open_dataset(directory: str) -> Dataset | None:
    """Return the dataset in a directory; None unless `records` wrote it.  Raises UserError for one not complete."""
    path = pathlib.Path(directory)
    if not (path / SETTINGS).is_file():
        return None
    if not (path / FEATURES).is_file():
        raise UserError(
            f"dataset {directory} (config.data.name) is not whole: run the command that writes it again, until it "
            "misses no shard"
        )
    try:
        return Dataset(directory, _read_features(path / FEATURES))
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"cannot read {path / INFO} or {path / FEATURES}: {error!r}.  Copy the dataset again"
        ) from error


def _read_features(path: pathlib.Path) -> dict[str, Feature]:
    features = {}
    for name, stored in json.loads(path.read_text())["featuresDict"]["features"].items():
        kind, key = CLASSES[".".join(stored["pythonClassName"].split(".")[-2:])]
        dimensions = stored[key].get("shape", {}).get("dimensions", [])
        features[name] = Feature(kind, tuple(map(int, dimensions)))
    return features
