"""The file of the classes that a run starts with."""

import json

import pytest

from meanflow.errors import UserError
from meanflow.weights import classes

NAMES = ["cat", "dog", "crane", "crane"]


def read(path, content, num_classes=3, num_given=4):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return classes.read(str(path), num_classes, num_given)


@pytest.mark.parametrize(
    ("content", "rows"),
    [
        ([3, None, 0], [3, None, 0]),
        ([1, 1, 1], [1, 1, 1]),
        ({"from": NAMES, "to": ["dog", None, "cat"]}, [1, None, 0]),
        ({"to": [None, None, None], "from": NAMES}, [None, None, None]),
    ],
)
def test_rows_and_names(tmp_path, content, rows):
    assert read(tmp_path / "names.json", content) == rows


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([0, 1], r"has 2 classes, but config\.model\.num_classes is 3"),
        ({"from": NAMES, "to": ["cat"]}, r"has 1 classes, but config\.model\.num_classes is 3"),
        ([0, 4, 1], r"gives class 1 the row 4: the weights to start from have the rows 0 to 3; null is a fresh row"),
        ([0, 1, -1], "gives class 2 the row -1"),
        ([True, 1, 2], "gives class 0 the row true"),
        ([0, 1.0, 2], r"gives class 1 the row 1\.0"),
        ([0, "cat", 2], 'gives class 1 the row "cat"'),
        ({"from": NAMES[:3], "to": NAMES}, "has 3 names in from, but the weights to start from have 4 classes"),
        ({"from": NAMES, "to": ["cat", "bird", None]}, 'has "bird" in to, which is not in from'),
        ({"from": NAMES, "to": ["cat", "crane", None]}, 'has "crane" in to, which is 2 times in from: list rows'),
        ({"from": NAMES, "to": ["cat", 1, None]}, "has 1 where a name is needed"),
        ({"from": [*NAMES[:3], None], "to": ["cat", None, None]}, "has null where a name is needed"),
        ({"from": NAMES}, "must hold a list of rows, or lists of names"),
        ({"from": NAMES, "to": "cat"}, "must hold a list of rows, or lists of names"),
        ({"cat": 0, "dog": 1, "x": 2}, "must hold a list of rows, or lists of names"),
        ("3", "must hold a list of rows, or lists of names"),
        ("[0, 1", r"load_classes .*names\.json is not JSON"),
    ],
)
def test_anything_else_is_named(tmp_path, content, message):
    with pytest.raises(UserError, match=rf"names\.json.*{message}" if "JSON" not in message else message) as error:
        read(tmp_path / "names.json", content)
    assert "\n" not in str(error.value)


def test_a_missing_file(tmp_path):
    with pytest.raises(UserError, match=r"cannot read config\.train\.load_classes .*none\.json: No such file"):
        classes.read(str(tmp_path / "none.json"), 3, 4)
