"""The list of images of a dataset, stored while the dataset is written: images removed meanwhile are left out."""

import gzip
import json
import os
import pathlib
import uuid
import zlib

import numpy as np
from absl import logging

from meanflow.data.images.pictures import BrokenImageError, FilePictures, Pictures
from meanflow.errors import UserError

PREFIX, SUFFIX = "images-", ".json.gz"  # of the file name, with the digest of the list between them


class GoneImageError(BrokenImageError):
    """An image that was removed after the dataset was started."""


class ListedPictures(Pictures):
    """The images of a list, some of which have been removed from the source."""

    def __init__(self, left: Pictures, names: list[str], labels: list[int], digest: str):
        """left: those still in the source.  names, labels, digest: of the list."""
        super().__init__(names, labels, left.classes)
        self._left, self._digest = left, digest
        self._index = {left.name(i): i for i in range(len(left))}

    def read(self, i: int) -> np.ndarray:
        """Return image i, uint8 [h w 3].  Raises GoneImageError if it was removed, and as `left.read`."""
        index = self._index.get(self._names[i])
        if index is None:
            raise GoneImageError(f"{self._names[i]} was removed")
        return self._left.read(index)

    def digest(self) -> str:
        """Return the digest of the list."""
        return self._digest


def recall(directory: pathlib.Path, pictures: Pictures) -> Pictures:
    """Return the images on the list that `keep` stored in a directory; `pictures` if there is none.

    Raises UserError if `pictures` has images that are not on the list or have another label there, or if the list is
    damaged.
    """
    path = next(iter(sorted(directory.glob(f"{PREFIX}*{SUFFIX}"))), None)
    if path is None or path == _path(directory, pictures):
        return pictures
    try:
        names, labels = json.loads(gzip.decompress(path.read_bytes()))
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise UserError(f"cannot read {path}: {error}.  Delete {directory.parent}, and begin anew") from error
    known = dict(zip(names, labels, strict=True))
    for i in range(len(pictures)):
        name, label = pictures.name(i), pictures.label(i)
        if known.get(name) != label:
            told = "which is new" if name not in known else f"now of label {label}, {known[name]} before"
            raise UserError(
                f"{directory.parent} was begun with other images: there is {name}, {told}.  Set them back, or name a "
                "new directory"
            )
    listed = ListedPictures(pictures, names, labels, path.name.removeprefix(PREFIX).removesuffix(SUFFIX))
    gone = known.keys() - {pictures.name(i) for i in range(len(pictures))}
    logging.warning(
        "%d images were removed since %s was begun, %s for one: those not yet in it are left out",
        len(gone), directory.parent, min(gone),
    )  # fmt: skip
    return listed


def keep(directory: pathlib.Path, pictures: Pictures) -> None:
    """Store the list of the images of a folder or zip in a directory, atomically, unless it is there.

    Raises UserError if it cannot be written.
    """
    path = _path(directory, pictures)
    if not isinstance(pictures, FilePictures) or path.exists():
        return
    indices = range(len(pictures))
    content = json.dumps([[pictures.name(i) for i in indices], [pictures.label(i) for i in indices]])
    unfinished = path.with_name(f".{uuid.uuid4().hex}")
    try:
        directory.mkdir(exist_ok=True)
        unfinished.write_bytes(gzip.compress(content.encode(), mtime=0))
        os.replace(unfinished, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}.  Free the disk") from error


def _path(directory: pathlib.Path, pictures: Pictures) -> pathlib.Path:
    return directory / f"{PREFIX}{pictures.digest()}{SUFFIX}"
