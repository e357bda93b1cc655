"""Raw images with labels, from a folder or .zip with one folder per class or from a TFDS dataset; and ADM's crop.

SOURCE/CLASS/.../NAME.jpg     classes by name, or by value if all are numbers: labels 0, 1, ...
SOURCE/dataset.json           optional, as EDM2's: {"labels": [["NAME.png", 3], ...]}; these labels take precedence.
                              With null for labels, all are 0
"""

import abc
import collections
import hashlib
import io
import pathlib
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent import futures
from typing import TypeVar

import numpy as np
import PIL.Image
from absl import logging

from meanflow.data import label_files, record_reader, sources
from meanflow.data.images import classes, folders
from meanflow.errors import UserError

CROPS = ("centre", "none")
SUFFIXES = ("bmp", "gif", "jfif", "jpe", "jpeg", "jpg", "png", "ppm", "tif", "tiff", "webp")
# Errors from decoding a truncated or corrupt image.
DAMAGED = (
    EOFError, LookupError, OSError, OverflowError, RuntimeError, SyntaxError, TypeError, ValueError, struct.error,
    zlib.error, PIL.Image.DecompressionBombError,
)  # fmt: skip
Item = TypeVar("Item")
Result = TypeVar("Result")


class BrokenImageError(UserError):
    """An image that cannot be read."""


class Pictures(abc.ABC):
    """The images of a source, in a fixed order; threads may share it, and it can be pickled."""

    def __init__(self, names: Sequence[str], labels: Sequence[int], classes: Sequence[str]):
        """names: paths within the source, with /.  labels: from 0 on.  classes: their names, () if there are none."""
        self.classes = classes
        self._names, self._labels = names, labels

    def __len__(self) -> int:
        return len(self._labels)

    def name(self, i: int) -> str:
        """Return the path of image i within its source, with /; of a TFDS dataset `train/123`."""
        return self._names[i]

    def label(self, i: int) -> int:
        """Return the label of image i, from 0 on."""
        return self._labels[i]

    @abc.abstractmethod
    def read(self, i: int) -> np.ndarray:
        """Return image i, uint8 [h w 3]: converted to RGB, without transparency.

        Raises BrokenImageError naming it.
        """

    @abc.abstractmethod
    def digest(self) -> str:
        """Return a short hash of the names and labels, or of what determines them."""


class FilePictures(Pictures):
    """The images of a folder or zip, decoded as ADM does: orientation tags are ignored."""

    def __init__(self, files: folders.Folder | folders.Zip, names: list[str], labels: list[int], classes: list[str]):
        """files: where they are read; names: their paths there."""
        super().__init__(names, labels, classes)
        self._files = files

    def read(self, i: int) -> np.ndarray:
        """Return image i, uint8 [h w 3].  Raises BrokenImageError naming it."""
        content, path = self._content(i), f"{self._files.path}/{self._names[i]}"
        try:
            with PIL.Image.open(io.BytesIO(content)) as image:
                if image.mode.startswith(("I", "F")):
                    raise ValueError(f"mode {image.mode} has more than 8 bits a channel")  # Pillow would clip them
                return np.array(image.convert("RGB"))
        except DAMAGED as error:
            raise BrokenImageError(f"cannot read the image {path} ({error}): replace or remove it") from error

    def _content(self, i: int) -> bytes:
        """Return the bytes of a file.  Raises BrokenImageError for a corrupt zip, UserError for a failing disk."""
        path = f"{self._files.path}/{self._names[i]}"
        try:
            return self._files.read(self._names[i])
        except folders.DAMAGED as error:
            raise BrokenImageError(f"cannot read the image {path} ({error}): replace or remove it") from error
        except OSError as error:
            raise UserError(f"cannot read {path}: {error}.  Check the disk, and that it is still there") from error

    def digest(self) -> str:
        """Return a short hash of the names and labels."""
        lines = (f"{name}\0{label}\n" for name, label in zip(self._names, self._labels, strict=True))
        return hashlib.sha256("".join(lines).encode(errors="surrogateescape")).hexdigest()[:16]


class RecordPictures(Pictures):
    """The images of a split of a TFDS dataset, which decodes them."""

    def __init__(self, source: sources.ImageSource, labels: Sequence[int], split: str):
        """labels: read without decoding the images."""
        info = getattr(source.records, "dataset_info")  # noqa: B009  TFDS's own, not part of a Sequence
        super().__init__((), labels, getattr(info.features["label"], "names", None) or ())
        self._source, self._split = source, split
        self._about = f"{info.full_name} {split} {len(source)} {info.splits[split].num_bytes}"

    def name(self, i: int) -> str:
        """Return `SPLIT/I`."""
        return f"{self._split}/{i}"

    def read(self, i: int) -> np.ndarray:
        """Return image i, uint8 [h w 3].  Raises UserError unless it is stored as uint8 with 1, 3 or 4 channels."""
        record = self._source[i]
        if "image" not in record:
            raise UserError(f"{self.name(i)} holds latents, not an image: name the dataset of images that they are of")
        image = np.asarray(record["image"])
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] not in (1, 3, 4):
            raise UserError(
                f"{self.name(i)} is {image.dtype} of shape {image.shape}; give images uint8 [h w 1, 3 or 4]"
            )
        return np.repeat(image, 3, axis=2) if image.shape[2] == 1 else np.ascontiguousarray(image[:, :, :3])

    def digest(self) -> str:
        """Return a short hash of the dataset's name, version, split and size: reading all labels would take long."""
        return hashlib.sha256(self._about.encode()).hexdigest()[:16]


def open_pictures(source: str, split: str = "train", directory: str = "") -> Pictures:
    """Return the images of a source.

    source: a folder or .zip, see the module; otherwise the name of a dataset for `sources.open_source`.
    split, directory: of a TFDS dataset, as there.
    Raises UserError for a source that does not exist or has no images, labels that are damaged or incomplete, and as
    `folders.Folder.list`, `folders.Zip`, `classes.labels_by_folder` and `sources.open_source`.
    """
    if is_folder(source) or pathlib.Path(source).is_file():
        return _open_files(folders.Folder(source) if is_folder(source) else folders.Zip(source))
    if record_reader.open_dataset(source) is not None:
        raise UserError(f"{source} holds latents or couplings, not images: name the dataset of images they are of")
    try:
        records = sources.open_source(source, split, directory)
    except UserError as error:
        raise UserError(f"{source} is no folder of images and no .zip; as a dataset of TFDS: {error}") from error
    pictures = RecordPictures(records, sources.open_labels(source, split, directory), split)
    logging.info("%s: %d images of a TFDS dataset", source, len(pictures))
    return pictures


def is_folder(source: str) -> bool:
    """Return whether this is a folder, but not that of a dataset."""
    known = (record_reader.SETTINGS, record_reader.FEATURES)
    return pathlib.Path(source).is_dir() and not any(pathlib.Path(source, name).is_file() for name in known)


def _open_files(files: folders.Folder | folders.Zip) -> FilePictures:
    """Return the images of a folder or zip."""
    everything, tops = files.list()
    names = folders.with_suffix(everything, SUFFIXES, files.path)
    labels, of_labels = _labels(files, everything, names, tops)
    logging.info("%s: %d images of %d classes", files.path, len(names), len(of_labels))
    return FilePictures(files, names, labels, of_labels)


def _labels(
    files: folders.Folder | folders.Zip, everything: Sequence[str], names: Sequence[str], tops: set[str]
) -> tuple[list[int], list[str]]:
    """Return the labels of the images `names`, and the names of the classes."""
    index = f"{files.path}/{label_files.INDEX}"
    if label_files.INDEX not in everything:
        deeper = [name for name in everything if name.endswith(f"/{label_files.INDEX}")]
        if deeper:
            folder = f"{files.path}/{min(deeper).rpartition('/')[0]}"
            raise UserError(
                f"{folder} has the labels, {label_files.INDEX}, and {files.path} none: give that folder, or a zip "
                "of what is in it"
            )
        return classes.labels_by_folder(names, tops, files.path)
    known = folders.read_index(files)
    if known is None:
        logging.warning(
            "%s has null for labels: the label of all images is 0.  Remove it to have those of folders", index
        )
        return [0] * len(names), ["0"]
    labels = folders.labels_of(names, known, index)
    return labels, [str(label) for label in range(max(labels) + 1)]


def centre_crop(image: np.ndarray, size: int) -> np.ndarray:
    """Return the square in the middle, uint8 [size size 3], of an image uint8 [h w 3]; its smaller side becomes `size`.

    Source: ADM, openai/guided-diffusion, image_datasets.py (center_crop_arr): box filter by factors of 2 while the
    smaller side is at least 2 size, then bicubic.
    """
    picture = PIL.Image.fromarray(image)
    while min(picture.size) >= 2 * size:
        picture = picture.resize((picture.width // 2, picture.height // 2), PIL.Image.Resampling.BOX)
    scale = size / min(picture.size)
    sides = round(picture.width * scale), round(picture.height * scale)
    resized = np.array(picture.resize(sides, PIL.Image.Resampling.BICUBIC))
    top, left = (resized.shape[0] - size) // 2, (resized.shape[1] - size) // 2
    return resized[top : top + size, left : left + size]


def crop(image: np.ndarray, size: int, how: str, name: str) -> np.ndarray:
    """Return an image cropped to uint8 [size size 3] by one of `CROPS`; `none` leaves it unchanged.

    Raises UserError for an unknown crop and, with `none`, naming an image of another size.
    """
    if how not in CROPS:
        raise UserError(f"no crop {how!r}: choose one of {', '.join(CROPS)}")
    if how == "centre":
        return centre_crop(image, size)
    if image.shape[:2] != (size, size):
        raise UserError(
            f"{name} is of {image.shape[1]} x {image.shape[0]} pixels, not {size} x {size}: crop it (centre)"
        )
    return image


def threaded_map(function: Callable[[Item], Result], items: Iterable[Item], depth: int) -> Iterator[Result]:
    """Yield function(item) for all items in their order, computed by threads up to `depth` items in advance."""
    pool, pending = futures.ThreadPoolExecutor(), collections.deque()
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > depth:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
