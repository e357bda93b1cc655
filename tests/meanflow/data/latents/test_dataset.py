"""Latents: the same files however the work is divided or interrupted, with the statistics of what is in them."""

import hashlib
import io
import json

import numpy as np
import PIL.Image
import pytest
import tensorflow_datasets as tfds

from meanflow.config import latents as conventions
from meanflow.data.images import pictures
from meanflow.data.latents import dataset, units
from meanflow.errors import UserError

SIZE, SHAPE, NUM = 8, (4, 4, 3), 11
PLAN = dataset.Plan(SIZE, SHAPE, batch_size=3, shard_size=4, flip=True, pixels=True)
SETTINGS = {"vae": "means", "convention": conventions.to_dict(conventions.Convention((0.5,), (2.0, 1.0, 4.0)))}


def encode(images):
    """Return means of 2 x 2 pixels and, as standard deviations, their ranges; batches are always full."""
    assert images.shape == (PLAN.batch_size, SIZE, SIZE, 3) and images.dtype == np.uint8
    blocks = images.reshape(-1, 4, 2, 4, 2, 3).astype(np.float32) / 100
    return np.concatenate([blocks.mean((2, 4)), np.ptp(blocks, (2, 4))], axis=-1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for i in range(NUM):
        image = np.random.default_rng(i).integers(0, 256, (9 + i, 20, 3), np.uint8)
        path = folder / f"class{i % 2}" / f"{i:02}.png"
        path.parent.mkdir(exist_ok=True)
        PIL.Image.fromarray(image).save(path)
    return folder


def make(folder, directory, plan=PLAN, encode=encode, settings=SETTINGS, **where):
    return dataset.make(directory, pictures.open_pictures(str(folder)), encode, plan, settings, **where)


def read(directory):
    source = tfds.builder_from_directory(str(directory)).as_data_source("train")
    return [source[i] for i in range(len(source))]


def digests(directory):
    """Return {path: sha256} of all that is there, hidden files too."""
    files = [path for path in directory.rglob("*") if path.is_file()]
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    directory = tmp_path_factory.mktemp("latents") / "whole"
    assert make(folder, directory) == []
    return directory


def test_records(folder, whole):
    source, found = pictures.open_pictures(str(folder)), read(whole)
    assert len(found) == NUM
    for i, record in enumerate(found):
        image = pictures.centre_crop(source.read(i), SIZE)
        np.testing.assert_array_equal(record["pixels"], image)
        expected, flipped = encode(np.stack([image, image[:, ::-1], image]))[:2]
        assert record["moments"].dtype == np.float32 and record["moments"].shape == (4, 4, 6)
        np.testing.assert_array_equal(record["moments"], expected)
        np.testing.assert_array_equal(record["moments_flip"], flipped)
        assert record["label"] == source.label(i) and record["name"].decode() == source.name(i)
    assert {record["label"] for record in found} == {0, 1}


def test_what_is_not_asked_for(folder, tmp_path):
    make(folder, tmp_path, PLAN._replace(flip=False, pixels=False))
    assert {*read(tmp_path)[0]} == {"moments", "label", "name"}
    assert dataset.read_metadata(str(tmp_path))["flip"] is False


def test_metadata(whole):
    metadata, found = dataset.read_metadata(str(whole)), read(whole)
    mean, std = np.split(np.stack([record["moments"] for record in found]).astype(np.float64), 2, axis=-1)
    np.testing.assert_allclose(metadata.pop("mean"), mean.mean((0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(metadata.pop("std"), np.sqrt(mean.var((0, 1, 2)) + (std**2).mean((0, 1, 2))), rtol=1e-12)
    assert metadata == {
        **SETTINGS, "kind": "latents", "image_size": SIZE, "latent_shape": list(SHAPE), "crop": "centre", "flip": True,
        "pixels": True, "num_images": NUM, "skipped": [], "classes": ["class0", "class1"],
    }  # fmt: skip


def test_std_is_that_of_samples(whole):
    """Not that of the means."""
    moments = np.stack([record["moments"] for record in read(whole)]).repeat(400, 0).astype(np.float64)
    raw = units.sample_posterior(moments, np.random.default_rng(0).normal(size=(*moments.shape[:-1], 3)))
    np.testing.assert_allclose(dataset.read_metadata(str(whole))["std"], raw.std((0, 1, 2)), rtol=0.01)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_processes_make_the_files_of_one(order, folder, whole, tmp_path):
    for process in order:
        assert not (tmp_path / "metadata.json").exists()
        missing = make(folder, tmp_path, process=process, num_processes=2)
        assert bool(missing) == (process == order[0])
    assert digests(tmp_path) == digests(whole)


@pytest.mark.parametrize("num_processes", [1, 2])
@pytest.mark.parametrize("calls", [0, 1, 3, 7, 9])
def test_kills_change_nothing(calls, num_processes, folder, whole, tmp_path):
    """The encoder dies after some calls, at first and in the middle of each shard."""
    count = 0

    def dying(images):
        nonlocal count
        count += 1
        if count > calls:
            raise ZeroDivisionError
        return encode(images)

    with pytest.raises(ZeroDivisionError):
        for process in range(num_processes):
            make(folder, tmp_path, encode=dying, process=process, num_processes=num_processes)
    for process in reversed(range(num_processes)):
        missing = make(folder, tmp_path, process=process, num_processes=num_processes)
    assert missing == [] and digests(tmp_path) == digests(whole)


def test_what_is_there_is_not_made_again(folder, whole):
    assert make(folder, whole, encode=None) == []


def test_batches_begin_with_each_shard(folder, tmp_path):
    sizes = []

    def noted(images):
        sizes.append(int(images.any((1, 2, 3)).sum()))
        return encode(images)

    make(folder, tmp_path, PLAN._replace(flip=False), noted)
    assert sizes == [3, 1, 3, 1, 3]


@pytest.mark.parametrize(
    ("change", "settings", "words"),
    [
        ({"image_size": 6}, {}, r"image_size \(8 there, 6 here\)"),
        ({"crop": "none"}, {}, r"crop \('centre' there, 'none' here\)"),
        ({"flip": False}, {}, r"flip \(True there, False here\)"),
        ({"pixels": False}, {}, r"pixels \(True there, False here\)"),
        ({"latent_shape": (2, 2, 3)}, {}, r"latent_shape \(\[4, 4, 3\] there"),
        ({}, {"vae_digest": "other"}, r"vae_digest \(None there, 'other' here\)"),
    ],
)
def test_other_settings(change, settings, words, folder, whole):
    with pytest.raises(UserError, match=words):
        make(folder, whole, PLAN._replace(**change), settings=SETTINGS | settings)


def test_other_images(folder, whole, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.png").write_bytes((folder / "class0" / "00.png").read_bytes())
    with pytest.raises(UserError, match=r"images \('.*num_images \(11 there, 1 here\)"):
        make(tmp_path, whole)


@pytest.fixture
def broken(folder, tmp_path):
    """Return the images with two broken ones among them."""
    for path in folder.glob("*/*.png"):
        (tmp_path / "images" / path.parent.name).mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / path.parent.name / path.name).write_bytes(path.read_bytes())
    content = (folder / "class0" / "02.png").read_bytes()
    (tmp_path / "images" / "class0" / "02.png").write_bytes(content[: len(content) // 2])
    (tmp_path / "images" / "class1" / "09.png").write_bytes(b"<html>")
    return tmp_path / "images"


def test_a_broken_image_is_an_error(broken, tmp_path):
    with pytest.raises(pictures.BrokenImageError, match="class0/02.png .*leave out such images with --skip_broken"):
        make(broken, tmp_path / "a")


def test_broken_images_can_be_left_out(broken, folder, tmp_path, caplog):
    """Also after the error above, and in whichever process."""
    plan = PLAN._replace(skip_broken=True)
    with pytest.raises(pictures.BrokenImageError):
        make(broken, tmp_path / "a")
    make(broken, tmp_path / "a", plan)
    assert "left out: cannot read the image" in caplog.text and "class1/09.png" in caplog.text
    metadata, found = dataset.read_metadata(str(tmp_path / "a")), read(tmp_path / "a")
    assert metadata["skipped"] == ["class0/02.png", "class1/09.png"] and metadata["num_images"] == len(found) == 9
    assert [record["name"].decode()[7:9] for record in found] == ["00", "04", "06", "08", "10", "01", "03", "05", "07"]
    image = pictures.centre_crop(np.array(PIL.Image.open(folder / "class0" / "04.png")), SIZE)
    np.testing.assert_array_equal(found[1]["moments"], encode(np.stack([image] * 3))[0])
    for process in (1, 0):
        make(broken, tmp_path / "b", plan, process=process, num_processes=2)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")


def test_an_image_of_another_size(folder, tmp_path):
    with pytest.raises(UserError, match="class0/00.png is of 20 x 9 pixels, not 8 x 8") as caught:
        make(folder, tmp_path, PLAN._replace(crop="none", skip_broken=True))
    assert not isinstance(caught.value, pictures.BrokenImageError)


def test_moments_that_cannot_be(folder, tmp_path):
    def spoiled(value, channel):
        def encode_badly(images):
            moments = encode(images)
            moments[1, 2, 2, channel] = value
            return moments

        return encode_badly

    for value, channel in ((np.nan, 0), (np.inf, 5)):
        with pytest.raises(UserError, match="moments of class0/02.png are not finite"):
            make(folder, tmp_path / "a", encode=spoiled(value, channel))
    with pytest.raises(UserError, match="moments of class0/02.png have a standard deviation below 0"):
        make(folder, tmp_path / "a", encode=spoiled(-0.1, 3))
    with pytest.raises(UserError, match=r"moments of shape \(4, 4, 5\) of images of 8 pixels, not \(4, 4, 6\)"):
        make(folder, tmp_path / "a", encode=lambda images: encode(images)[..., :5])


def test_conventions_that_cannot_be(folder, tmp_path):
    for convention, words in (
        ({"shift": [0]}, "is not a latent convention"),
        ({"shift": [0], "scale": [1, 2], "pixels": "unit"}, "scale"),
    ):
        with pytest.raises(UserError, match=words):
            make(folder, tmp_path, settings={"vae": "means", "convention": convention})
    assert not list(tmp_path.iterdir())


def test_metadata_of_other_datasets(folder, datasets_dir, tmp_path):
    assert dataset.read_metadata("digits") is None
    assert dataset.read_metadata(datasets_dir) is None
    (tmp_path / "metadata.json").write_text(json.dumps({"source": "couplings"}))
    assert dataset.read_metadata(str(tmp_path)) is None
    (tmp_path / "settings.json").write_text(json.dumps({"teacher": 1}))
    assert dataset.read_metadata(str(tmp_path)) is None
    (tmp_path / "settings.json").write_text("{")
    with pytest.raises(UserError, match="cannot read .*settings.json"):
        dataset.read_metadata(str(tmp_path))


def test_metadata_before_the_end(folder, tmp_path):
    make(folder, tmp_path, process=0, num_processes=2)
    with pytest.raises(UserError, match=f"dataset {tmp_path} is not whole: run the command"):
        dataset.read_metadata(str(tmp_path))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_data_units(dtype):
    rng = np.random.default_rng(0)
    moments, noise = rng.normal(size=(2, 3, 8)).astype(dtype), rng.normal(size=(2, 3, 4)).astype(dtype)
    raw = units.sample_posterior(moments, noise)
    np.testing.assert_array_equal(raw, moments[..., :4] + moments[..., 4:] * noise)
    for convention in conventions.CONVENTIONS.values():
        z = units.to_data_units(raw, convention)
        assert raw.dtype == z.dtype == units.to_raw(z, convention).dtype == dtype
        expected = (raw - np.array(convention.shift)) * np.array(convention.scale)
        np.testing.assert_allclose(z, expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(units.to_raw(z, convention), raw, rtol=1e-5, atol=2e-6)
    with pytest.raises(UserError, match="one for each of 3 channels"):
        units.to_data_units(raw[..., :3], conventions.CONVENTIONS["imf"])


def test_normalising(whole):
    metadata = dataset.read_metadata(str(whole))
    metadata["convention"]["pixels"] = "unit"
    moments = np.stack([record["moments"] for record in read(whole)]).repeat(400, 0).astype(np.float64)
    raw = units.sample_posterior(moments, np.random.default_rng(0).normal(size=(*moments.shape[:-1], 3)))
    convention = units.normalising(metadata, 0.5)
    assert convention.pixels == "unit"
    z = units.to_data_units(raw, convention)
    np.testing.assert_allclose(z.mean((0, 1, 2)), 0, atol=0.01)
    np.testing.assert_allclose(z.std((0, 1, 2)), 0.5, rtol=0.01)
    with pytest.raises(UserError, match="cannot be normalised"):
        units.normalising(metadata | {"std": [1.0, 0.0, 1.0]})


def test_a_convention_that_the_data_give(folder, whole, tmp_path):
    settings = SETTINGS | {"convention": conventions.to_dict(units.RAW), "normalised": True}
    make(folder, tmp_path, settings=settings)
    metadata = dataset.read_metadata(str(tmp_path))
    assert metadata["convention"] == conventions.to_dict(units.normalising(dataset.read_metadata(str(whole))))


def test_a_constant_image_has_no_deviation(tmp_path):
    """Nor one that rounding makes negative."""
    (tmp_path / "images" / "a").mkdir(parents=True)
    for i in range(3):
        file = io.BytesIO()
        PIL.Image.fromarray(np.full((SIZE, SIZE, 3), 77, np.uint8)).save(file, "PNG")
        (tmp_path / "images" / "a" / f"{i}.png").write_bytes(file.getvalue())
    make(tmp_path / "images", tmp_path / "latents")
    assert max(dataset.read_metadata(str(tmp_path / "latents"))["std"]) < 1e-6


def test_rounding_makes_no_negative_variance():
    note = {"num_images": 1, "num_positions": 1, "sum": [1.0], "squares": [1 - 1e-15], "skipped": []}
    job = dataset.Job(None, None, [], {}, {})
    assert dataset._metadata(job, [note])["std"] == [0.0]
