"""Files of folders and zips: links that lead in circles, names as other tools write them, and entries to refuse."""

import json
import os
import stat
import zipfile

import pytest

from meanflow.data.images import folders, pictures
from meanflow.errors import UserError


@pytest.fixture
def folder(tmp_path):
    """Return a folder of two classes, and one beside it that is not listed."""
    for name in ("data/cat/1.png", "data/cat/deep/2.png", "data/dog/3.png", "outside/deep/4.png", "outside/5.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path / "data"


def listing(path):
    names, tops = folders.Folder(str(path)).list()
    return sorted(names), sorted(tops)


OWN = ["cat/1.png", "cat/deep/2.png", "dog/3.png"], ["cat", "dog"]


@pytest.mark.parametrize(
    ("link", "target"),
    [("data", "."), ("again", ".."), ("cat/up", ".."), ("cat/deep/self", "."), ("cat/more", "deep"), ("cat/root", "/")],
)
def test_a_link_that_leads_back_is_left_out(folder, link, target, caplog):
    """From the root of the disk, too, the folder would be found again."""
    (folder / link).symlink_to(target)
    assert listing(folder) == OWN
    assert f"{folder}/{link} is left out: it links to files that are listed already" in caplog.text


def test_a_folder_that_is_a_link_itself(folder):
    (folder.parent / "images").symlink_to(folder)
    (folder / "images").symlink_to(folder.parent / "images")
    assert listing(folder.parent / "images") == OWN


@pytest.mark.parametrize(
    ("links", "words"),
    [
        ({"puppy": "dog"}, "data/puppy and .*data/dog hold the same files"),
        ({"cat/dogs": "../dog"}, "data/cat/dogs and .*data/dog hold the same files"),
        ({"cat/dogs": "../dog", "dog/cats": "../cat"}, "data/cat/dogs and .*data/dog hold"),
        ({"kitten": "cat/deep"}, "data/kitten and .*data/cat/deep hold"),
        ({"a": "../outside", "b": "../outside"}, "data/b and .*data/a hold"),
        ({"a": "../outside/deep", "b": "../outside"}, "data/b and .*data/a hold"),
        ({"a": "../outside", "b": "../outside/deep"}, "data/b and .*data/a/deep hold"),
    ],
)
def test_links_that_give_images_two_labels(folder, links, words):
    for link, target in links.items():
        (folder / link).symlink_to(target)
    with pytest.raises(UserError, match=words):
        listing(folder)


def test_other_links_are_followed(folder):
    (folder / "fox").symlink_to("../outside")
    (folder / "cat" / "6.png").symlink_to("../../outside/5.png")
    names, tops = listing(folder)
    assert names == ["cat/1.png", "cat/6.png", "cat/deep/2.png", "dog/3.png", "fox/5.png", "fox/deep/4.png"]
    assert tops == ["cat", "dog", "fox"]


def test_a_link_within_a_link(folder):
    (folder / "fox").symlink_to("../outside")
    (folder.parent / "outside" / "back").symlink_to("../data")
    (folder.parent / "more").mkdir()
    (folder.parent / "more" / "7.png").touch()
    (folder.parent / "outside" / "more").symlink_to("../more")
    assert listing(folder)[0] == [*OWN[0], "fox/5.png", "fox/deep/4.png", "fox/more/7.png"]


@pytest.mark.parametrize("target", ["nowhere.png", "6.png", "nowhere/at/all"])
def test_a_link_that_leads_nowhere(folder, target):
    (folder / "cat" / "6.png").symlink_to(target)
    with pytest.raises(UserError, match="data/cat/6.png is a link that leads nowhere: restore what it links to"):
        listing(folder)
    (folder / "cat" / "6.png").rename(folder / "cat" / ".6.png")
    assert listing(folder) == OWN


def test_thumbnails_are_no_images(folder):
    for name in ("cat/@eaDir/1.png/SYNOPHOTO_THUMB_M.jpg", "@eaDir/2.jpg", "$RECYCLE.BIN/3.png", "lost+found/4.png"):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).touch()
    assert listing(folder) == OWN


def test_a_pipe_is_no_file(folder):
    os.mkfifo(folder / "cat" / "6.png")
    with pytest.raises(UserError, match="data/cat/6.png is no file: move it away"):
        listing(folder)


def test_a_name_with_a_backslash(folder):
    """Which unzip makes of a zip of Windows: all files in one folder."""
    (folder / "cat\\9.png").touch()
    with pytest.raises(UserError, match=r"cat\\9.png has a \\ in its name, .*: give the zip"):
        listing(folder)


def write_zip(tmp_path, *entries):
    """Write a zip of entries, names or ZipInfo, whose content is their name."""
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as file:
        for entry in entries:
            file.writestr(entry, getattr(entry, "filename", entry))
    return folders.Zip(str(path))


@pytest.mark.parametrize(
    "names",
    [
        ("./cat/1.png", "./dog/2.png"),
        ("cat\\1.png", "dog\\2.png"),
        (".\\cat\\1.png", "/dog/2.png"),
        ("cat//1.png", "dog/./2.png"),
        ("./", "./cat/", "./cat/1.png", "dog\\", "dog\\2.png", "cat/"),
    ],
)
def test_names_in_a_zip(tmp_path, names):
    files = write_zip(tmp_path, *names)
    assert (sorted(files.list()[0]), files.list()[1]) == (["cat/1.png", "dog/2.png"], {"cat", "dog"})
    assert files.read("cat/1.png").decode() in names and files.read("dog/2.png").decode() in names
    with pytest.raises(KeyError):
        files.read("cat/3.png")


def test_hidden_files_of_a_zip(tmp_path):
    assert write_zip(tmp_path, "./.hidden/1.png", "__MACOSX/._1.png", ".\\.2.png", "cat/.3.png").list() == ([], set())


def test_names_in_utf8_without_its_flag(tmp_path):
    """As macOS writes them; others are in code page 437."""
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("käse/1.png", b"")
        file.writestr(zipfile.ZipInfo("b\u00fc/2.png"), b"")
    content = path.read_bytes().replace("bü".encode(), b"b\x81x")
    content = content.replace(b"\x00\x08\x00\x00", b"\x00\x00\x00\x00")  # the flag
    assert content.count("käse".encode()) == 2
    path.write_bytes(content)
    assert sorted(folders.Zip(str(path)).list()[0]) == ["büx/2.png", "käse/1.png"]


def changed(name, **values):
    entry = zipfile.ZipInfo(name)
    for key, value in values.items():
        setattr(entry, key, value)
    return entry


def test_a_link_in_a_zip(tmp_path):
    with pytest.raises(UserError, match="cat/1.png of .*a.zip is a link, .*: zip the files themselves"):
        write_zip(tmp_path, changed("cat/1.png", external_attr=(stat.S_IFLNK | 0o777) << 16))


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("names", [("cat/1.png", "cat/1.png"), ("cat/1.png", "cat\\1.png"), ("./1.png", "1.png")])
def test_a_name_twice(tmp_path, names):
    with pytest.raises(UserError, match=r"1.png of .*a.zip is in it twice"):
        write_zip(tmp_path, *names)


@pytest.mark.parametrize("name", ["../cat/1.png", "cat/../dog/1.png", "..\\1.png"])
def test_a_name_that_leads_out(tmp_path, name):
    with pytest.raises(UserError, match=r"1.png of .*a.zip has \.\. in its path"):
        write_zip(tmp_path, name)


@pytest.mark.parametrize(
    ("offset", "value", "words"), [(8, 1, "is encrypted: unzip it with its password"), (10, 93, "by method 93, which")]
)
def test_entries_that_cannot_be_read(tmp_path, offset, value, words):
    """They are no broken images, which may be left out."""
    write_zip(tmp_path, "cat/1.png")
    content = bytearray((tmp_path / "a.zip").read_bytes())
    content[content.index(b"PK\x01\x02") + offset] |= value
    (tmp_path / "a.zip").write_bytes(content)
    with pytest.raises(UserError, match=f"cat/1.png of .*a.zip .*{words}"):
        folders.Zip(str(tmp_path / "a.zip"))


def test_a_zip_in_a_zip(tmp_path):
    write_zip(tmp_path, "train.zip", "readme.txt")
    with pytest.raises(UserError, match="a.zip holds no files of .*: unpack its train.zip, and name that"):
        pictures.open_pictures(str(tmp_path / "a.zip"))


def test_labels_of_a_zip_whose_names_begin_with_a_dot(tmp_path):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("./1.png", b"")
        file.writestr("./dataset.json", json.dumps({"labels": [["1.png", 4]]}))
    assert pictures.open_pictures(str(path)).label(0) == 4
