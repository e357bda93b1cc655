"""Inception's features as a function of images; what the network computes is parity's."""

import numpy as np
import pytest
import torch

from meanflow.errors import UserError
from parity.adapters import frozen_networks
from torch_impl import weights
from torch_impl.features import make_inception
from torch_impl.models.inception import average_pool, max_pool


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """Return a file of random weights."""
    path = tmp_path_factory.mktemp("inception") / "inception.safetensors"
    weights.save(path, frozen_networks.inception_weights(3), {})
    return path


def test_features_in_parts(path):
    images = np.random.RandomState(0).randint(0, 256, size=(3, 20, 24, 3)).astype(np.uint8)
    got = make_inception(path, "torch_fidelity", batch_size=2)(images)
    assert {name: (a.shape, a.dtype) for name, a in got.items()} == {
        "pool": ((3, 2048), np.float32), "logits": ((3, 1008), np.float32),
    }  # fmt: skip
    alone = make_inception(path, "torch_fidelity")(images[2:])
    np.testing.assert_allclose(got["pool"][2:], alone["pool"], rtol=1e-5, atol=1e-6)
    want = frozen_networks.inception("torch", frozen_networks.inception_weights(3))(
        images, frozen_networks.preprocessing.get("torch_fidelity")
    )
    np.testing.assert_allclose(got["logits"], want["logits_unbiased"], rtol=1e-4, atol=1e-5)


def test_grey_images_are_those_of_three_equal_channels(path):
    grey = np.random.RandomState(1).randint(0, 256, size=(1, 8, 8, 1)).astype(np.uint8)
    extract = make_inception(path, "pytorch_fid")
    np.testing.assert_allclose(extract(grey)["pool"], extract(grey.repeat(3, axis=3))["pool"], rtol=1e-5, atol=1e-5)


def test_tf32_is_put_back(path):
    torch.backends.cudnn.allow_tf32 = True
    torch.set_float32_matmul_precision("high")
    try:
        make_inception(path, "pytorch_fid")(np.zeros((1, 8, 8, 1), np.uint8))
        assert torch.backends.cudnn.allow_tf32 and torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_widths_are_known_before_any_image(path):
    assert make_inception(path, "torch_fidelity").widths == {"pool": 2048, "logits": 1008}


def test_mistakes_are_named(path, tmp_path):
    with pytest.raises(UserError, match="choose torch_fidelity"):
        make_inception(path, "none")
    with pytest.raises(UserError, match="Inception takes uint8"):
        make_inception(path, "torch_fidelity")(np.zeros((1, 8, 8, 3)))
    weights.save(tmp_path / "other.safetensors", {"fc.weight": np.zeros((1008, 2048), np.float32)}, {})
    with pytest.raises(UserError, match="lack Conv2d_1a_3x3"):
        make_inception(tmp_path / "other.safetensors", "torch_fidelity")


def test_pools():
    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    assert average_pool(x)[0, 0, 0, 0] == (0 + 1 + 4 + 5) / 4  # the padding is not counted
    assert average_pool(x)[0, 0, 1, 1] == 5
    assert max_pool(-x)[0, 0, 0, 0] == 0 and max_pool(-x)[0, 0, 3, 3] == -10
