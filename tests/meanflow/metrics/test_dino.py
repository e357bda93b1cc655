"""The features of FD-DINOv2 are class tokens of transformers' network, at the positions of the official one."""

import shutil

import numpy as np
import PIL.Image
import pytest
import torch
import transformers

from meanflow.errors import UserError
from meanflow.metrics import dino
from meanflow.metrics.extractor import Extractor

PATCH = 56
GRID = dino.SIDE // PATCH  # 4
WIDTH, ATOL = 16, 2e-5  # for features of 0.5 in the mean
MEAN, STD = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


def save(path, grid, kind="Dinov2", **options):
    """Save a tiny DINOv2 whose positions are of grid x grid patches, with weights of a size at which all matter."""
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=2, patch_size=PATCH, image_size=PATCH * grid,
        **options,
    )  # fmt: skip
    model, rng = getattr(transformers, f"{kind}Model")(config), torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=rng)
    model.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """Return the directory of a DINOv2 that has a position for each patch of an image of 224 pixels."""
    return save(tmp_path_factory.mktemp("dinov2"), GRID)


def images(size, num=3, channels=3):
    """Return photographs of a kind: smooth, and of many values."""
    small = np.random.default_rng(0).uniform(0, 255, (num, 5, 5, channels)).astype(np.float32)
    resized = torch.nn.functional.interpolate(torch.tensor(small).permute(0, 3, 1, 2), size, mode="bilinear")
    return resized.permute(0, 2, 3, 1).numpy().astype(np.uint8)


def prepared(images):
    """Return images as the network expects them, [b 3 224 224], by Pillow's bicubic, which is antialiased."""
    planes = [[PIL.Image.fromarray(image[..., c].astype(np.float32)) for c in range(3)] for image in images]
    resized = [[np.asarray(p.resize((dino.SIDE,) * 2, PIL.Image.Resampling.BICUBIC)) for p in row] for row in planes]
    x = np.moveaxis(np.stack(resized), 1, -1) / 255
    return torch.tensor((x - MEAN) / STD, dtype=torch.float32).permute(0, 3, 1, 2)


@torch.no_grad()
def class_tokens(model, x):
    return model.eval()(x).last_hidden_state[:, 0].numpy()


@pytest.mark.parametrize("size", [dino.SIDE, 32, (64, 48)])
def test_features_are_class_tokens_of_transformers(path, size):
    x = images(size)
    extract = dino.load(path)
    assert isinstance(extract, Extractor) and extract.widths == {"dino": WIDTH}
    found = extract(x)
    assert set(found) == {"dino"} and found["dino"].shape == (3, WIDTH) and found["dino"].dtype == np.float32
    expected = class_tokens(transformers.Dinov2Model.from_pretrained(path), prepared(x))
    np.testing.assert_allclose(found["dino"], expected, atol=ATOL)
    assert np.abs(expected[0] - expected[1]).max() > 100 * ATOL


def test_large_images_are_reduced_with_a_low_pass_filter(path):
    """Pillow's cubic has a = -0.5, as PyTorch's antialiased one does."""
    x = np.random.default_rng(0).integers(0, 256, (2, 450, 450, 3), np.uint8)
    expected = class_tokens(transformers.Dinov2Model.from_pretrained(path), prepared(x))
    np.testing.assert_allclose(dino.load(path)(x)["dino"], expected, atol=ATOL)


@pytest.mark.parametrize("size", [9, 3])
def test_positions_are_resampled_as_the_official_network_does(tmp_path, size):
    """From more patches, as the published one has, 37x37, and from fewer; the class token's stays.

    Output pixel i of F.interpolate lies at (i + 1/2) / scale - 1/2, of the scale that is given: (4 + 0.1) / size.
    """
    path = save(tmp_path, size)
    model = transformers.Dinov2Model.from_pretrained(path)
    table = model.embeddings.position_embeddings.detach()
    rows = torch.tensor(cubic(size, GRID, (GRID + 0.1) / size), dtype=torch.float32)
    patches = torch.einsum("ih,jw,hwd->ijd", rows, rows, table[0, 1:].reshape(size, size, WIDTH))
    model.embeddings.position_embeddings = torch.nn.Parameter(torch.cat([table[0, :1], patches.flatten(0, 1)])[None])
    dino.resample_positions(ours := transformers.Dinov2Model.from_pretrained(path).embeddings, GRID)
    np.testing.assert_allclose(
        ours.position_embeddings.detach(), model.embeddings.position_embeddings.detach(), atol=1e-5
    )
    x = images(40)
    np.testing.assert_allclose(dino.load(path)(x)["dino"], class_tokens(model, prepared(x)), atol=ATOL)


def test_positions_of_the_published_network():
    """Of its grid: those of F.interpolate by the factor 16.1 / 37, as the official code calls it."""
    table = torch.randn(1, 1 + 37**2, 8, generator=torch.Generator().manual_seed(0))
    embeddings = torch.nn.Module()
    embeddings.position_embeddings = torch.nn.Parameter(table)
    dino.resample_positions(embeddings, 16)
    found = embeddings.position_embeddings.detach()
    assert found.shape == (1, 1 + 16**2, 8)
    patches = table[:, 1:].reshape(1, 37, 37, 8).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(patches, scale_factor=(16.1 / 37, 16.1 / 37), mode="bicubic")
    np.testing.assert_array_equal(found[:, 1:].reshape(1, 16, 16, 8).permute(0, 3, 1, 2), expected)
    np.testing.assert_array_equal(found[:, 0], table[:, 0])


def cubic(old, new, scale):
    """Return the matrix [new old] of cubic convolution with a = -0.75, which repeats the border and has no filter."""

    def weight(x, a=-0.75):
        x = abs(x)
        if x <= 1:
            return (a + 2) * x**3 - (a + 3) * x**2 + 1
        return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0

    matrix = np.zeros((new, old))
    for i in range(new):
        centre = (i + 0.5) / scale - 0.5
        for j in range(int(np.floor(centre)) - 1, int(np.floor(centre)) + 3):
            matrix[i, np.clip(j, 0, old - 1)] += weight(centre - j)
    return matrix


def test_positions_of_the_same_grid_stay(path):
    model = transformers.Dinov2Model.from_pretrained(path)
    before = model.embeddings.position_embeddings
    dino.resample_positions(model.embeddings, GRID)
    assert model.embeddings.position_embeddings is before


def test_register_tokens_change_nothing_but_the_network(tmp_path):
    path = save(tmp_path, GRID, "Dinov2WithRegisters", num_register_tokens=2)
    x = images(32)
    expected = class_tokens(transformers.Dinov2WithRegistersModel.from_pretrained(path), prepared(x))
    np.testing.assert_allclose(dino.load(path)(x)["dino"], expected, atol=ATOL)


def test_grey_images(path):
    extract, grey = dino.load(path), images(32, channels=1)
    np.testing.assert_allclose(extract(grey)["dino"], extract(grey.repeat(3, axis=3))["dino"], atol=ATOL)


def test_batches_change_nothing(path, monkeypatch):
    sizes, encode, x = [], dino.encode, images(32, num=5)
    monkeypatch.setattr(dino, "encode", lambda model, images: sizes.append(len(images)) or encode(model, images))
    found = dino.load(path, batch_size=2)(x)["dino"]
    assert sizes == [2, 2, 1]
    np.testing.assert_allclose(found, dino.load(path)(x)["dino"], atol=1e-6)
    assert sizes == [2, 2, 1, 5]


def test_a_network_that_cannot_be_read(path, tmp_path):
    with pytest.raises(UserError, match=rf"cannot load network '{tmp_path}/no' \(config.evaluation.dino\)"):
        dino.load(f"{tmp_path}/no")
    shutil.copytree(path, tmp_path / "other")
    (tmp_path / "other" / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match=r"\(config.evaluation.dino\) is a bert; give one of dinov2 or"):
        dino.load(str(tmp_path / "other"))
