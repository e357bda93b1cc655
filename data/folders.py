"""The files of a folder or .zip, and their labels: by the folders at its top, or those of a list."""

import os
import pathlib
import threading
import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from absl import logging

from configs.errors import UserError
from data import couplings

INDEX = couplings.INDEX  # the list of labels
IGNORED = ("__MACOSX",)  # macOS adds it to its zips
# What a file of a zip can raise that is cut off or altered.
DAMAGED = (EOFError, NotImplementedError, RuntimeError, zipfile.BadZipFile, zlib.error)
Listing = tuple[list[str], set[str]]


class Folder:
    """The files of a folder."""

    def __init__(self, path: str):
        self.path = path

    def list(self) -> Listing:
        """Return the paths of all files, with /, and the names of the folders at the top; hidden ones are left out."""
        names, tops = [], set()
        for directory, folders, files in os.walk(self.path, onerror=_cannot_list, followlinks=True):
            folders[:] = [name for name in folders if not is_hidden(name)]
            inside = os.path.relpath(directory, self.path).replace(os.sep, "/")
            tops.update(folders if inside == "." else ())
            prefix = "" if inside == "." else f"{inside}/"
            names += [f"{prefix}{name}" for name in files if not is_hidden(name)]
        return names, tops

    def read(self, name: str) -> bytes:
        """Return the bytes of a file."""
        return pathlib.Path(self.path, name).read_bytes()


class Zip:
    """The files of a zip; each process opens it for itself, its threads share that."""

    def __init__(self, path: str):
        """Raises UserError unless there is a zip."""
        self.path = path
        self._lock, self._opened = threading.Lock(), (0, None)
        self._open()

    def list(self) -> Listing:
        """Return the paths of all files, with /, and the names of the folders at the top; hidden ones are left out."""
        shown = [name for name in self._open().namelist() if not any(map(is_hidden, name.split("/")))]
        return [name for name in shown if not name.endswith("/")], {n.split("/")[0] for n in shown if "/" in n}

    def read(self, name: str) -> bytes:
        """Return the bytes of a file."""
        return self._open().read(name)

    def _open(self) -> zipfile.ZipFile:
        with self._lock:
            process, file = self._opened
            if file is None or process != os.getpid():  # a fork would share its place in the file
                try:
                    file = zipfile.ZipFile(self.path)
                except (OSError, zipfile.BadZipFile, NotImplementedError) as error:
                    raise UserError(f"cannot open {self.path} as a zip: {error}.  Give a folder, or mend it") from error
                self._opened = os.getpid(), file
            return file

    def __getstate__(self) -> str:
        return self.path

    def __setstate__(self, path: str) -> None:
        self.path = path
        self._lock, self._opened = threading.Lock(), (0, None)


def read_index(files: Folder | Zip) -> dict[str, int]:
    """Return the labels by name of INDEX among the files.  Raises UserError as `couplings.read_index`."""
    path: Any = zipfile.Path(files.path, INDEX) if isinstance(files, Zip) else pathlib.Path(files.path, INDEX)
    return dict(couplings.read_index(path))


def with_suffix(names: Iterable[str], suffixes: Sequence[str], where: str) -> list[str]:
    """Return the names that end in one of the suffixes, sorted.  Raises UserError if there are none."""
    names = list(names)
    chosen = sorted(name for name in names if name.rpartition(".")[2].lower() in suffixes)
    if not chosen:
        raise UserError(f"{where} holds no files of {', '.join(f'.{suffix}' for suffix in suffixes)}: name another")
    others = len(names) - len(chosen) - (INDEX in names)
    if others:
        example = min(set(names) - set(chosen) - {INDEX})
        logging.warning("%s: %d other files are ignored, %s for one", where, others, example)
    return chosen


def labels_of(names: Sequence[str], known: Mapping[str, int], where: str) -> list[int]:
    """Return the labels of files by name.  Raises UserError for a file without one, or one without its file."""
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UserError(f"{where} has no label of {unknown[0]} ({len(unknown)} such files): add it, or remove the file")
    if len(known) > len(names):
        raise UserError(f"{where} names {min(set(known) - set(names))}, which is not there: copy all files")
    return [known[name] for name in names]


def labels_by_folder(names: Sequence[str], tops: set[str], where: str) -> tuple[list[int], list[str]]:
    """Return labels by the folders at the top, and the names of these; no folders: 0 for all, and a note is logged.

    Raises UserError for files both within and beside such folders, or a folder without any.
    """
    beside = [name for name in names if "/" not in name]
    if beside and len(beside) < len(names):
        within = next(name for name in names if "/" in name)
        raise UserError(f"{where} holds {within} in a class folder, and {beside[0]} in none: move it to one")
    if beside:
        logging.warning("%s has no class folders: the label of all files is 0", where)
        return [0] * len(names), ["0"]
    found = [name.split("/", 1)[0] for name in names]
    empty = sorted(tops - set(found))
    if empty:
        raise UserError(f"{where}/{empty[0]} holds none of the files of a class: remove it, or copy them all")
    below = {tuple(name.split("/")[:2]) for name in names if name.count("/") > 1}
    if len(set(found)) == 1 and len(below) > 1:
        raise UserError(
            f"all images of {where} are in its folder {found[0]}, in {len(below)} folders there: are those the "
            "classes?  Name that folder, or zip what is in it"
        )
    classes = sorted(tops)
    number = {name: label for label, name in enumerate(classes)}
    return [number[name] for name in found], classes


def is_hidden(name: str) -> bool:
    """Return whether a file or folder is no part of the data."""
    return name.startswith(".") or name in IGNORED


def _cannot_list(error: OSError) -> None:
    raise UserError(f"cannot list {error.filename}: {error.strerror}.  Make it readable") from error
