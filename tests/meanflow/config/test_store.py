"""Stored configs of other versions are read or refused by name, and damaged ones in one line."""

import json
import os

import pytest

from configs import digits
from meanflow.config import options, store
from meanflow.config.workdir import open_workdir, read_workdir
from meanflow.errors import UserError


@pytest.fixture
def console(monkeypatch):
    """Lines that are logged."""
    lines = []
    monkeypatch.setattr(store.logging, "info", lambda text, *values: lines.append(text % values))
    store._say_once.cache_clear()
    return lines


def stored(config=None):
    """Return a stored config as nested dicts."""
    return json.loads(store.to_json(digits.get_config() if config is None else config))


def read(content):
    return store.from_json(json.dumps(content), "run/config.json")


def test_a_config_is_stored_with_its_version_and_read_back():
    config = digits.get_config("unet")
    config.train.ema_decays = (0.9, 0.99)
    config.train.learning_rate = float("nan")
    content = stored(config)
    assert content["version"] == store.VERSION and "version" not in store.flatten(config)
    assert str(store.flatten(read(content))) == str(store.flatten(config))


def test_options_added_since_take_their_defaults_and_are_named_once(console):
    content = stored()
    del content["version"], content["train"]["ema_every"], content["latents"], content["data"]["augment"]["hue"]
    config = read(content)
    assert store.flatten(config) == store.flatten(digits.get_config())
    read(content)
    (line,) = console
    assert line.startswith("run/config.json lacks options that were added since; it is read with data.augment.hue=0.0")
    assert "train.ema_every=1" in line and "latents.vae=''" in line


def test_one_value_under_two_names_stays_one():
    """sample.path follows method.path, unless it is stored itself."""
    content = stored()
    del content["sample"]["path"]
    content["method"]["path"] = "cosine"
    assert read(content).sample.path == "cosine"


def test_unknown_options_are_refused_by_name():
    content = stored()
    content["train"]["colour"] = content["hue"] = 1
    with pytest.raises(UserError, match=r"options that this code does not know: train.colour, hue\.  Use the code"):
        read(content)


@pytest.mark.parametrize("change", [lambda c: c.update(new=1), lambda c: c["train"].pop("steps")])
def test_a_newer_version_is_named(change):
    content = stored() | {"version": store.VERSION + 1}
    assert read(content).name == "digits"
    change(content)
    with pytest.raises(UserError, match="is of config version 3, this code knows 2 at most: update it"):
        read(content)


def test_renamed_options_and_what_older_runs_did(monkeypatch):
    changes = (
        store.Change(1, {"train.rate": "train.lr", "train.a": "train.b", "train.b": "train.a"}),
        store.Change(2, {"train.lr": "train.learning_rate"}, {"train.ema_every": 7}),
        store.Change(3, {}, {"method.clip_interval": False}),
    )
    known = options.get_config().unlock()
    known.train.a, known.train.b = 1, 2
    monkeypatch.setattr(options, "get_config", lambda network, method: known.copy_and_resolve_references())
    monkeypatch.setattr(store, "CHANGES", changes)
    monkeypatch.setattr(store, "VERSION", 3)
    content = json.loads(store.to_json(known))
    del content["version"], content["train"]["ema_every"], content["method"]["clip_interval"]
    content["train"] |= {"rate": 0.5, "a": 3, "b": 4}
    del content["train"]["learning_rate"]
    config = read(content)
    assert (config.train.learning_rate, config.train.a, config.train.b) == (0.5, 4, 3)
    assert (config.train.ema_every, config.method.clip_interval) == (7, False)
    content["version"] = 2
    content["train"]["learning_rate"] = content["train"].pop("rate")
    config = read(content)
    assert (config.train.learning_rate, config.train.a, config.train.ema_every) == (0.5, 3, 1)
    assert config.method.clip_interval is False


def test_numbers_and_lists_as_other_tools_write_them():
    content = stored()
    content["train"]["learning_rate"], content["train"]["steps"] = 1, 7.0
    content["sample"]["times"] = [[1, 2], 3]
    config = read(content)
    assert type(config.train.learning_rate) is float and config.train.steps == 7 and type(config.train.steps) is int
    assert config.sample.times == ((1, 2), 3)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it is empty"),
        (b"\0" * 50, "it is empty"),
        (store.to_json(digits.get_config()).encode()[:700], "is damaged: .*line"),
        (b'{"seed": ' + 5000 * b"9" + b"}", "is damaged: .*digits"),
        (b"\xff\xfe\x00", "it is not text"),
        (b"[1, 2]", "it is a list"),
        (b"null", "it is a NoneType"),
        (b"[" * 100_000, "is damaged"),
        (json.dumps(stored() | {"train": 5}).encode(), "it lacks the section train"),
        (json.dumps({k: v for k, v in stored().items() if k != "model"}).encode(), "it lacks the section model"),
        (json.dumps(stored() | {"seed": "1"}).encode(), "seed is '1', not a int"),
        (json.dumps(stored() | {"seed": None}).encode(), "seed is None"),
        (json.dumps(stored() | {"seed": True}).encode(), "seed is True"),
        (json.dumps(stored() | {"name": ["x"]}).encode(), r"name is \('x',\)|name is \['x'\]"),
        (json.dumps(stored() | {"version": "1"}).encode(), "its version is '1'"),
        (json.dumps(stored() | {"data": stored()["data"] | {"augment": 5}}).encode(), "not know: data.augment"),
        (json.dumps(stored() | {"sample": stored()["sample"] | {"times": 1}}).encode(), "times is 1, not a tuple"),
    ],
)
def test_a_damaged_config_is_named_in_one_line(tmp_path, content, message):
    (tmp_path / "config.json").write_bytes(content)
    for call in (
        lambda: read_workdir(tmp_path),
        lambda: open_workdir(tmp_path, digits.get_config(), "jax"),
        lambda: store.load_file(str(tmp_path / "config.json")),
    ):
        with pytest.raises(UserError, match=message) as error:
            call()
        assert str(tmp_path / "config.json") in str(error.value)
        assert "\n" not in str(error.value)
    assert (tmp_path / "config.json").read_bytes() == content


def test_a_config_that_is_a_directory_or_cannot_be_read(tmp_path):
    os.mkdir(tmp_path / "config.json")
    with pytest.raises(UserError, match="cannot read .*config.json"):
        read_workdir(tmp_path)


def test_a_run_of_an_older_version_goes_on(tmp_path):
    config = digits.get_config()
    content = stored(config)
    del content["version"], content["train"]["ema_every"]
    (tmp_path / "config.json").write_text(json.dumps(content))
    open_workdir(tmp_path, config, "torch").close()
    assert json.loads((tmp_path / "config.json").read_text())["version"] == store.VERSION
