"""`~` in every path flag, argument and option, and paths that no work directory can have."""

import argparse
import os
import pathlib

import pytest
from absl import flags

from configs import digits
from meanflow.commands import encode, evaluate, import_couplings, import_latents, reflow, sample, time_embedding
from meanflow.config import checks, paths, store
from meanflow.config import options as base
from meanflow.config.flags import workdir
from meanflow.errors import UserError
from parity import check, convert

# Flags and options that take a text which is no path.  A new one stands here, or it is a path.
OTHER_FLAGS = {"split"}
OTHER_OPTIONS = {"name", "model.name", "method.name", "data.split", "evaluation.split"}


@pytest.fixture(autouse=True)
def home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")


@pytest.mark.parametrize(
    ("define", "expected"),
    [
        (encode.define_flags, {"source", "data_dir", "dest", "vae"}),
        (reflow.define_flags, {"teacher", "guide", "output"}),
        (sample.define_sample_flags, {"weights", "output", "vae"}),
        (
            evaluate.define_flags,
            {"reference", "inception", "dino", "vae", "make_reference", "samples", "weights", "output"},
        ),
        (time_embedding.define_flags, {"teacher", "output"}),
    ],
)
def test_every_path_flag_expands_the_home_directory(parse_flags, define, expected):
    before = set(flags.FLAGS)
    parse_flags(define)
    texts = {name for name in set(flags.FLAGS) - before if flags.FLAGS[name].flag_type() in ("string", "path")}
    assert texts - OTHER_FLAGS == expected
    parse_flags(define, *(f"--{name}=~/x" for name in texts))
    assert {flags.FLAGS[name].value for name in expected} == {"/home/someone/x"}


def test_the_work_directory_is_below_the_home_directory(parse_flags):
    parse_flags(lambda: None, "--workdir=~/runs/x/")
    try:
        assert workdir() == "/home/someone/runs/x"
    finally:
        flags.FLAGS["workdir"].unparse()


def test_every_path_option_expands_the_home_directory():
    texts = {name for name, value in base.all_options().items() if isinstance(value, str)}
    assert texts - OTHER_OPTIONS == set(paths.OPTIONS)
    for network, method in (("dit", "flow"), ("dmf_dit", "decoupled")):
        config = base.get_config(network, method)
        names = set(paths.OPTIONS) & store.flatten(config).keys()
        config.update_from_flattened_dict(dict.fromkeys(names, "~/x"))
        if method == "flow":
            config.model.update(repa_dims=(8,), repa_depth=1)
        flat = store.flatten(checks.check(config))
        assert {flat[name] for name in names} == {"/home/someone/x"}


@pytest.mark.parametrize("main", [import_couplings.main, import_latents.main, convert.parse, check.parse])
def test_arguments_expand_the_home_directory(main, monkeypatch):
    """Every argument of a command that is a path, as argparse sees it."""
    found = {}
    add = argparse.ArgumentParser.add_argument

    def watch(self, *names, **options):
        found[names[-1].lstrip("-")] = options.get("type")
        return add(self, *names, **options)

    monkeypatch.setattr(argparse.ArgumentParser, "add_argument", watch)
    with pytest.raises(SystemExit):
        main(["--help"])
    names = found.keys() & {"source", "dest", "labels", "vae", "golden", "json", "report"}
    assert names
    assert {str(found[name]("~/x")) for name in names} == {"/home/someone/x"}


def test_a_config_file_in_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.py").write_text(pathlib.Path(digits.__file__).read_text())
    assert store.load_file("~/mine.py:unet").model.name == "unet"


@pytest.mark.parametrize("path", ["~nobody_of_this_name/x", "~nobody_of_this_name"])
def test_an_unknown_home_directory(path):
    with pytest.raises(UserError, match="no home directory ~nobody_of_this_name"):
        paths.expand(path)
    with pytest.raises(argparse.ArgumentTypeError, match="no home directory"):
        paths.read(path)
    config = digits.get_config()
    config.train.load_from = path
    with pytest.raises(UserError, match="config.train.load_from: there is no home directory"):
        checks.check(config)


@pytest.mark.parametrize("path", ["x[1]", "a*b", "a b", "k=v,w", "-x", "übung", "x/", "~", "a/~/b", "C:x"])
def test_unusual_names_of_directories(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    expected = "/home/someone" if path == "~" else str(tmp_path / path)
    assert paths.check_directory(paths.expand_local(path), "workdir") == expected


@pytest.mark.parametrize("path", ["gs://bucket/run", "s3://x", "file:///tmp/x"])
def test_urls_are_no_directories(path):
    with pytest.raises(UserError, match="is not a local path"):
        paths.expand_local(path)


def test_what_cannot_be_a_work_directory(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    for name, message in [
        ("file", "is a file"), ("x" * 300, "File name too long"),
        ("loop", "symbolic links"),
    ]:  # fmt: skip
        with pytest.raises(UserError, match=f"--workdir=.*{message}"):
            paths.check_directory(str(tmp_path / name), "workdir")
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(UserError, match="the current directory is gone"):
        paths.check_directory("run", "workdir")
    os.chdir(tmp_path)
