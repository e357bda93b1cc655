"""Labels from the top-level folders of a folder or .zip: which of them are classes, and in which order."""

import collections
import itertools
import re
from collections.abc import Collection, Mapping, Sequence

from absl import logging

from meanflow.errors import UserError

# Words that name a part of a dataset.
SPLITS = (
    "dev", "devset", "eval", "evaluation", "holdout", "test", "testing", "testset", "train", "training", "trainset",
    "trainval", "unlabeled", "unlabelled", "val", "valid", "validation", "valset",
)  # fmt: skip
WRAPPERS = (
    "data",
    "dataset",
    "full",
    "image",
    "images",
    "img",
    "imgs",
    "set",
    "split",
)  # words that do not name a class
BUCKET = re.compile(r"(\d{5})/img(\d{8})\.\w+")  # EDM's file names, a thousand per folder
NUMBER = re.compile("[+-]?[0-9]+")
PARTS = 10  # folders: if all contain the same folders, more than this are classes, fewer are parts of a dataset
SHOWN = 5  # number of classes whose labels are logged
Tree = Mapping[str, set[str]]  # folder: its subfolders that contain files, "" for its own files


def labels_by_folder(names: Sequence[str], tops: set[str], where: str) -> tuple[list[int], list[str]]:
    """Return labels by top-level folder, and the names of these; without folders all labels are 0, which is logged.

    Folders whose names are all whole numbers are ordered by value, others by name, as in torchvision's ImageFolder.
    Raises UserError for files both inside and outside such folders, a folder without files, folders that are splits or
    that contain the classes, and for numbers in an ambiguous order.
    """
    beside = [name for name in names if "/" not in name]
    if beside and len(beside) < len(names):
        within = next(name for name in names if "/" in name)
        raise UserError(f"{where} holds {within} in a class folder, and {beside[0]} in none: move it to one")
    if beside:
        logging.warning("%s has no class folders: the label of all files is 0", where)
        return [0] * len(names), ["0"]
    _check_folders(names, where)
    buckets = [BUCKET.fullmatch(name) for name in names]
    if len(tops) > 1 and all(match and int(match[2]) // 1000 == int(match[1]) for match in buckets):
        raise UserError(
            f"{where} holds files as EDM numbers them, {names[0]} for one, and its folders are no classes: add its "
            'dataset.json, or one of {"labels": null} for unlabelled files'
        )
    found = [name.split("/", 1)[0] for name in names]
    empty = sorted(tops - set(found))
    if empty:
        raise UserError(f"{where}/{empty[0]} holds none of the files of a class: remove it, or copy them all")
    classes = in_order(tops, where)
    number = {name: label for label, name in enumerate(classes)}
    shown = ", ".join(f"{label} is {name}" for label, name in enumerate(classes[:SHOWN]))
    logging.info("%s: label %s%s", where, shown, ", ..." if len(classes) > SHOWN else "")
    return [number[name] for name in found], classes


def in_order(folders: Collection[str], where: str) -> list[str]:
    """Return class folders in the order of their labels.  Raises UserError for numbers in an ambiguous order."""
    numbers = {name: int(name) for name in folders if NUMBER.fullmatch(name)}
    by_value = sorted(numbers, key=lambda name: (numbers[name], name))
    for name, following in itertools.pairwise(by_value):
        if numbers[name] == numbers[following]:
            raise UserError(f"{where} has class folders {name} and {following}, the same number: rename one of them")
    signed = [name for name in by_value if not name.isdigit()]
    if signed:
        raise UserError(f"{where} has a class folder {signed[0]}: rename it, labels are whole numbers from 0 on")
    if len(numbers) < len(folders):
        if sorted(by_value) != by_value:
            words = min(set(folders) - set(numbers))
            raise UserError(
                f"{where} has class folders {words} and {by_value[0]} to {by_value[-1]}: the order of numbers among "
                "words is not clear.  Rename them, 02 instead of 2, or list the labels in dataset.json"
            )
        by_text = sorted(folders)
        naturally = sorted(
            folders, key=lambda name: [int(p) if p.isascii() and p.isdigit() else p for p in re.split("([0-9]+)", name)]
        )
        differing = [pair for pair in zip(by_text, naturally, strict=True) if pair[0] != pair[1]]
        if differing:
            logging.warning(
                "%s: class folders are in the order of their text, %s before %s; zeros in front give another",
                where, *differing[0],
            )  # fmt: skip
        return by_text
    if numbers and sorted(numbers.values()) != list(range(len(numbers))):
        logging.warning(
            "%s: the class folders are %d numbers from %s to %s.  Labels count them from 0 on: label 0 is %s",
            where, len(by_value), by_value[0], by_value[-1], by_value[0],
        )  # fmt: skip
    return by_value


def _check_folders(names: Sequence[str], where: str) -> None:
    """Raise UserError naming the right folder unless the top-level folders can be the classes."""
    inside, tree = _holder(names)
    split = _split(tree)
    if split:
        shown = ", ".join(sorted(f"{inside}{name}" for name in tree)[:3])
        raise UserError(
            f"{where} holds {shown}: {split} looks like a part of the data, not like a class.  Give "
            f"{where}/{inside}{split}, or a zip of what is in it; if it is a class, rename it, or list the labels in "
            "dataset.json"
        )
    (only,) = tree if len(tree) == 1 else (None,)
    num = len(tree) if only is None else len(tree[only] - {""})
    if (inside or only is not None) and num > 1:
        folder = f"{inside}{only or ''}".rstrip("/")
        raise UserError(
            f"all images of {where} are in its folder {folder}, in {num} folders there: are those the classes?  Name "
            "that folder, or zip what is in it"
        )


def _holder(names: Sequence[str]) -> tuple[str, Tree]:
    """Return the path of the first folder that contains several, "" for the top, and its content."""
    inside, tree = "", _tree(names)
    while len(tree) == 1:
        (only,) = tree
        if "" in tree[only]:
            break
        inside, names = f"{inside}{only}/", [name.split("/", 1)[1] for name in names]
        tree = _tree(names)
    return inside, tree


def _tree(names: Sequence[str]) -> Tree:
    tree = collections.defaultdict(set)
    for name in names:
        top, _, rest = name.partition("/")
        tree[top].add(rest.partition("/")[0] if "/" in rest else "")
    return tree


def _split(tree: Tree) -> str | None:
    """Return a folder that is not a class but contains classes, or files of several; None if there is none."""
    words = {top: _words(top) for top in tree}
    splits = [top for top in words if words[top] - set(WRAPPERS) and words[top] <= {*SPLITS, *WRAPPERS}]
    named = [words[top] & set(SPLITS) for top in tree]
    if len(splits) > 1 or (len(tree) > 1 and all(named) and len(set.union(*named)) > 1):
        return _first(splits or tree)
    subfolders = set.union(*tree.values())
    if len(tree) > 1 and len(subfolders) > 1:
        wrapping = [top for top in words if words[top] and words[top] <= {*SPLITS, *WRAPPERS} and "" not in tree[top]]
        if wrapping:
            return _first(wrapping)
    shared = set.intersection(*tree.values()) - {""} if len(tree) > 1 else set()
    shared = {folder for folder in shared if not _words(folder) & set(SPLITS)}
    if "" not in subfolders and len(shared) > 1 and len(tree) <= max(len(shared), PARTS):
        return _first(tree)
    return None


def _words(name: str) -> set[str]:
    return {word.casefold() for word in re.findall("[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)}


def _first(folders: Collection[str]) -> str:
    """Return the folder to suggest: one to train on, if there is one."""
    return min(folders, key=lambda name: ("train" not in name.casefold(), name))
