"""Images that are removed or replaced while latents are made of them: the command goes on and names them."""

import io
from typing import Any

import numpy as np
import PIL.Image
import pytest
import tensorflow_datasets as tfds

from meanflow.config import latents as conventions
from meanflow.data.images import manifest, pictures
from meanflow.data.latents import dataset
from meanflow.errors import UserError

PLAN = dataset.Plan(4, (2, 2, 1), batch_size=2, shard_size=3)
SETTINGS = {"vae": "means", "convention": conventions.to_dict(conventions.Convention((0.0,), (1.0,)))}
NAMES = [f"{label}/{i}.png" for label in range(2) for i in range(4)]


def encode(images):
    means = images[..., :1].reshape(-1, 2, 2, 2, 2, 1).mean((2, 4), np.float32)
    return np.concatenate([means, means], axis=-1)


def metadata(dest):
    found = dataset.read_metadata(str(dest))
    assert found
    return found


def png(level):
    file = io.BytesIO()
    PIL.Image.fromarray(np.full((4, 4, 3), level, np.uint8)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def folder(tmp_path):
    """Return a folder of eight images in shards of three, of which the sixth is broken."""
    for i, name in enumerate(NAMES):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / name).write_bytes(png(i))
    (tmp_path / "images" / NAMES[5]).write_bytes(b"torn")
    return tmp_path / "images"


@pytest.fixture
def dest(folder, tmp_path):
    """Return a directory of latents of the folder, ended by the broken image."""
    with pytest.raises(pictures.BrokenImageError, match="1/1.png"):
        make(folder, tmp_path / "latents")
    return tmp_path / "latents"


def make(folder, dest, plan=PLAN, **where):
    return dataset.make(dest, pictures.open_pictures(str(folder)), encode, plan, SETTINGS, **where)


def read(dest):
    source: Any = tfds.builder_from_directory(str(dest)).as_data_source("train")
    return [source[i] for i in range(len(source))]


@pytest.mark.parametrize("others", [[], [1]], ids=["alone", "another process has written the last shard"])
def test_the_broken_image_is_removed(folder, dest, others, caplog):
    for process in others:
        with pytest.raises(pictures.BrokenImageError):
            make(folder, dest, process=process, num_processes=2)
        assert make(folder, dest, process=0, num_processes=2) == [1]
    (folder / NAMES[5]).unlink()
    assert make(folder, dest) == []
    assert [record["name"].decode() for record in read(dest)] == NAMES[:5] + NAMES[6:]
    assert [int(record["moments"][0, 0, 0]) for record in read(dest)] == [0, 1, 2, 3, 4, 6, 7]
    assert [record["label"] for record in read(dest)] == [0, 0, 0, 0, 1, 1, 1]
    assert metadata(dest)["skipped"] == [NAMES[5]] and metadata(dest)["num_images"] == 7
    assert f"1 images were removed since {dest} was begun, 1/1.png for one" in caplog.text
    assert not [path for path in dest.iterdir() if path.name.startswith(".")]


def test_the_broken_image_is_replaced(folder, dest):
    (folder / NAMES[5]).write_bytes(png(9))
    assert make(folder, dest) == []
    assert [int(record["moments"][0, 0, 0]) for record in read(dest)] == [0, 1, 2, 3, 4, 9, 6, 7]
    assert metadata(dest)["skipped"] == []


def test_an_image_that_is_encoded_already_stays(folder, dest):
    (folder / NAMES[5]).unlink()
    (folder / NAMES[0]).unlink()
    assert make(folder, dest) == []
    assert [record["name"].decode() for record in read(dest)] == NAMES[:5] + NAMES[6:]


def test_other_images_are_refused(folder, dest):
    (folder / NAMES[5]).rename(folder / "1/new.png")
    with pytest.raises(UserError, match="latents was begun with other images: there is 1/new.png, which is new"):
        make(folder, dest)
    (folder / "1/new.png").unlink()
    (folder / "0").rename(folder / "2")
    with pytest.raises(UserError, match="was begun with other images: there is 1/0.png, now of label 0, 1 before"):
        make(folder, dest)


def test_a_list_that_is_damaged(folder, dest):
    (path,) = dest.glob(f".latents-train.notes/{manifest.PREFIX}*")
    path.write_bytes(path.read_bytes()[:-9])
    assert (
        dataset.make(dest, pictures.open_pictures(str(folder)), encode, PLAN._replace(skip_broken=True), SETTINGS) == []
    )


def test_a_damaged_list_that_is_needed(folder, dest):
    (path,) = dest.glob(f".latents-train.notes/{manifest.PREFIX}*")
    path.write_bytes(path.read_bytes()[:-9])
    (folder / NAMES[5]).unlink()
    with pytest.raises(UserError, match=r"cannot read .*images-.*Delete .*latents, and begin anew"):
        make(folder, dest)
