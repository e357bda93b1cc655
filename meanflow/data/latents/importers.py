"""Imports other people's latents as a dataset of latents, see `dataset`; `formats` has the formats."""

import hashlib
import json
import pathlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import numpy as np

from meanflow.config import latents as conventions
from meanflow.data import label_files, records
from meanflow.data.latents import dataset, formats, units
from meanflow.errors import UserError

MOMENTS = ("mean_std", "mean_logvar")
LAYOUTS = ("chw", "hwc", "auto")


class Format(NamedTuple):
    """How to open a format, and the defaults of the code it comes from."""

    open: Callable[[pathlib.Path, formats.Labels], AbstractContextManager[formats.Store]]
    moments: str  # of MOMENTS
    layout: str  # of LAYOUTS
    convention: str  # of `meanflow.config.latents.CONVENTIONS`


FORMATS = {
    "lmdb": Format(formats.open_lmdb, "mean_logvar", "chw", "imm"),
    "pt": Format(formats.open_pt, "mean_std", "auto", "sd"),
    "edm2": Format(formats.open_edm2, "mean_std", "chw", "edm2"),
}


class Options(NamedTuple):
    """What to import, and how."""

    format: str  # of FORMATS
    source: pathlib.Path
    moments: str  # of MOMENTS
    layout: str  # of LAYOUTS
    convention: conventions.Convention
    vae: str = ""  # the autoencoder, if known
    labels: pathlib.Path | None = None  # JSON, as `label_files.read` takes it, instead of the store's own
    shard_size: int = dataset.SHARD_SIZE


def import_store(dest: pathlib.Path, options: Options) -> int:
    """Write the latents of a store as a dataset.  Returns their number.

    Raises UserError naming the file or key that is missing, damaged, unsafe, of another shape than the first, not
    finite or without a label, and as `dataset.write`.
    """
    labels = dict(label_files.read(options.labels)) if options.labels else None
    with FORMATS[options.format].open(options.source, labels) as store:
        first = _read(store, 0, options)

        def of_shard(indices: range, _: list[str]) -> Iterator[dict[str, Any]]:
            for i in indices:
                yield _read(store, i, options, first)

        dataset.write(_job(dest, store, options, first), of_shard)
        return len(store.names)


def _job(dest: pathlib.Path, store: formats.Store, options: Options, first: dict[str, Any]) -> dataset.Job:
    """Return the job for `dataset.write`; first: a record."""
    h, w, channels = first["moments"].shape
    flip = "moments_flip" in first
    facts = {
        "vae": options.vae, "convention": conventions.to_dict(options.convention), "image_size": None, "crop": None,
        "latent_shape": (h, w, channels // 2), "flip": flip, "pixels": False,
    }  # fmt: skip
    how = {name: getattr(options, name) for name in ("format", "moments", "layout")}
    digest = hashlib.sha256(json.dumps([list(store.names), store.labels]).encode()).hexdigest()[:16]
    about = {"source": options.source.name, "images": digest, "shard_size": options.shard_size}
    facts |= {"classes": list(store.classes)} if store.classes else {}
    facts["source"] = {"path": str(options.source.resolve()), **how}
    shards = records.split_into_shards(len(store.names), options.shard_size)
    kept = dataset.features(facts["latent_shape"], flip)
    return dataset.Job(dest, kept, shards, {**facts, **how, **about}, facts)


def _read(store: formats.Store, i: int, options: Options, first: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return a record of the dataset.  Raises UserError naming it unless it is complete and shaped like the first."""
    name = store.names[i]
    where, entry = f"{options.source}: {name}", store.read(name)
    label = _to_label(entry.label if store.labels is None else store.labels[i], where)
    record = {"moments": _to_moments(entry.moments, where, options), "label": label, "name": name}
    if entry.flipped is not None:
        record["moments_flip"] = _to_moments(entry.flipped, f"{where}, mirrored", options)
    shapes = {key: record[key].shape for key in ("moments", "moments_flip") if key in record}
    if len(set(shapes.values())) > 1:
        raise UserError(f"{where} has moments of shape {shapes} (h w 2c): both must be alike")
    others = {key: first[key].shape for key in ("moments", "moments_flip") if key in first} if first else shapes
    if shapes != others:
        raise UserError(f"{where} has {shapes} (h w 2c), but {store.names[0]} {others}: all must be alike")
    return record


def _to_label(label: Any, where: str) -> int:
    """Return a label as int.  Raises UserError unless it is a whole number from 0 on."""
    number = np.asarray(-1 if label is None else label)
    if label is None or number.size != 1 or number.dtype.kind not in "iu" or number.item() < 0:
        shown = "no label" if label is None else f"the label {label!r:.40}, no whole number from 0 on"
        raise UserError(f"{where} has {shown}: --labels names a file of labels")
    return int(number.item())


def _to_moments(array: Any, where: str, options: Options) -> np.ndarray:
    """Return moments float32 [h w 2c], mean and standard deviation.  Raises UserError for anything else."""
    if not isinstance(array, np.ndarray) or not np.issubdtype(array.dtype, np.floating):
        raise UserError(f"{where} is no floating array: give moments, [2c h w]")
    array = array[0] if array.ndim == 4 and len(array) == 1 else array
    if array.ndim != 3 or not array.size:
        raise UserError(f"{where} is of shape {array.shape}: give moments, [2c h w]")
    layout = options.layout if options.layout != "auto" else _layout(array.shape, where)
    array = array.transpose(1, 2, 0) if layout == "chw" else array
    if array.shape[2] % 2:
        raise UserError(f"{where} has {array.shape[2]} channels, and moments an even number: see --layout")
    mean, spread = np.split(array, 2, axis=2)
    if options.moments == "mean_logvar":  # in float64, rounded once: the same on all machines
        spread = np.exp(0.5 * np.clip(spread.astype(np.float64), -30, 20))
    moments = np.concatenate([mean, spread], axis=2, dtype=np.float32, casting="same_kind")
    units.check_moments(moments, where, "remove it or make it anew; if they hold log-variances, --moments mean_logvar")
    return moments


def _layout(shape: tuple[int, ...], where: str) -> str:
    """Return which of LAYOUTS an array of square latents has.  Raises UserError if it is ambiguous."""
    first, second = shape[1] == shape[2], shape[0] == shape[1]
    if first == second:
        raise UserError(f"{where} is of shape {shape}, of which the channels cannot be told: --layout chw, or hwc")
    return "chw" if first else "hwc"
