"""Stores configs as JSON in work directories, checkpoints and snapshots, and reads other versions of them.

A stored config holds the nested options and a config `version`.  Options added since take the value for older runs in
`CHANGES`, or else their default; unknown ones are refused.  Up to version 1 every run stored the options of all
networks and methods: those of networks and methods it did not use had no effect and are dropped.
"""

import functools
import inspect
import json
import pathlib
import runpy
from typing import Any, NamedTuple

from absl import logging

from meanflow.config import options, paths
from meanflow.config.sections import flatten as flatten
from meanflow.errors import UserError

VERSION = 2
FLAT = 1  # the last version that stored the options of all networks and methods
VERSION_KEY, CONTENT_KEY = "version", "content"  # stored next to the options
SECTIONS = ("data", "model", "method", "train", "sample", "evaluation")  # present in every version


class Change(NamedTuple):
    """What a version changed.  Versions that only add options with behaviour-preserving defaults need no entry."""

    version: int  # the first version with the change
    renamed: dict[str, str] = {}  # noqa: RUF012  dotted options: {old: new}
    before: dict[str, Any] = {}  # noqa: RUF012  {new option: value for older runs, if not its default}


CHANGES: tuple[Change, ...] = ()  # oldest first


def to_json(config: options.Config, content: dict[str, str] | None = None) -> str:
    """Return a config as indented JSON.  content: {option: digest} of the data at its paths; see `read_content`."""
    beside = {VERSION_KEY: VERSION} | ({CONTENT_KEY: content} if content else {})
    return json.dumps(beside | config.to_dict(), indent=2) + "\n"


def from_json(text: str, where: str = "the stored config") -> options.Config:
    """Parse a config from JSON text of any version; the result has every option of its network and method.

    where: its name in messages.  Options missing from the text are logged.  Raises UserError for invalid JSON, unknown
    options, missing sections and values whose type differs from the default's.
    """
    given = _parse(text, where)
    version = given.pop(VERSION_KEY, 0)
    given.pop(CONTENT_KEY, None)
    if type(version) is not int:
        raise UserError(f"{where} is damaged: its version is {version!r}.  {_way_out(where)}")
    flat = _upgrade(flatten(given), version)
    for name in SECTIONS:
        if not isinstance(given.get(name), dict):
            raise UserError(f"{where} is damaged: it lacks the section {name}.  {_way_out(where)}")
    config = _fresh(flat, where)
    known = flatten(config)
    if version <= FLAT:
        elsewhere = options.all_options().keys() - known.keys()
        flat = {key: value for key, value in flat.items() if key not in elsewhere}
    unknown, missing = [key for key in flat if key not in known], [key for key in known if key not in flat]
    if version > VERSION and (unknown or missing):
        raise UserError(f"{where} is of config version {version}, this code knows {VERSION} at most: update it")
    if unknown:
        raise UserError(
            f"{where} has options that this code does not know: {', '.join(unknown)}.  Use the code that wrote it"
        )
    if missing:
        shown = ", ".join(f"{key}={known[key]!r}" for key in missing)
        _say_once(f"{where} lacks options that were added since; it is read with {shown}")
    for key, value in flat.items():
        config.update_from_flattened_dict({key: _converted(key, value, known[key], where)})
    paths.expand_options(config)
    return config


def read_file(path: pathlib.Path) -> options.Config:
    """Read a config from a JSON file.  Raises UserError if it cannot be read, and like `from_json`."""
    return from_json(_read(path), str(path))


def read_content(path: pathlib.Path) -> dict[str, str]:
    """Return the {option: digest} stored in a JSON file; empty if the file predates digests."""
    content = _parse(_read(path), str(path)).get(CONTENT_KEY, {})
    return content if isinstance(content, dict) else {}


def load_file(name: str) -> options.Config:
    """Load a config from FILE.py[:variant] or a work directory's config.json.

    Raises UserError if there is no such file or variant.
    """
    file, _, variant = paths.expand(name).partition(":")
    path = pathlib.Path(file)
    if not path.is_file():
        raise UserError(f"there is no config file {path}; name a recipe, such as configs/digits.py")
    if path.suffix not in (".py", ".json"):
        raise UserError(f"--config {path} is neither a .py nor a .json file")
    try:
        get_config = runpy.run_path(file).get("get_config") if path.suffix == ".py" else None
    except SyntaxError as error:
        raise UserError(f"{error.filename}, line {error.lineno}: {error.msg}") from error
    if path.suffix == ".py" and get_config is None:
        raise UserError(f"--config {path} defines no get_config(); see configs/digits.py for an example")
    if variant and (get_config is None or not inspect.signature(get_config).parameters):
        raise UserError(f"--config {name}: {path.name} has no variants, so leave out :{variant}")
    if get_config is None:
        return read_file(path)
    try:
        return get_config(variant) if variant else get_config()
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"--config {name}: {error}") from error


def _read(path: pathlib.Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is damaged: it is not text.  {_way_out(str(path))}") from error


def _parse(text: str, where: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: not JSON, or a number with thousands of digits
        reason = str(error) if text.strip("\0 \n") else "it is empty"
        raise UserError(f"{where} is damaged: {reason}.  {_way_out(where)}") from error
    if not isinstance(content, dict):
        raise UserError(f"{where} is damaged: it is a {type(content).__name__}, not a config.  {_way_out(where)}")
    return content


def _upgrade(flat: dict[str, Any], version: int) -> dict[str, Any]:
    """Rename options to their current names and add the `before` values of newer ones."""
    for change in CHANGES:
        if change.version > version:
            flat = {change.renamed.get(key, key): value for key, value in flat.items()}
            flat = change.before | flat
    return flat


def _fresh(flat: dict[str, Any], where: str) -> options.Config:
    """Return the default config for the network and method named in the stored options."""
    network, method = (flat.get(f"{section}.name") for section in ("model", "method"))
    if not isinstance(network, str) or not isinstance(method, str):
        raise UserError(f"{where} is damaged: it names no network or no method.  {_way_out(where)}")
    try:
        return options.get_config(network, method)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def _converted(key: str, value: Any, default: Any, where: str) -> Any:
    """Convert a JSON value to the type of the option's default.  Raises UserError if it does not fit."""
    if isinstance(default, tuple):
        fits = isinstance(value, list)
        value = _tuple(value)
    elif isinstance(default, float) and type(value) in (int, float):
        fits, value = True, float(value)
    elif type(default) is int and type(value) is float and value.is_integer():
        fits, value = True, int(value)  # how other tools write integers
    else:
        fits = type(value) is type(default)
    if not fits:
        raise UserError(f"{where} is damaged: {key} is {value!r}, not a {type(default).__name__}.  {_way_out(where)}")
    return value


def _tuple(value: Any) -> Any:
    return tuple(map(_tuple, value)) if isinstance(value, list) else value


def _way_out(where: str) -> str:
    again = where.endswith("config.json")
    return "Delete it, and the run's own training command writes it again" if again else "Put back a copy"


@functools.cache
def _say_once(text: str) -> None:
    logging.info("%s", text)
