"""Files are replaced whole or not at all."""

import os

import pytest

from configs.errors import UserError
from evaluation import files


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
    assert path.read_text() == "one"
