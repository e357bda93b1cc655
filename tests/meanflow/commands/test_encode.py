"""The encode commands with an encoder of the test: what is asked of it, and the dataset that the flags describe."""

import functools
import json
import logging
import shutil

import array_record.python.array_record_data_source  # noqa: F401  its flags must not go with those of a test
import numpy as np
import PIL.Image
import pytest
import tensorflow_datasets as tfds
from absl import flags

from meanflow.commands import encode
from meanflow.config import latents, options
from meanflow.data.images import pictures
from meanflow.data.latents.autoencoder import Files
from meanflow.data.latents.dataset import Plan, read_metadata
from meanflow.data.latents.units import RAW
from meanflow.errors import UserError

NUM, SIDE = 7, 8  # images of 11x9 pixels, cropped to 8x8; latents of 4x4x3
SETTINGS = {"latent_channels": 3, "block_out_channels": (4, 4)}


def moments(images):
    """Return means of 2x2 pixels and, as standard deviations, their ranges."""
    blocks = images.reshape(-1, SIDE // 2, 2, SIDE // 2, 2, 3).astype(np.float32) / 100
    return np.concatenate([blocks.mean((2, 4)), np.ptp(blocks, (2, 4))], axis=-1)


@pytest.fixture
def made():
    """Return the list of what encoders are made of."""
    return []


@pytest.fixture
def run(parse_flags, made, monkeypatch, tmp_path):
    """Return a function that encodes as a process of several, by the flags that are given beside the usual ones."""
    names = []
    monkeypatch.setattr(encode.autoencoder, "read", lambda n: names.append(n) or Files(SETTINGS, {}, f"digest of {n}"))
    usual = (f"--source={tmp_path / 'images'}", f"--dest={tmp_path / 'latents'}", f"--image_size={SIDE}")

    def make_encoder(files, pixels, batch_size):
        made.append((files.digest, pixels, batch_size))
        return moments

    def run(*argv, group=(0, 1), usual=usual):
        started = []
        parse_flags(encode.define_flags, *usual, *argv)
        encode.encode(lambda config: started.append(config) or group, make_encoder)
        assert [config.to_dict() for config in started] == [options.get_config().to_dict()] and len(names) == len(made)

    for i in range(NUM):
        path = tmp_path / "images" / f"class{i // 3}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(np.random.default_rng(i).integers(0, 256, (11, 9, 3), np.uint8)).save(path)
    return run


@pytest.fixture
def dest(tmp_path):
    return tmp_path / "latents"


def read(directory):
    source = tfds.builder_from_directory(str(directory)).as_data_source("train")
    return [source[i] for i in range(len(source))]


def test_by_default(run, made, dest, capsys):
    """Mirrored twins, no pixels, the convention of Stable Diffusion, ADM's crop."""
    run()
    assert capsys.readouterr().out == f"{dest}\n"
    assert made == [(f"digest of {encode.VAE}", "symmetric", 32)]
    source, records = pictures.open_pictures(str(dest.parent / "images")), read(dest)
    assert len(records) == NUM
    for i, record in enumerate(records):
        assert record.keys() == {"moments", "moments_flip", "label", "name"}
        image = pictures.centre_crop(source.read(i), SIDE)[None]
        np.testing.assert_array_equal(record["moments"], moments(image)[0])
        np.testing.assert_array_equal(record["moments_flip"], moments(image[:, :, ::-1])[0])
        assert (record["label"], record["name"].decode()) == (i // 3, source.name(i))
    metadata = read_metadata(str(dest))
    assert metadata["convention"] == latents.to_dict(latents.CONVENTIONS["sd"])
    assert metadata["vae"] == encode.VAE and metadata["vae_digest"] == made[0][0] and not metadata["normalised"]
    assert tuple(metadata["latent_shape"]) == (4, 4, 3) and metadata["num_images"] == NUM


@pytest.mark.parametrize("name", ["imm", "edm2_of_three"])
def test_the_convention_that_is_named(run, made, dest, name, monkeypatch):
    """Its pixels are what the encoder reads."""
    three = latents.Convention((1.0, 2.0, 3.0), (0.5, 0.25, 2.0), "unit")
    monkeypatch.setitem(latents.CONVENTIONS, "edm2_of_three", three)
    run(f"--convention={name}", "--vae=some/vae", "--batch_size=3")
    assert made == [("digest of some/vae", latents.CONVENTIONS[name].pixels, 3)]
    metadata = read_metadata(str(dest))
    assert latents.from_dict(metadata["convention"]) == latents.CONVENTIONS[name] and metadata["vae"] == "some/vae"


def test_a_convention_that_the_data_give(run, made, dest):
    run("--convention=data")
    metadata = read_metadata(str(dest))
    assert made[0][1] == RAW.pixels and metadata["normalised"]
    convention = latents.from_dict(metadata["convention"])
    means = np.stack([record["moments"][..., :3] for record in read(dest)])
    np.testing.assert_allclose(convention.shift, means.mean((0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(np.array(convention.scale) * metadata["std"], 1, rtol=1e-12)


def test_a_convention_of_other_channels(run, dest):
    with pytest.raises(UserError, match="one for each of 3 channels"):
        run("--convention=imf")
    assert not dest.exists()


def test_what_is_asked_for(run, dest, monkeypatch):
    """Images as PNG would take TensorFlow, which is slow to import."""
    plans = []
    monkeypatch.setattr(encode.dataset, "make", lambda *args: plans.append(args[3]) or [])
    run()
    assert plans == [Plan(SIDE, (4, 4, 3), flip=True)]
    run("--noflip", "--pixels", "--crop=none", "--batch_size=3", "--shard_size=5", "--skip_broken")
    assert plans[1:] == [Plan(SIDE, (4, 4, 3), "none", 3, 5, flip=False, pixels=True, skip_broken=True)]
    assert not dest.exists()


def test_images_of_that_size_already(run, dest):
    with pytest.raises(UserError, match=r"class0/0.png is of 9 x 11 pixels, not 8 x 8: crop it \(centre\)"):
        run("--crop=none")


def test_images_that_cannot_be_read(run, dest):
    (dest.parent / "images" / "class1" / "3.png").write_bytes(b"torn")
    with pytest.raises(UserError, match="class1/3.png .*or leave out such images with --skip_broken"):
        run()
    shutil.rmtree(dest)
    run("--skip_broken")
    assert len(read(dest)) == NUM - 1 and read_metadata(str(dest))["skipped"] == ["class1/3.png"]


def test_a_share_of_the_shards(run, dest, capsys, caplog):
    """The dataset is there, and is named, once the last process has ended."""
    caplog.set_level(logging.INFO, "absl")
    run("--shard_size=2", group=(1, 2))
    assert not capsys.readouterr().out and not (dest / "features.json").exists()
    assert f"{dest} misses 2 shards, the first is 0." in caplog.text
    run("--shard_size=2", group=(0, 2))
    assert capsys.readouterr().out == f"{dest}\n" and len(read(dest)) == NUM
    assert len(list(dest.glob("*array_record*"))) == 4


def test_what_a_dataset_was_made_with_is_kept(run, dest):
    """So that nobody goes on with another autoencoder."""
    run()
    settings = json.loads((dest / "settings.json").read_text())
    assert settings["vae_digest"] == f"digest of {encode.VAE}" and settings["crop"] == "centre"
    with pytest.raises(UserError, match="vae"):
        run("--vae=some/vae")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--dest=d",), "^--source is missing: name the images$"),
        (("--source=s",), "^--dest is missing: name the directory to write$"),
    ],
)
def test_flags_that_are_missing(parse_flags, argv, message):
    parse_flags(encode.define_flags, *argv)
    with pytest.raises(UserError, match=message):
        encode.encode(lambda config: pytest.fail("it starts"), functools.partial(pytest.fail, "it encodes"))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--source=no/such",), "no/such is no folder of images and no .zip; as a dataset of TFDS: "),
        (("--image_size=7",), "images of 7 pixels have no latents: give a multiple of 2"),
    ],
)
def test_sources_and_sizes_of_no_sense(run, made, dest, argv, message):
    with pytest.raises(UserError, match=message):
        run(*argv)
    assert not dest.exists() and not made


@pytest.mark.parametrize("argv", ["--convention=vp", "--crop=random", "--image_size=0", "--batch_size=0"])
def test_values_of_no_sense(parse_flags, argv):
    with pytest.raises(flags.IllegalFlagValueError, match=argv.split("=")[0]):
        parse_flags(encode.define_flags, argv)
