"""Pictures: each pixel where it belongs."""

import numpy as np
import PIL.Image
import pytest

from meanflow.errors import UserError
from meanflow.sampling import grids


def test_to_uint8_undoes_the_loader():
    stored = np.arange(256, dtype=np.uint8)
    units = stored.astype(np.float32) / np.float32(127.5) - np.float32(1)
    np.testing.assert_array_equal(grids.to_uint8(units), stored)


def test_to_uint8_clips():
    np.testing.assert_array_equal(grids.to_uint8(np.array([-3.0, -1.0, 1.0, 1.01])), [0, 0, 255, 255])


def test_roundings():
    levels = np.array([-1.0, -0.999, -0.996, 0.0, 0.25, 0.9999, 1.0])  # 0, 0.13, 0.51, 127.5, 159.4, 254.99 and 255
    want = {
        "round": [0, 0, 1, 128, 159, 255, 255], "shift": [0, 0, 1, 128, 159, 255, 255],
        "floor": [0, 0, 0, 127, 159, 254, 255],
    }  # fmt: skip
    for rounding, expected in want.items():
        np.testing.assert_array_equal(grids.to_uint8(levels, rounding), expected)
    np.testing.assert_array_equal(grids.to_uint8(np.array([-2.0, 2.0]), "floor"), [0, 255])


def test_cells_are_filled_row_by_row():
    images = np.stack([np.full((2, 3, 1), value) for value in (-0.5, 0.0, 0.5)])
    picture = grids.grid(images, columns=2, padding=1, scale=1)
    assert picture.shape == (2 * 3 + 1, 2 * 4 + 1, 1)
    assert picture.dtype == np.uint8
    cell = {value: np.full((2, 3), grids.to_uint8(np.array(value))) for value in (-0.5, 0.0, 0.5)}
    np.testing.assert_array_equal(picture[1:3, 1:4, 0], cell[-0.5])
    np.testing.assert_array_equal(picture[1:3, 5:8, 0], cell[0.0])
    np.testing.assert_array_equal(picture[4:6, 1:4, 0], cell[0.5])
    assert not picture[4:6, 5:8].any()
    assert not picture[[0, 3, 6]].any()


def test_small_images_are_magnified_and_the_grid_is_near_a_square():
    images = np.random.default_rng(0).uniform(-1, 1, (10, 8, 8, 3))
    picture = grids.grid(images)
    assert picture.shape == (3 * 33 + 1, 4 * 33 + 1, 3)
    np.testing.assert_array_equal(picture[1:33:4, 1:33:4], grids.to_uint8(images[0]))
    np.testing.assert_array_equal(picture[1:5, 1:5], np.broadcast_to(picture[1, 1], (4, 4, 3)))
    assert grids.grid(np.zeros((1, 64, 64, 3)), padding=0).shape == (64, 64, 3)


@pytest.mark.parametrize(("channels", "shown"), [(1, 1), (2, 1), (3, 3), (4, 3)])
def test_channels(channels, shown):
    images = np.random.default_rng(0).uniform(-1, 1, (1, 32, 32, channels))
    np.testing.assert_array_equal(grids.grid(images, padding=0), grids.to_uint8(images[0, ..., :shown]))


@pytest.mark.parametrize("channels", [1, 3])
def test_save_png(tmp_path, channels):
    images = np.random.default_rng(0).uniform(-1, 1, (4, 8, 8, channels))
    path = tmp_path / "new" / "samples.png"
    grids.save_png(path, images, columns=4)
    np.testing.assert_array_equal(np.asarray(PIL.Image.open(path)), grids.grid(images, columns=4).squeeze())


def test_path_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write .*file/samples.png"):
        grids.save_png(tmp_path / "file" / "samples.png", np.zeros((1, 8, 8, 1)))
    with pytest.raises(UserError, match="cannot write"):
        grids.save_png(tmp_path, np.zeros((1, 8, 8, 1)))


def test_values_that_are_not_finite():
    with pytest.raises(UserError, match="not finite"):
        grids.grid(np.full((1, 8, 8, 1), np.nan))
