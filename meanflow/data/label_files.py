"""Files of labels: {"labels": [["00000.npy", 3], ...]} as EDM2's, [["00000", 3], ...] or {"00000": 3, ...}."""

import json
import pathlib
from collections.abc import Callable
from typing import Any

from meanflow.errors import UserError

INDEX = "dataset.json"  # their usual name
NO_LABELS = 'holds no labels: it must be {"labels": [[NAME, LABEL], ...]}, or {NAME: LABEL, ...}'
MAX_CLASSES = 2**20  # a larger label is a mistake


def read(path: pathlib.Path) -> list[tuple[str, int]]:
    """Return the names, without .npy, and labels in a JSON file, in its order.

    Raises UserError if it cannot be read, holds no labels or has a name twice.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read the labels of {path}: {error}.  --labels names another file") from error
    pairs = parse(content, str(path))
    if pairs is None:
        raise UserError(f"{path} {NO_LABELS}")
    return pairs


def parse(content: bytes, where: str, to_name: Callable[[str], str] = str) -> list[tuple[str, int]] | None:
    """Return what `read` does, given the content of a file; None for {"labels": null}, an unlabelled dataset.

    to_name: converts names in the file to those returned.
    """
    try:
        parsed = json.loads(content)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"cannot read the labels of {where}: {error}.  --labels names another file") from error
    if isinstance(parsed, dict) and "labels" in parsed:
        parsed = parsed["labels"]
        if parsed is None:
            return None
    entries = list(parsed.items()) if isinstance(parsed, dict) else parsed
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{where} {NO_LABELS}")
    pairs = [_parse_entry(where, entry, to_name) for entry in entries]
    names = set()
    for name, _ in pairs:
        if name in names:
            raise UserError(f"{where} names {name} twice: leave one of them")
        names.add(name)
    return pairs


def _parse_entry(where: str, entry: Any, to_name: Callable[[str], str]) -> tuple[str, int]:
    name, label = entry if isinstance(entry, (list, tuple)) and len(entry) == 2 else (None, None)
    if type(name) not in (str, int) or type(label) is not int or not 0 <= label < MAX_CLASSES:
        raise UserError(
            f"{where} has the entry {json.dumps(entry):.200}, which is no name and label, a whole number "
            f"from 0 on, below {MAX_CLASSES}"
        )
    return to_name(str(name)).removesuffix(".npy"), label
