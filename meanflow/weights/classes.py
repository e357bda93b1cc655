"""Which rows of another model's class embedding a run starts with: the JSON file that `train.load_classes` names."""

import json
from collections import Counter

from meanflow.errors import UserError


def read(path: str, num_classes: int, num_given: int) -> list[int | None]:
    """Return for each class of a run its row in the given embedding of `num_given` classes; None for a fresh row.

    The file holds a list with one entry per class, a row or null, or names instead of rows:
    {"from": [a name for each given class], "to": [for each class of the run, one of these names or null]}.
    A row may be used more than once.  Raises UserError for anything else.
    """
    content = _parse(path)
    if isinstance(content, list):
        rows = content
    elif isinstance(content, dict) and content.keys() == {"from", "to"} and all(map(_is_list, content.values())):
        rows = _find(path, content["from"], content["to"], num_given)
    else:
        raise UserError(f'{path} must hold a list of rows, or lists of names {{"from": [...], "to": [...]}}')
    if len(rows) != num_classes:
        raise UserError(f"{path} has {len(rows)} classes, but config.model.num_classes is {num_classes}")
    for i, row in enumerate(rows):
        if row is not None and not (type(row) is int and 0 <= row < num_given):
            raise UserError(
                f"{path} gives class {i} the row {json.dumps(row)}: the weights to start from have the rows 0 to "
                f"{num_given - 1}; null is a fresh row"
            )
    return rows


def _parse(path: str) -> object:
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except OSError as error:
        raise UserError(f"cannot read config.train.load_classes {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # ValueError: not text, or not JSON
        raise UserError(f"config.train.load_classes {path} is not JSON: {error}") from error


def _is_list(value: object) -> bool:
    return isinstance(value, list)


def _find(path: str, given: list, wanted: list, num_given: int) -> list[int | None]:
    """Return the row of each wanted name, None for null."""
    if len(given) != num_given:
        raise UserError(
            f"{path} has {len(given)} names in from, but the weights to start from have {num_given} classes"
        )
    for name in (*given, *wanted):
        if not isinstance(name, str) and (name is not None or name in given):
            raise UserError(f"{path} has {json.dumps(name)} where a name is needed")
    count = Counter(given)
    for name in wanted:
        if name is not None and count[name] != 1:
            found = f"{count[name]} times in from: list rows instead" if count[name] else "not in from"
            raise UserError(f"{path} has {json.dumps(name)} in to, which is {found}")
    return [None if name is None else given.index(name) for name in wanted]
