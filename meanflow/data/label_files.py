"""Files of labels: {"labels": [["00000.npy", 3], ...]} as EDM2's, [["00000", 3], ...] or {"00000": 3, ...}.

Re-MeanFlow's index of couplings has names and labels apart: {"root": DIR, "file_list": ["1.npy", ...], "label_list":
[3, ...]}.  DIR is the folder of the files on the machine that made them.
Source: Xinxi-Zhang/Re-MeanFlow, tools/dataset_tools.py (`make_reflow_index`), reflow.py and train.py.
"""

import json
import pathlib
from collections.abc import Callable
from typing import Any

from meanflow.errors import UserError

INDEX = "dataset.json"  # their usual name
APART = {"file_list", "label_list"}  # the keys of names and labels in Re-MeanFlow's index
NO_LABELS = (
    'holds no labels: it must be {"labels": [[NAME, LABEL], ...]}, {NAME: LABEL, ...}, or Re-MeanFlow\'s index, '
    '{"root": DIR, "file_list": [NAME, ...], "label_list": [LABEL, ...]}'
)
MAX_CLASSES = 2**20  # a larger label is a mistake


def read(path: pathlib.Path) -> list[tuple[str, int]]:
    """Return the names, without .npy, and labels in a JSON file, in its order.

    Raises UserError if it cannot be read, holds no labels or has a name twice.
    """
    return read_index(path)[0]


def read_index(path: pathlib.Path) -> tuple[list[tuple[str, int]], str]:
    """Return what `read` does, and the folder of the files, '' if the index names none.  Raises UserError."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read the labels of {path}: {error}.  --labels names another file") from error
    parsed = _load(content, str(path))
    pairs = _pairs(parsed, str(path), str)
    if pairs is None:
        raise UserError(f"{path} {NO_LABELS}")
    return pairs, str(parsed.get("root", "")) if _is_apart(parsed) else ""


def parse(content: bytes, where: str, to_name: Callable[[str], str] = str) -> list[tuple[str, int]] | None:
    """Return what `read` does, given the content of a file; None for {"labels": null}, an unlabelled dataset.

    to_name: converts names in the file to those returned.
    """
    return _pairs(_load(content, where), where, to_name)


def _load(content: bytes, where: str) -> Any:
    try:
        return json.loads(content)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"cannot read the labels of {where}: {error}.  --labels names another file") from error


def _is_apart(parsed: Any) -> bool:
    return isinstance(parsed, dict) and parsed.keys() >= APART


def _pairs(parsed: Any, where: str, to_name: Callable[[str], str]) -> list[tuple[str, int]] | None:
    """Return the names and labels of a parsed file, see `parse`."""
    if _is_apart(parsed):
        parsed = _joined(where, *(parsed[key] for key in sorted(APART)))
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


def _joined(where: str, names: Any, labels: Any) -> list[list[Any]]:
    """Return the entries of an index that has names and labels apart.  Raises UserError unless both are as long."""
    if not (isinstance(names, list) and isinstance(labels, list) and len(names) == len(labels)):
        sizes = " and ".join(str(len(part)) if isinstance(part, list) else "no list" for part in (names, labels))
        raise UserError(f"{where} must have as many names in file_list as labels in label_list, and has {sizes}")
    return [list(entry) for entry in zip(names, labels, strict=True)]


def _parse_entry(where: str, entry: Any, to_name: Callable[[str], str]) -> tuple[str, int]:
    name, label = entry if isinstance(entry, (list, tuple)) and len(entry) == 2 else (None, None)
    if type(name) not in (str, int) or type(label) is not int or not 0 <= label < MAX_CLASSES:
        raise UserError(
            f"{where} has the entry {json.dumps(entry):.200}, which is no name and label, a whole number "
            f"from 0 on, below {MAX_CLASSES}"
        )
    return to_name(str(name)).removesuffix(".npy"), label
