"""Saved images: every sample under its own number with its label, whatever the batches and processes."""

import io
import json

import numpy as np
import PIL.Image
import processes
import pytest

from meanflow.commands import evaluate_images
from meanflow.data import label_files
from meanflow.data.images import pictures
from meanflow.errors import UserError
from meanflow.process_group import ProcessGroup, pack
from meanflow.sampling import saving

NUM = 7
IMAGES = np.random.default_rng(0).integers(0, 256, (NUM, 5, 4, 3), np.uint8)
LABELS = np.array([3, 1, 0, 3, 2, 1, 0], np.int32)


def save(directory, kind, parts, images=IMAGES):
    """Save the samples that each process has, in batches; return the paths that they give."""

    def process(group):
        saver = saving.Saver(directory, kind)
        for indices in parts[group.process]:
            saver.add(np.array(indices), images[indices], LABELS[indices])
        return saver.finish(group)

    return processes.run(len(parts), process)


PARTS = [[[[0, 1, 2], [3, 4, 5], [6]]], [[[0, 1], [4, 5]], [[2, 3], [6]]], [[[5, 6, 0]], [], [[1, 2, 3, 4]]]]


@pytest.mark.parametrize("parts", PARTS)
def test_png_files_and_their_labels(tmp_path, parts):
    paths = save(tmp_path / "new" / "samples", "png", parts)
    assert paths == [tmp_path / "new" / "samples" / "dataset.json"] * len(parts)
    expected = {"labels": [[f"{i:06d}.png", int(label)] for i, label in enumerate(LABELS)]}
    assert json.loads(paths[0].read_text()) == expected
    assert sorted(path.name for path in paths[0].parent.glob("*")) == [f"{i:06d}.png" for i in range(NUM)] + [
        "dataset.json"
    ]
    for i, image in enumerate(IMAGES):
        np.testing.assert_array_equal(np.asarray(PIL.Image.open(paths[0].parent / f"{i:06d}.png")), image)


@pytest.mark.parametrize("parts", PARTS)
def test_one_file_of_all(tmp_path, parts):
    paths = save(tmp_path / "new", "npz", parts)
    assert paths == [tmp_path / "new" / "samples_uint8.npz"] * len(parts)
    assert list(paths[0].parent.iterdir()) == paths[:1]
    with np.load(paths[0]) as file:
        assert set(file.files) == {"arr_0", "arr_1"}
        np.testing.assert_array_equal(file["arr_0"], IMAGES)
        np.testing.assert_array_equal(file["arr_1"], LABELS)
        assert file["arr_0"].dtype == np.uint8 and file["arr_1"].dtype == np.int32


def test_only_the_first_process_writes_for_all(tmp_path):
    saver = saving.Saver(tmp_path, "npz")
    saver.add(np.arange(NUM), IMAGES, LABELS)
    path = saver.finish(ProcessGroup(1, 2, lambda part: [part, pack({})]))
    assert path == tmp_path / "samples_uint8.npz" and not list(tmp_path.iterdir())


def test_png_files_are_not_held(tmp_path):
    """Of 50000 images that would be gigabytes."""
    saver = saving.Saver(tmp_path, "png")
    saver.add(np.arange(NUM), IMAGES, LABELS)
    assert len(list(tmp_path.glob("*.png"))) == NUM
    assert all(part.keys() == {"indices", "labels"} for part in saver.parts)


def test_what_is_saved_can_be_read_again(tmp_path):
    """By the commands that judge or encode stored images."""
    save(tmp_path / "png", "png", PARTS[0])
    (path,) = save(tmp_path, "npz", PARTS[0])
    files, images = pictures.open_pictures(str(tmp_path / "png")), evaluate_images.NpzImages(str(path))
    assert len(files) == len(images) == NUM and label_files.INDEX == saving.INDEX
    for i in range(NUM):
        np.testing.assert_array_equal(files.read(i), IMAGES[i])
        np.testing.assert_array_equal(images.read(i), IMAGES[i])
        assert files.label(i) == LABELS[i]


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_grey_and_colour(channels, mode):
    picture = PIL.Image.open(io.BytesIO(saving.png(IMAGES[0, ..., :channels])))
    assert picture.mode == mode and picture.format == "PNG"
    np.testing.assert_array_equal(np.asarray(picture), IMAGES[0, ..., :channels].squeeze())


def test_names_sort_as_numbers_do():
    assert [saving.name(i) for i in (0, np.int64(123), 999_999)] == ["000000.png", "000123.png", "999999.png"]


@pytest.mark.parametrize("kind", saving.KINDS)
def test_a_directory_that_cannot_be_made(tmp_path, kind):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write .*file/samples: .*Free the disk, or choose a path"):
        saving.Saver(tmp_path / "file" / "samples", kind)


def test_a_file_that_cannot_be_written(tmp_path):
    (tmp_path / "000001.png").mkdir()
    with pytest.raises(UserError, match="cannot write .*000001.png"):
        saving.Saver(tmp_path, "png").add(np.arange(NUM), IMAGES, LABELS)


def test_each_image_has_an_index(tmp_path):
    with pytest.raises(ValueError, match="zip"):
        saving.Saver(tmp_path, "png").add(np.arange(NUM - 1), IMAGES, LABELS)
