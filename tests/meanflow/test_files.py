"""Files are replaced whole or not at all, and what cannot be written is found before the work."""

import errno
import os
import pathlib
import stat

import pytest

from meanflow import files
from meanflow.errors import UserError


def test_replaces(tmp_path):
    path = tmp_path / "new" / "file"
    files.replace_text(path, "one")
    files.replace_text(path, "two")
    assert path.read_text() == "two"
    assert os.listdir(path.parent) == ["file"]


def test_a_failure_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    files.replace_text(path, "one")

    def fail(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(UserError, match="cannot write .*file: No space left on device"):
        files.replace_text(path, "two")
    assert path.read_text() == "one" and os.listdir(tmp_path) == ["file"]


def test_who_may_read_what_is_written(tmp_path):
    """Everyone whom the umask lets, however private the writer made its file, or as before."""
    before = os.umask(0o027)
    try:
        for path, expected in ((tmp_path / "new", 0o640), (tmp_path / "new", 0o604)):
            with files.replacing(path) as unfinished:
                unfinished.unlink()
                os.close(os.open(unfinished, os.O_CREAT, 0o600))
            assert stat.S_IMODE(path.stat().st_mode) == expected
            path.chmod(0o604)
    finally:
        os.umask(before)


def test_a_check_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in (tmp_path / "a.json", tmp_path / "new" / "deep" / "a.json", "a.json", "new/a.json"):
        files.check_writable(path)
    assert not os.listdir(tmp_path)
    (tmp_path / "a.json").write_text("old")
    files.check_writable(tmp_path / "a.json")
    assert (tmp_path / "a.json").read_text() == "old" and os.listdir(tmp_path) == ["a.json"]


def test_paths_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write .*file/deep/a.json: Not a directory"):
        files.check_writable(tmp_path / "file" / "deep" / "a.json")
    with pytest.raises(UserError, match="cannot write .*: Is a directory.  Free the disk, or choose a path"):
        files.check_writable(tmp_path)
    with pytest.raises(UserError, match="cannot write /proc/a.json: "):
        files.check_writable(pathlib.Path("/proc/a.json"))


@pytest.mark.parametrize("number", [errno.EROFS, errno.ENOSPC, errno.EACCES, errno.EDQUOT])
def test_disks_that_refuse(tmp_path, monkeypatch, number):
    def refuse(dir):
        assert dir == tmp_path
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files.tempfile, "TemporaryFile", refuse)
    with pytest.raises(UserError, match=f"cannot write .*new/a.json: {os.strerror(number)}"):
        files.check_writable(tmp_path / "new" / "a.json")
