"""Datasets of our own are read as TFDS reads them, but without it."""

import json
import pickle
import shutil
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds

from meanflow.data import record_reader, records, sources
from meanflow.data.latents import dataset
from meanflow.errors import UserError

NUM = 7
FEATURES = dataset.features((2, 4, 3), flip=True, pixels=8)  # one of each kind


def record(i):
    rng = np.random.default_rng(i)
    moments = rng.normal(size=(2, 2, 4, 6)).astype(np.float32)
    pixels = rng.integers(256, size=(8, 8, 3), dtype=np.uint8)
    return {"moments": moments[0], "moments_flip": moments[1], "pixels": pixels, "label": 1000 * i, "name": f"é/{i}"}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("read") / "latents[1]"
    shards = records.split_into_shards(NUM, 3)
    layout = records.Layout(path, "latents", FEATURES, len(shards))
    records.begin(layout, {})

    def of_shard(number):
        for i in shards[number]:
            yield {**record(i), "pixels": dataset._to_png(record(i)["pixels"])}

    records.write(layout, of_shard)
    return str(path)


def open_dataset(directory):
    found = record_reader.open_dataset(directory)
    assert found is not None
    return found


def assert_same(a, b):
    assert a.keys() == b.keys()
    for key, value in a.items():
        assert type(value) is type(b[key])
        np.testing.assert_array_equal(value, b[key], strict=isinstance(value, np.ndarray))


@pytest.mark.parametrize("decoded", [set(), {"pixels"}])
@pytest.mark.parametrize("split", ["train", "train[2:5]", "train[50%:]"])
def test_as_tfds_reads_them(directory, split, decoded):
    """In value, type and order, whole splits and parts of them."""
    decoders: Any = {} if decoded else {"pixels": tfds.decode.SkipDecoding()}
    builder = tfds.builder_from_directory(directory)
    expected: Any = builder.as_data_source(split, decoders=decoders)  # pyright: ignore
    found = open_dataset(directory).read(split, decoded)
    assert len(found) == len(expected) == open_dataset(directory).num_examples(split)
    for a, b in zip(found, expected, strict=True):
        assert_same(a, b)


def test_what_was_written(directory):
    found = open_dataset(directory)
    assert found.features == FEATURES and found.splits == ("train",)
    for i, read in enumerate(found.read("train", {"pixels"})):
        assert_same(read, record(i) | {"name": f"é/{i}".encode()})


def test_pickled_for_another_process(directory):
    found = open_dataset(directory).read("train", set())
    before = found[6]
    assert_same(pickle.loads(pickle.dumps(found))[6], before)


def test_only_directories_of_our_own(directory, datasets_dir, tmp_path):
    """Others are for TFDS, and so is one of ours whose settings are lost."""
    assert record_reader.open_dataset("digits") is None
    assert record_reader.open_dataset(f"{datasets_dir}/digits/1.0.0") is None
    shutil.copytree(directory, tmp_path / "copy")
    (tmp_path / "copy/settings.json").unlink()
    copy = sources.open_source(str(tmp_path / "copy"), "train", "")
    np.testing.assert_array_equal(copy[5]["moments"], record(5)["moments"])


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("features.json", None, "is not whole: run the command that writes it again"),
        ("features.json", "{", "cannot read .*features.json.*Copy the dataset again"),
        ("dataset_info.json", None, "cannot read .*dataset_info.json"),
        ("dataset_info.json", json.dumps({"name": "latents"}), "KeyError.*splits"),
    ],
)
def test_damaged_files(directory, tmp_path, file, content, words):
    shutil.copytree(directory, tmp_path / "copy")
    (tmp_path / "copy" / file).unlink()
    if content:
        (tmp_path / "copy" / file).write_text(content)
    with pytest.raises(UserError, match=words):
        record_reader.open_dataset(str(tmp_path / "copy"))


def test_a_split_that_is_not_there(directory):
    with pytest.raises(UserError, match="no split 'test' of dataset .*; there are train"):
        sources.open_source(directory, "test", "")
    with pytest.raises(UserError, match="is empty"):
        sources.open_source(directory, "train[:0]", "")
