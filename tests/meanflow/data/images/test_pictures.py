"""Raw images: the same ones, labels and crops from whichever source, and errors that name the file."""

import io
import json
import multiprocessing
import os
import pickle
import zipfile
from concurrent import futures

import numpy as np
import PIL.Image
import pytest

from meanflow.data.images import folders, pictures
from meanflow.errors import UserError

FILES = {"b/x.png": (5, 4), "a/2.PNG": (3, 9), "a/deep/1.png": (7, 7)}  # h, w


def png(shape, seed=0, mode="RGB", form="PNG"):
    """Return the bytes of an image of random colours."""
    image = PIL.Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*shape, 3), np.uint8)).convert(mode)
    file = io.BytesIO()
    image.save(file, form)
    return file.getvalue()


def write(folder, contents):
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def zipped(folder):
    path = folder.parent / f"{folder.name}.zip"
    with zipfile.ZipFile(path, "w") as file:
        for part in sorted(folder.rglob("*"), reverse=True):  # in another order than that of the names
            file.write(part, part.relative_to(folder))
    return path


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "images", {name: png(shape, i) for i, (name, shape) in enumerate(FILES.items())})


def open_(path):
    return pictures.open_pictures(str(path))


def contents(found):
    return [(found.name(i), found.label(i), found.read(i).tolist()) for i in range(len(found))]


def test_a_folder(folder):
    write(folder, {".hidden/1.png": b"", "a/.2.png": b"", "a/notes.txt": b""})
    found = open_(folder)
    assert [found.name(i) for i in range(len(found))] == ["a/2.PNG", "a/deep/1.png", "b/x.png"]
    assert [found.label(i) for i in range(3)] == [0, 0, 1] and found.classes == ["a", "b"]
    image = found.read(2)
    assert image.dtype == np.uint8 and image.shape == (5, 4, 3)
    np.testing.assert_array_equal(image, np.random.default_rng(0).integers(0, 256, (5, 4, 3), np.uint8))


def test_a_zip_is_its_folder(folder):
    write(folder, {"__MACOSX/._a.png": b""})
    one, other = open_(folder), open_(zipped(folder))
    assert contents(one) == contents(other) and one.digest() == other.digest() and one.classes == other.classes


def test_opening_reads_no_image(folder, monkeypatch):
    """Nor asks the disk for each: ImageNet has 1.28 million."""
    before = open_(folder).digest()
    monkeypatch.setattr(os, "stat", None)
    monkeypatch.setattr(os, "lstat", None)
    assert folders.Folder(str(folder)).list()[0]
    monkeypatch.undo()
    write(folder, {"b/x.png": b"not read"})
    assert open_(folder).digest() == before


def test_digest(folder):
    digests = [open_(folder).digest()]
    (folder / "b").rename(folder / "c")
    digests.append(open_(folder).digest())
    index = {"labels": [[name, 1] for name in ("a/2.PNG", "a/deep/1.png", "c/x.png")]}
    (folder / "dataset.json").write_text(json.dumps(index))
    digests.append(open_(folder).digest())
    assert len(set(digests)) == 3


@pytest.mark.parametrize("make", [lambda folder: folder, zipped], ids=["folder", "zip"])
def test_labels_of_a_list_go_before(make, folder):
    index = folder / "dataset.json"
    index.write_text(json.dumps({"labels": [["b/x.png", 0], ["a/2.PNG", 4], ["a/deep/1.png", 2]]}))
    found = open_(make(folder))
    assert [found.label(i) for i in range(3)] == [4, 2, 0] and found.classes == ["0", "1", "2", "3", "4"]
    index.write_text(json.dumps({"labels": [["b/x.png", 0], ["a/2.PNG", 4]]}))
    with pytest.raises(UserError, match="dataset.json has no label of a/deep/1.png"):
        open_(make(folder))
    index.write_text(json.dumps({"labels": [[name, 0] for name in (*FILES, "lost.png")]}))
    with pytest.raises(UserError, match="dataset.json names lost.png, which is not there"):
        open_(make(folder))
    index.write_text(json.dumps({"labels": []}))
    with pytest.raises(UserError, match="dataset.json holds no labels"):
        open_(make(folder))


@pytest.mark.parametrize("make", [lambda folder: folder, zipped], ids=["folder", "zip"])
def test_a_list_without_labels(make, folder, caplog):
    """As EDM's tool leaves it of unlabelled images."""
    (folder / "dataset.json").write_text(json.dumps({"labels": None}))
    found = open_(make(folder))
    assert [found.label(i) for i in range(3)] == [0, 0, 0] and found.classes == ["0"]
    assert "dataset.json has null for labels: the label of all images is 0" in caplog.text


@pytest.mark.parametrize("make", [lambda folder: folder, zipped], ids=["folder", "zip"])
def test_names_of_a_list_may_be_of_windows(make, folder):
    index = {"labels": [["b\\x.png", 2], ["./a/2.PNG", 1], ["a/deep\\1.png", 0]]}
    (folder / "dataset.json").write_text(json.dumps(index))
    assert [open_(make(folder)).label(i) for i in range(3)] == [1, 0, 2]
    (folder / "dataset.json").write_text(json.dumps({"labels": [*index["labels"], ["b/x.png", 0]]}))
    with pytest.raises(UserError, match="dataset.json names b/x.png twice"):
        open_(make(folder))


@pytest.mark.parametrize("label", [-1, 1.5, 2.0, True, "3", None, [0, 1], 10**9])
def test_labels_that_are_none(label, folder):
    (folder / "dataset.json").write_text(json.dumps({"labels": [["b/x.png", label]]}))
    with pytest.raises(UserError, match=r'dataset.json has the entry \["b/x.png", .*a whole number from 0 on'):
        open_(folder)


@pytest.mark.parametrize("make", [lambda folder: folder, zipped], ids=["folder", "zip"])
def test_a_list_that_is_not_at_the_top(make, folder):
    """The labels would be those of the folder around it."""
    (folder / "a" / "dataset.json").write_text("{}")
    with pytest.raises(UserError, match="/a has the labels, dataset.json, and .*images.* none: give that folder"):
        open_(make(folder))


def test_no_class_folders(tmp_path, caplog):
    found = open_(write(tmp_path, {"2.png": png((2, 2)), "1.png": png((2, 2))}))
    assert [(found.name(i), found.label(i)) for i in range(2)] == [("1.png", 0), ("2.png", 0)]
    assert "no class folders: the label of all files is 0" in caplog.text


def test_sources_that_are_none(folder, tmp_path):
    for name in ("nowhere/at/all", "/nowhere.zip", "digitz"):
        with pytest.raises(UserError, match=f"^{name} is no folder of images and no .zip; as a dataset of TFDS: "):
            open_(name)
    with pytest.raises(UserError, match="cannot open .*x.png as a zip"):
        open_(folder / "b" / "x.png")
    empty = tmp_path / "empty"
    (empty / "a").mkdir(parents=True)
    with pytest.raises(UserError, match="empty holds no files of .bmp, .*: name another"):
        open_(empty)
    (folder / "c").mkdir()
    with pytest.raises(UserError, match="images/c holds none of the files of a class"):
        open_(folder)
    write(folder, {"y.png": png((2, 2))})
    with pytest.raises(UserError, match="holds a/2.PNG in a class folder, and y.png in none"):
        open_(folder)


@pytest.mark.parametrize("make", [lambda folder: folder, zipped], ids=["folder", "zip"])
@pytest.mark.parametrize("content", [b"", b"text", png((40, 40))[:-900], png((9, 9))[:20] + b"\xff" * 9], ids=str)
def test_a_broken_image_is_named(content, make, folder):
    write(folder, {"a/2.PNG": content})
    found = open_(make(folder))
    with pytest.raises(pictures.BrokenImageError, match="cannot read the image .*/a/2.PNG .*: replace or remove it"):
        found.read(0)
    assert found.read(1).shape == (7, 7, 3)


def test_a_broken_zip_entry_is_named(folder):
    path = zipped(folder)
    content = bytearray(path.read_bytes())
    content[content.index(b"IDAT", content.index(b"a/2.PNG")) + 8] ^= 1  # of which the checksum tells
    path.write_bytes(content)
    with pytest.raises(pictures.BrokenImageError, match="a/2.PNG .*CRC"):
        open_(path).read(0)


def test_a_missing_disk_is_no_broken_image(folder):
    """Which would be left out."""
    found = open_(folder)
    (folder / "b" / "x.png").unlink()
    with pytest.raises(UserError, match="cannot read .*b/x.png.*Check the disk") as caught:
        found.read(2)
    assert not isinstance(caught.value, pictures.BrokenImageError)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "CMYK", "RGBA", "1", "YCbCr"])
def test_colours(mode, tmp_path):
    form = "TIFF" if mode in ("CMYK", "YCbCr") else "PNG"
    content = png((6, 5), mode=mode, form=form)
    write(tmp_path, {f"a/1.{form.lower()}": content})
    image = open_(tmp_path).read(0)
    assert image.shape == (6, 5, 3) and image.dtype == np.uint8
    with PIL.Image.open(io.BytesIO(content)) as stored:
        assert stored.mode == mode
        by_hand = {
            "L": lambda x: np.stack([x] * 3, 2),
            "LA": lambda x: np.stack([x[:, :, 0]] * 3, 2),
            "RGBA": lambda x: x[:, :, :3],
            "1": lambda x: np.stack([x * np.uint8(255)] * 3, 2),
            "CMYK": lambda x: np.round((255 - x[:, :, :3].astype(float)) * (255 - x[:, :, 3:]) / 255),
        }.get(mode, lambda x: np.asarray(stored.convert("RGB")))(np.asarray(stored))
    assert np.abs(image - by_hand.astype(float)).max() <= 1


def test_transparency_is_dropped(tmp_path):
    """Not blended with anything, as ADM's conversion."""
    pixels = np.zeros((2, 2, 4), np.uint8)
    pixels[..., 0] = 200
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, "PNG")
    write(tmp_path, {"a/1.png": file.getvalue()})
    np.testing.assert_array_equal(open_(tmp_path).read(0), pixels[..., :3])


def test_more_than_8_bits(tmp_path):
    """Pillow would make all but the darkest of them white."""
    file = io.BytesIO()
    PIL.Image.fromarray(np.full((2, 2), 30000, np.uint16)).save(file, "PNG")
    write(tmp_path, {"a/1.png": file.getvalue()})
    with pytest.raises(pictures.BrokenImageError, match="a/1.png .*more than 8 bits a channel"):
        open_(tmp_path).read(0)


def read_first(found):
    return found.read(0).tolist(), os.getpid()


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_processes_and_threads_share_a_zip(method, folder):
    found = open_(zipped(folder))
    expected = found.read(0).tolist()
    with futures.ThreadPoolExecutor(4) as pool:
        assert all(image == expected for image, _ in pool.map(read_first, [found] * 40))
    assert pickle.loads(pickle.dumps(found)).read(0).tolist() == expected
    if method == "fork":
        context = multiprocessing.get_context("fork")
        with context.Pool(2) as pool:
            assert all(image == expected for image, _ in pool.map(read_first, [found] * 20))


def test_a_fork_opens_a_zip_for_itself(folder, monkeypatch):
    files = folders.Zip(str(zipped(folder)))
    ours = files._open()
    assert files._open() is ours
    monkeypatch.setattr(os, "getpid", lambda: -1)
    assert files._open() is not ours


def test_a_dataset_of_tfds(datasets_dir):
    found = pictures.open_pictures("digits", "test", datasets_dir)
    assert found.name(3) == "test/3" and found.read(3).shape == (8, 8, 3) and found.read(3).dtype == np.uint8
    image = found.read(3)
    np.testing.assert_array_equal(image[..., 0], image[..., 2])
    assert {found.label(i) for i in range(40)} <= set(range(10)) and len(found.classes) in (0, 10)
    other = pictures.open_pictures("digits", "train", datasets_dir)
    assert found.digest() == pictures.open_pictures("digits", "test", datasets_dir).digest() != other.digest()
    with pytest.raises(UserError, match="no split 'tset'"):
        pictures.open_pictures("digits", "tset", datasets_dir)


def official_crop(image, size):
    """Do as center_crop_arr of openai/guided-diffusion, step by step."""
    halves = PIL.Image.fromarray(image)
    h, w = image.shape[:2]
    while h >= 2 * size and w >= 2 * size:
        h, w = h // 2, w // 2
        halves = halves.resize((w, h), PIL.Image.BOX)
    factor = size / (h if h < w else w)
    h, w = round(h * factor), round(w * factor)
    large = np.asarray(halves.resize((w, h), PIL.Image.BICUBIC))
    y, x = (h - size) // 2, (w - size) // 2
    return np.stack([row[x : x + size] for row in large[y : y + size]])


@pytest.mark.parametrize(
    "shape", [(37, 50), (50, 37), (16, 16), (15, 31), (33, 32), (129, 64), (8, 11), (17, 25), (25, 17), (23, 16)]
)
def test_crop(shape):
    image = np.random.default_rng(shape).integers(0, 256, (*shape, 3), np.uint8)
    found = pictures.centre_crop(image, 16)
    assert found.shape == (16, 16, 3) and found.dtype == np.uint8
    np.testing.assert_array_equal(found, official_crop(image, 16))
    np.testing.assert_array_equal(pictures.crop(image, 16, "centre", "a"), found)


def test_crop_takes_the_middle():
    image = np.zeros((4, 9, 3), np.uint8)
    image[:, 2:6] = 255
    assert pictures.centre_crop(image, 4).min() == 255


def test_halving_is_a_mean():
    image = np.zeros((8, 8, 3), np.uint8)
    image[::2] = 200
    np.testing.assert_array_equal(pictures.centre_crop(image, 4), np.full((4, 4, 3), 100))


def test_no_crop():
    image = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    assert pictures.crop(image, 4, "none", "a/b.png") is image
    with pytest.raises(UserError, match="a/b.png is of 3 x 4 pixels, not 4 x 4: crop it"):
        pictures.crop(image[:, :3], 4, "none", "a/b.png")
    with pytest.raises(UserError, match="no crop 'center': choose one of centre, none"):
        pictures.crop(image, 4, "center", "a/b.png")


def test_reading_ahead():
    """In order, and no further than was asked for."""
    started = []

    def read(i):
        started.append(i)
        if i == 7:
            raise ZeroDivisionError
        return i * i

    found = pictures.threaded_map(read, range(100), 3)
    assert [next(found) for _ in range(2)] == [0, 1] and len(started) <= 5
    with pytest.raises(ZeroDivisionError):
        list(found)
    assert max(started) <= 10
    assert list(pictures.threaded_map(abs, range(5), 9)) == list(range(5))
