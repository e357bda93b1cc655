"""Opening datasets by name, and what a user is told when that fails."""

import concurrent.futures
import errno
import time

import numpy as np
import pytest
import requests
import tensorflow_datasets as tfds
from etils import epath

from meanflow.config.features import Feature
from meanflow.data import sources
from meanflow.data.images import tfds_images
from meanflow.errors import UserError


class ColourPatches(tfds.core.GeneratorBasedBuilder):
    """12x12 RGB images of three classes; image i is filled with i."""

    VERSION = tfds.core.Version("1.0.0")
    pkg_dir_path = epath.Path(__file__).parent  # TFDS looks it up by itself only for a module inside a package

    def _info(self):
        features = {"image": tfds.features.Image(shape=(12, 12, 3)), "label": tfds.features.ClassLabel(num_classes=3)}
        return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(30), "validation": self._generate_examples(9)}

    def _generate_examples(self, num):
        for i in range(num):
            yield i, {"image": np.full((12, 12, 3), i, np.uint8), "label": i % 3}


class UnlabelledPatches(ColourPatches):
    """The same without labels."""

    def _info(self):
        features = {"image": tfds.features.Image(shape=(12, 12, 3))}
        return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))

    def _generate_examples(self, num):
        for i in range(num):
            yield i, {"image": np.full((12, 12, 3), i, np.uint8)}


class DescribedPatches(ColourPatches):
    """The same with features of four tokens, and images beside them, of which some may be of any size."""

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=(12, 12, 3)), "label": tfds.features.ClassLabel(num_classes=3),
            "features": tfds.features.Tensor(shape=(4, 2), dtype=np.float16, encoding="bytes"),
            "pixels": tfds.features.Image(shape=(6, 6, 3)), "sketch": tfds.features.Image(shape=(None, None, 3)),
        }  # fmt: skip
        return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))

    def _generate_examples(self, num):
        for i, example in super()._generate_examples(num):
            pixels = np.full((6, 6, 3), 100 + i, np.uint8)
            yield i, example | {"features": np.full((4, 2), i, np.float16), "pixels": pixels, "sketch": pixels}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Holds `colour_patches` and `described_patches`."""
    path = str(tmp_path_factory.mktemp("datasets"))
    sources.open_source("colour_patches", "train", path)
    sources.open_source("described_patches", "train", path)
    return path


def values(source):
    return {int(source[i]["image"][0, 0, 0]) for i in range(len(source))}


def test_builder_of_ones_own(directory):
    source = sources.open_source("colour_patches", "train", directory)
    assert values(source) == set(range(30))
    for i in range(30):
        record = source[i]
        assert set(record) == {"image", "label"}
        assert record["image"].shape == (12, 12, 3)
        assert record["label"] == record["image"][0, 0, 0] % 3


@pytest.mark.parametrize(
    ("key", "shape", "kind", "value"),
    [("features", (4, 2), np.floating, 0), ("pixels", (None, None, 3), np.uint8, 100)],
)
def test_one_more_feature(directory, key, shape, kind, value):
    source = sources.open_source("described_patches", "train", directory, Feature(key, shape, kind, ""))
    for record in (source[i] for i in range(30)):
        assert set(record) == {"image", "label", key}
        np.testing.assert_array_equal(record[key], value + int(record["image"][0, 0, 0]))


def test_nothing_is_paid_for_features_that_are_not_asked_for(directory):
    source = sources.open_source("described_patches", "train", directory)
    assert set(source[0]) == {"image", "label"}
    assert isinstance(source.records[0]["pixels"], bytes)  # not decoded


@pytest.mark.parametrize(
    ("key", "shape", "kind", "words"),
    [
        ("depth", (4, 2), np.floating, "described_patches.* has no feature 'depth', only .*image.*: the way out"),
        ("features", (4, 3), np.floating, r"float16.* must be floating of shape \(4, 3\): the way out"),
        ("features", (4,), np.floating, r"'features' of dataset 'described_patches'.* shape \(4,\)"),
        ("features", (4, 2), np.float32, "must be float32"),
        ("sketch", (None, None, 3), np.uint8, r"None.* must be uint8 of shape \(None, None, 3\)"),
    ],
)
def test_one_more_feature_that_is_not_there(directory, key, shape, kind, words):
    with pytest.raises(UserError, match=words):
        sources.open_source("described_patches", "train", directory, Feature(key, shape, kind, "the way out"))


def test_part_of_a_split(directory):
    first = sources.open_source("colour_patches", "train[:20%]", directory)
    rest = sources.open_source("colour_patches", "train[20%:]", directory)
    assert len(first) == 6
    assert values(first) | values(rest) == set(range(30))


def test_prepared_directory_by_path(directory):
    source = sources.open_source(f"{directory}/colour_patches/1.0.0", "validation", "")
    assert values(source) == set(range(9))


def test_split_names(directory):
    assert sources.split_names("colour_patches", directory) == ("train", "validation")


def test_first_use_by_several_at_once_prepares_once(tmp_path, monkeypatch):
    """The others wait for the first, rather than prepare a second time or read half a dataset."""
    prepare, calls = ColourPatches.download_and_prepare, []

    def slow(self, **kwargs):
        calls.append(1)
        time.sleep(0.2)
        prepare(self, **kwargs)

    monkeypatch.setattr(ColourPatches, "download_and_prepare", slow)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        opened = [pool.submit(sources.open_source, "colour_patches", "train", str(tmp_path)) for _ in range(4)]
    assert [len(one.result()) for one in opened] == [30] * 4
    assert len(calls) == 1


def test_preparing_leaves_stdout_alone(tmp_path, capsys):
    sources.open_source("colour_patches", "train", str(tmp_path))
    assert capsys.readouterr().out == ""


def test_a_read_only_copy_is_enough(directory, monkeypatch):
    """A prepared dataset takes no lock, so that it may lie where nothing can be written."""
    monkeypatch.setattr(tfds_images, "_lock", None)
    assert len(sources.open_source("colour_patches", "train", directory)) == 30


@pytest.mark.parametrize(
    ("name", "split", "words"),
    [
        ("colour_patchs", "train", ["colour_patchs", "did you mean colour_patches"]),
        ("qqqqzzzz", "train", ["qqqqzzzz", "catalog", "imports its module"]),
        ("not a name!", "train", ["not a name!", "config.data.name"]),
        ("/no/such-folder", "train", ["/no/such-folder (config.data.name) is not the directory of a dataset"]),
        ("colour_patches:9.9.9", "train", ["colour_patches:9.9.9", "1.0.0"]),
        ("colour_patches", "trian", ["'trian'", "config.data.split", "train, validation"]),
        ("colour_patches", "train[:0]", ["'train[:0]'", "is empty"]),
        ("unlabelled_patches", "train", ["unlabelled_patches", "no feature 'label'"]),
        ("imagenet2012", "train", ["imagenet2012", "ILSVRC2012_img_train.tar"]),  # to be fetched by hand
    ],
)
def test_errors_name_the_thing_and_the_way_out(directory, name, split, words):
    with pytest.raises(UserError) as error:
        sources.open_source(name, split, directory)
    for word in words:
        assert word in str(error.value)


def test_other_file_format(tmp_path):
    tfds.builder("colour_patches", data_dir=tmp_path).download_and_prepare(file_format="tfrecord")
    with pytest.raises(UserError, match=r"stored as tfrecord.*--config.data.dir.*tfds convert_format"):
        sources.open_source("colour_patches", "train", str(tmp_path))


def test_directory_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"/file/data.*--config.data.dir to a directory that you can write"):
        sources.open_source("digits", "train", str(tmp_path / "file" / "data"))


@pytest.mark.parametrize(
    ("failure", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left.*Free space"),
        (OSError("Not enough disk space. Needed: 1 GiB"), "Not enough disk space.*Free space"),
        (
            RuntimeError(
                'Failed to finalize writing of split "train": write() failed: No space left on device; at byte 9'
            ),
            "patches' in .*: No space left on device.  Free space",
        ),
        (requests.exceptions.ConnectionError("Failed to resolve 'host'"), "Failed to resolve.*no network"),
    ],
)
def test_preparation_that_fails(tmp_path, monkeypatch, failure, words):
    def fail(self, **kwargs):
        raise failure

    monkeypatch.setattr(ColourPatches, "download_and_prepare", fail)
    with pytest.raises(UserError, match=words):
        sources.open_source("colour_patches", "train", str(tmp_path))
