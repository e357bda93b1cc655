"""Latents as a dataset: for each image the moments of an autoencoder's posterior, its label and its name.

    moments        float32 [h w 2c]: the mean, then the standard deviation (not the logarithm of the variance)
    moments_flip   optional: the same for the mirrored image
    pixels         optional: uint8 [s s 3], the image that was encoded
    label, name    int64, and the path within the source

metadata.json states the autoencoder, the convention of its latents, their statistics and the names of the classes.
`python -m jax_impl.encode` and `torchrun torch_impl/encode.py` make such datasets of images, `python -m
meanflow.commands.import_latents` of other people's latents.
"""

import io
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
from absl import logging
from tqdm import tqdm

from meanflow.config import latents as conventions
from meanflow.data import records
from meanflow.data.images import manifest
from meanflow.data.images.pictures import BrokenImageError, Pictures, crop, threaded_map
from meanflow.data.latents import units
from meanflow.data.record_reader import FEATURES, SETTINGS, Feature
from meanflow.errors import UserError

NAME = "latents"
SHARD_SIZE = 2048  # images; 64 MiB for ImageNet at 256
Encode = Callable[[np.ndarray], np.ndarray]


class Plan(NamedTuple):
    """Which latents to make from images."""

    image_size: int
    latent_shape: tuple[int, int, int]  # h w c
    crop: str = "centre"  # of `meanflow.data.images.pictures.CROPS`
    batch_size: int = 32
    shard_size: int = SHARD_SIZE
    flip: bool = False  # keep moments_flip
    pixels: bool = False  # keep the images
    skip_broken: bool = False  # leave out images that cannot be read


class Job(NamedTuple):
    """A dataset of latents to write, from any source."""

    directory: pathlib.Path
    features: Mapping[str, Feature]
    shards: Sequence[range]  # the indices of the images in each shard
    settings: Mapping[str, Any]  # what the records depend on
    facts: Mapping[str, Any]  # for the metadata: vae, convention, latent_shape and others


class Tally:
    """Sums over the images of a shard, in float64, for the statistics of the dataset."""

    def __init__(self, num_channels: int):
        self.num_images, self.num_positions, self.skipped = 0, 0, []
        self._sum, self._squares = np.zeros(num_channels), np.zeros(num_channels)

    def add(self, moments: np.ndarray) -> None:
        """Add the moments [h w 2c] of an image."""
        mean, std = np.split(moments.astype(np.float64), 2, axis=-1)
        self.num_images += 1
        self.num_positions += mean[..., 0].size
        self._sum += mean.sum((0, 1))
        self._squares += (mean**2 + std**2).sum((0, 1))

    def note(self) -> dict[str, Any]:
        """Return the sums as JSON values, without loss of precision."""
        images, positions = self.num_images, self.num_positions
        sums = {"sum": self._sum.tolist(), "squares": self._squares.tolist()}
        return {"num_images": images, "num_positions": positions, **sums, "skipped": self.skipped}


def features(shape: tuple[int, int, int], flip: bool, pixels: int = 0) -> dict[str, Feature]:
    """Return the features of a dataset of latents of a shape (h w c); pixels: side of the images, 0: not stored."""
    moments = Feature("array", (*shape[:2], 2 * shape[2]))
    known = {"moments": moments} | ({"moments_flip": moments} if flip else {})
    known |= {"pixels": Feature("image", (pixels, pixels, 3))} if pixels else {}
    return known | {"label": Feature("integer"), "name": Feature("text")}


def make(
    directory: pathlib.Path,
    pictures: Pictures,
    encode: Encode,
    plan: Plan,
    settings: Mapping[str, Any],
    process: int = 0,
    num_processes: int = 1,
) -> list[int]:
    """Write this process's share of the latents of `pictures`, or the part of it that is missing.

    encode: images uint8 [b s s 3] -> moments float32 [b h w 2c], see the module; always with plan.batch_size rows.
    settings: JSON values, what `encode` depends on: `vae` (a name, which may change), `convention`
    (`meanflow.config.latents.to_dict`) and any others; with `normalised` true, the convention becomes the one that
    `units.normalising` makes of the data.
    Every shard starts a new batch: the number of processes, and kills, change nothing.  Images that are removed before
    the dataset is complete are left out.
    Returns and raises as `records.begin` and `records.write`; also raises UserError naming an image of the wrong size
    or whose moments are not finite, and BrokenImageError for one that cannot be read, unless plan.skip_broken.
    """
    kept = features(plan.latent_shape, plan.flip, plan.image_size if plan.pixels else 0)
    notes = records.Layout(directory, NAME, kept, 0).note(0).parent
    pictures = manifest.recall(notes, pictures)
    shards = records.split_into_shards(len(pictures), plan.shard_size)
    own = {name: getattr(plan, name) for name in ("image_size", "latent_shape", "crop", "flip", "pixels")}
    about = {"images": pictures.digest(), "num_images": len(pictures), "shard_size": plan.shard_size}
    depends = {
        name: value for name, value in settings.items() if name != "vae"
    }  # represented by the digest of its content
    facts = {**settings, **own, "classes": list(pictures.classes)}
    job = Job(directory, kept, shards, {**depends, **own, **about}, facts)

    def of_shard(indices: range, skipped: list[str]) -> Iterator[dict[str, Any]]:
        manifest.keep(notes, pictures)
        return _encode(pictures, encode, plan, indices, skipped)

    return write(job, of_shard, process, num_processes)


def write(
    job: Job,
    of_shard: Callable[[range, list[str]], Iterator[dict[str, Any]]],
    process: int = 0,
    num_processes: int = 1,
) -> list[int]:
    """Write this process's share of the dataset of a job, or the missing part, and with the last shard its statistics.

    of_shard: from the image indices of a shard to its records; appends the names of images left out to the given list.
    Returns and raises as `records.begin` and `records.write`; also raises UserError for facts without a convention, or
    with one for another number of channels.
    """
    layout = records.Layout(job.directory, NAME, job.features, len(job.shards))
    num_channels = job.facts["latent_shape"][2]
    conventions.check(conventions.from_dict(job.facts["convention"]), num_channels)
    records.begin(layout, {"kind": NAME, **job.settings})
    pending = sum(len(job.shards[number]) for number in records.own_shards(layout, process, num_processes))
    disable = True if process else None  # None: shown only on a terminal
    with tqdm(total=pending, desc="latents", unit="image", disable=disable) as bar:

        def tallied(number: int) -> Iterator[dict[str, Any]]:
            tally = Tally(num_channels)
            for record in of_shard(job.shards[number], tally.skipped):
                tally.add(record["moments"])
                yield record
                bar.update()
            bar.update(len(tally.skipped))
            records.keep_note(layout, number, tally.note())

        return records.write(
            layout, tallied, process, num_processes, lambda: _metadata(job, records.read_notes(layout))
        )


def _metadata(job: Job, notes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the metadata of a dataset, given the notes of its shards.

    mean: of the posterior means over images and positions.  std: of samples, sqrt(Var[mean] + E[std^2]).  Without
    the mirrored images.
    """
    num_positions = sum(note["num_positions"] for note in notes)
    mean, square = (np.sum([note[key] for note in notes], axis=0) / num_positions for key in ("sum", "squares"))
    metadata = {
        "kind": NAME,
        **job.facts,
        "num_images": sum(note["num_images"] for note in notes),
        "skipped": [name for note in notes for name in note["skipped"]],
        "mean": mean.tolist(),
        "std": np.sqrt(np.maximum(square - mean**2, 0)).tolist(),
    }
    own = {"convention": conventions.to_dict(units.normalising(metadata))} if job.facts.get("normalised") else {}
    return metadata | own


def _encode(
    pictures: Pictures, encode: Encode, plan: Plan, indices: range, skipped: list[str]
) -> Iterator[dict[str, Any]]:
    """Yield the records of the readable images of a shard."""
    for batch in _batches(pictures, plan, indices, skipped):
        images = np.stack([record["pixels"] for record in batch])
        names = [record["name"] for record in batch]
        moments = _moments(encode, images, plan, names)
        flipped = _moments(encode, images[:, :, ::-1], plan, names) if plan.flip else None
        for row, record in enumerate(batch):
            record["moments"] = moments[row]
            if flipped is not None:
                record["moments_flip"] = flipped[row]
            if plan.pixels:
                record["pixels"] = _to_png(record["pixels"])
            else:
                del record["pixels"]
            yield record


def _to_png(image: np.ndarray) -> io.BytesIO:
    """Return a PNG; TFDS would import TensorFlow to make one."""
    file = io.BytesIO()
    PIL.Image.fromarray(image).save(file, "PNG")
    file.seek(0)
    return file


def _batches(pictures: Pictures, plan: Plan, indices: range, skipped: list[str]) -> Iterator[list[dict[str, Any]]]:
    """Yield {'pixels', 'label', 'name'} of the readable images, in batches of plan.batch_size."""

    def read(i: int) -> dict[str, Any] | BrokenImageError:
        try:
            image = crop(pictures.read(i), plan.image_size, plan.crop, pictures.name(i))
        except BrokenImageError as error:
            return error
        name = pictures.name(i).encode(errors="backslashreplace").decode()  # file names need not be UTF-8
        return {"pixels": image, "label": pictures.label(i), "name": name}

    batch = []
    for i, read_one in zip(indices, threaded_map(read, indices, 2 * plan.batch_size), strict=True):
        if isinstance(read_one, dict):
            batch.append(read_one)
        elif plan.skip_broken or isinstance(read_one, manifest.GoneImageError):
            logging.warning("left out: %s", read_one)
            skipped.append(pictures.name(i))
        else:
            raise BrokenImageError(f"{read_one}, or leave out such images with --skip_broken") from read_one
        if len(batch) == plan.batch_size:
            yield batch
            batch = []
    if batch:
        yield batch


def _moments(encode: Encode, images: np.ndarray, plan: Plan, names: Sequence[str]) -> np.ndarray:
    """Return the moments float32 [n h w 2c] of up to a batch of images."""
    missing = plan.batch_size - len(images)  # pad the last batch: all have one shape, compiled once
    padded = np.pad(images, [(0, missing), (0, 0), (0, 0), (0, 0)])
    moments = np.asarray(encode(padded), np.float32)[: len(images)]
    h, w, c = plan.latent_shape
    if moments.shape[1:] != (h, w, 2 * c):
        raise UserError(
            f"the autoencoder makes moments of shape {moments.shape[1:]} of images of {plan.image_size} pixels, not "
            f"{(h, w, 2 * c)}: set the shape of its latents"
        )
    for name, of_image in zip(names, moments, strict=True):
        units.check_moments(of_image, name, "encode in float32, or remove the image")
    return moments


def read_metadata(name_or_directory: str) -> dict[str, Any] | None:
    """Return the metadata of a dataset of latents, as `write` stores it; None for any other dataset.

    Raises UserError for one that is not complete yet, or whose files are damaged.
    """
    directory = pathlib.Path(name_or_directory)
    settings = _read_json(directory / SETTINGS)
    if settings is None or settings.get("kind") != NAME:
        return None
    metadata = _read_json(directory / records.METADATA)
    if metadata is None or not (directory / FEATURES).exists():
        raise UserError(f"dataset {directory} is not whole: run the command that writes it until it misses no shard")
    return metadata


def _read_json(path: pathlib.Path) -> dict[str, Any] | None:
    """Return the object in a JSON file; None if there is no file."""
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}.  Make the dataset anew") from error
    return content if isinstance(content, dict) else None
