"""What evaluation pipelines do to images: resizing as in their own code, and names that are known."""

import numpy as np
import pytest
import torch

from meanflow.errors import UserError
from meanflow.metrics import preprocessing


@pytest.mark.parametrize("size", [1, 8, 32, 299, 400])
def test_half_pixel_is_that_of_pytorch(size):
    axis = np.random.RandomState(0).normal(size=size)
    want = torch.nn.functional.interpolate(torch.from_numpy(axis)[None, None], 299, mode="linear", align_corners=False)
    np.testing.assert_allclose(preprocessing.resize_matrix(size, "half_pixel") @ axis, want[0, 0], atol=1e-12)


@pytest.mark.parametrize("size", [1, 8, 32, 299, 400])
def test_tf1_samples_at_multiples_of_the_scale(size):
    axis = np.random.RandomState(0).normal(size=size)
    places = np.arange(299) * size / 299
    want = np.interp(places, np.arange(size), axis)  # which repeats the last beyond the border
    np.testing.assert_allclose(preprocessing.resize_matrix(size, "tf1") @ axis, want, atol=1e-12)


def test_images_of_the_right_size_stay_as_they_are():
    for resize in ("tf1", "half_pixel"):
        np.testing.assert_allclose(preprocessing.resize_matrix(299, resize), np.eye(299), atol=1e-12)


def test_names():
    assert preprocessing.get("torch_fidelity").resize == "tf1"
    with pytest.raises(UserError, match="choose torch_fidelity | jax_meanflow | pytorch_fid"):
        preprocessing.get("clean_fid")


def test_images():
    preprocessing.check_images(np.zeros((0, 2, 2, 1), np.uint8))
    for images in (np.zeros((1, 2, 2, 3)), np.zeros((1, 2, 2, 4), np.uint8), np.zeros((2, 2, 3), np.uint8)):
        with pytest.raises(UserError, match="Inception takes uint8"):
            preprocessing.check_images(images)
