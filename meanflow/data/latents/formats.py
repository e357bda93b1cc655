"""Readers of other people's formats of latents; `meanflow.commands.import_latents` describes them.

Nothing in the files is executed.
"""

import contextlib
import io
import pathlib
import pickle
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import logging

from meanflow.data import label_files
from meanflow.data.images import classes, folders
from meanflow.errors import UserError
from meanflow.weights import pickles

Labels = Mapping[str, int] | None  # by name, to use instead of the store's own


class Entry(NamedTuple):
    """What a store holds for an image, unconverted."""

    moments: Any
    flipped: Any = None  # moments of the mirrored image, if stored
    label: Any = None


class Store(NamedTuple):
    """An open store."""

    names: Sequence[str]
    read: Callable[[str], Entry]
    labels: Sequence[int] | None  # one per name; None: each entry has its own
    classes: Sequence[str] = ()  # the names of the labels, if known


@contextlib.contextmanager
def open_lmdb(source: pathlib.Path, labels: Labels = None) -> Iterator[Store]:
    """Open an LMDB, given its directory or file.

    Raises UserError if it is truncated or lacks records, and if lmdb is not installed.
    """
    try:
        import lmdb  # optional
    except ModuleNotFoundError as error:
        raise UserError(
            "this format needs the package lmdb, which is not installed: "
            'pip install --constraint constraints.txt -e ".[latents]"'
        ) from error
    file = source / "data.mdb" if source.is_dir() else source
    if not file.is_file():
        raise UserError(f"{source} is no LMDB: name the directory of its data.mdb, or the file")
    try:
        with (
            lmdb.open(str(source), subdir=source.is_dir(), readonly=True, lock=False, readahead=False) as environment,
            environment.begin() as transaction,
        ):
            # Reading pages beyond the end of the file would kill the process.
            needed = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
            if file.stat().st_size < needed:
                raise UserError(f"{file} is cut off at {file.stat().st_size} of {needed} bytes: copy it again")
            names = _lmdb_names(transaction, file)
            yield Store(names, lambda name: _lmdb_entry(transaction, file, name), _chosen(names, labels))
    except lmdb.Error as error:
        raise UserError(
            f"cannot read {file} as an LMDB: {error}.  Copy it again, with nothing writing to it"
        ) from error


def _lmdb_names(transaction: Any, file: pathlib.Path) -> list[str]:
    """Return the keys of all images."""
    content = transaction.get(b"num_samples")
    if content is None:
        raise UserError(f"{file} has no key num_samples: it is no LMDB of latents, or was not written to its end")
    number = int(content) if content.isdigit() else pickles.loads(content, f"num_samples of {file}")
    if type(number) is not int or number < 1:
        raise UserError(f"{file} has {number!r:.40} under num_samples, which must be a whole number from 1 on")
    there = set(transaction.cursor().iternext(keys=True, values=False))
    missing = [str(i) for i in range(number) if b"%d" % i not in there]
    if missing:
        shown = ", ".join(missing[:10]) + (", ..." if len(missing) > 10 else "")
        raise UserError(f"{file} lacks {len(missing)} of its {number} records: {shown}.  Copy or make it again")
    return [str(i) for i in range(number)]


def _lmdb_entry(transaction: Any, file: pathlib.Path, name: str) -> Entry:
    where = f"record {name} of {file}"
    return _of_dict(pickles.loads(transaction.get(name.encode()), where), where)


def _of_dict(value: Any, where: str) -> Entry:
    """Return the entry in a dict, or in an array by itself."""
    if isinstance(value, np.ndarray):
        return Entry(value)
    key = next((key for key in ("moments", "image") if isinstance(value, dict) and key in value), None)
    if key is None:
        held = ", ".join(map(repr, value)) if isinstance(value, dict) else type(value).__name__
        raise UserError(f"{where} has no moments, but {held:.200}: choose the format that it is of")
    return Entry(value[key], value.get(f"{key}_flip"), value.get("label"))


@contextlib.contextmanager
def open_pt(source: pathlib.Path, labels: Labels = None) -> Iterator[Store]:
    """Open a folder of .pt files.  A label in a file takes precedence over that of its folder.

    Raises UserError as `classes.labels_by_folder`.
    """
    if not source.is_dir():
        raise UserError(f"{source} is no folder: name that of the classes")
    everything, tops = folders.Folder(str(source)).list()
    names = folders.with_suffix(everything, ("pt",), str(source))
    by_name, of_labels = dict.fromkeys(names), []
    if any("/" in name for name in names):
        by_folder, of_labels = classes.labels_by_folder(names, tops, str(source))
        by_name = dict(zip(names, by_folder, strict=True))

    def read(name: str) -> Entry:
        entry = _of_dict(_load_pt(source / name), str(source / name))
        return entry._replace(label=by_name[name] if entry.label is None else entry.label)

    own = labels is not None or _of_dict(_load_pt(source / names[0]), str(source / names[0])).label is not None
    yield Store(names, read, _chosen(names, labels), () if own else of_labels)


def _load_pt(path: pathlib.Path) -> Any:
    """Return the content of a .pt file, with tensors as arrays."""
    import torch  # only this format needs it

    try:
        value = torch.load(path, map_location="cpu", weights_only=True)
        if isinstance(value, dict):
            return {key: _to_array(part) if torch.is_tensor(part) else part for key, part in value.items()}
        return _to_array(value) if torch.is_tensor(value) else value
    except pickle.UnpicklingError as error:  # its own message explains how to run the code
        called = re.search(r"GLOBAL (\S+)", str(error))
        does = f"calls {called[1]!r:.200}" if called else "holds more than tensors"
        raise UserError(f"{path} is refused: it {does}.  Have its maker save plain tensors") from error
    except pickles.DAMAGE as error:
        raise UserError(f"cannot read {path}: {error!r:.200}.  Copy it again") from error


def _to_array(tensor: Any) -> np.ndarray:
    """Return a PyTorch tensor as an array; floating tensors of any precision become float32."""
    return (tensor.detach().float() if tensor.is_floating_point() else tensor).numpy()


@contextlib.contextmanager
def open_edm2(source: pathlib.Path, labels: Labels = None) -> Iterator[Store]:
    """Open a folder or .zip of .npy with its dataset.json; with null for labels, all are 0.

    Files without a label are left out with a warning.  Raises UserError if the labels cannot be read.
    """
    files = folders.Folder(str(source)) if source.is_dir() else folders.Zip(str(source))
    labels = folders.read_index(files) if labels is None else labels
    if labels is not None:
        arrays = {name for name in files.list()[0] if name.endswith(".npy")}
        unlabelled = arrays - {f"{folders.plain_path(name)}.npy" for name in labels}
        if unlabelled:
            logging.warning(
                "%s: %d .npy files have no label and are left out, %s for one", source, len(unlabelled), min(unlabelled)
            )
    else:
        logging.warning("%s/%s has null for labels: the label of all files is 0", source, label_files.INDEX)
        names = folders.with_suffix(files.list()[0], ("npy",), str(source))
        labels = dict.fromkeys((name.removesuffix(".npy") for name in names), 0)

    def read(name: str) -> Entry:
        try:
            return Entry(np.load(io.BytesIO(files.read(name)), allow_pickle=False))
        except (*pickles.DAMAGE, *folders.DAMAGED) as error:
            raise UserError(f"cannot read {source}/{name}: {error}.  Its label is there: copy all files") from error

    yield Store([f"{name}.npy" for name in labels], read, list(labels.values()))


def _chosen(names: Sequence[str], labels: Labels) -> list[int] | None:
    """Return the labels of all names, if given to use instead of the store's own."""
    return None if labels is None else folders.labels_of(names, labels, "the file of labels")
