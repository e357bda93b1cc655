"""Imports other people's latents as a dataset of latents, see `dataset`.

    python -m meanflow.data.latents.importers FORMAT SOURCE DEST [--convention NAME] [--vae NAME] [--labels FILE]

lmdb   LMDB of pickled dicts under the keys b"0", b"1", ...: `moments` [2c h w], perhaps `moments_flip`, and `label`;
       b"num_samples" says how many.  Moments are mean and log-variance (the PyTorch reproduction of MeanFlow).
pt     folder with a folder for each class and a .pt for each image: a dict with `moments` or `image`, perhaps
       `moments_flip` or `image_flip`, and perhaps `label`, or the tensor alone; [2c h w], [1 2c h w] or [h w 2c], mean
       and standard deviation (official MeanFlow and improved MeanFlow, in JAX).
edm2   folder or .zip of .npy [2c h w], mean and standard deviation, and dataset.json, {"labels": [["NAME.npy", 3],
       ...]} (EDM2, Re-MeanFlow; decoupled MeanFlow and REPA have the same with --convention sd).

Nothing that the files hold is executed.  What was begun before goes on.
"""

import argparse
import hashlib
import json
import pathlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import numpy as np

from meanflow import tensorflow_logging
from meanflow.config import latents as conventions
from meanflow.config import paths
from meanflow.console_log import setup_logging
from meanflow.data import couplings, records
from meanflow.data.latents import dataset, formats
from meanflow.errors import UserError, exit_on_user_error

MOMENTS = ("mean_std", "mean_logvar")
LAYOUTS = ("chw", "hwc", "auto")


class Format(NamedTuple):
    """How to open a format, and what its makers did."""

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
    vae: str = ""  # the autoencoder, where it is known
    labels: pathlib.Path | None = None  # JSON, as `couplings.read_index` takes it, instead of the store's own
    shard_size: int = dataset.SHARD_SIZE


def import_store(dest: pathlib.Path, options: Options) -> int:
    """Write the latents of a store as a dataset.  Returns how many there are.

    Raises UserError naming the file or key that is missing, damaged, unsafe, unlike the first one, not finite or
    without a label, and as `latents.write`.
    """
    labels = dict(couplings.read_index(options.labels)) if options.labels else None
    with FORMATS[options.format].open(options.source, labels) as store:
        first = _read(store, 0, options)

        def of_shard(indices: range, _: list[str]) -> Iterator[dict[str, Any]]:
            for i in indices:
                yield _read(store, i, options, first)

        dataset.write(_job(dest, store, options, first), of_shard)
        return len(store.names)


def _job(dest: pathlib.Path, store: formats.Store, options: Options, first: dict[str, Any]) -> dataset.Job:
    """Return what `latents.write` needs; first: a record."""
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
    """Return a record of the dataset.  Raises UserError naming it unless it is whole, and like the first one."""
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
    """Return a label.  Raises UserError unless it is a whole number from 0 on."""
    number = np.asarray(-1 if label is None else label)
    if label is None or number.size != 1 or number.dtype.kind not in "iu" or number.item() < 0:
        shown = "no label" if label is None else f"the label {label!r:.40}, no whole number from 0 on"
        raise UserError(f"{where} has {shown}: --labels names a file of labels")
    return int(number.item())


def _to_moments(array: Any, where: str, options: Options) -> np.ndarray:
    """Return moments float32 [h w 2c], mean and standard deviation.  Raises UserError for what is none."""
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
    if options.moments == "mean_logvar":  # in float64: rounded once, the same on all machines
        spread = np.exp(0.5 * np.clip(spread.astype(np.float64), -30, 20))
    moments = np.concatenate([mean, spread], axis=2, dtype=np.float32, casting="same_kind")
    dataset.check_moments(
        moments, where, "remove it or make it anew; if they hold log-variances, --moments mean_logvar"
    )
    return moments


def _layout(shape: tuple[int, ...], where: str) -> str:
    """Return which of LAYOUTS an array of square latents has.  Raises UserError if that cannot be told."""
    first, second = shape[1] == shape[2], shape[0] == shape[1]
    if first == second:
        raise UserError(f"{where} is of shape {shape}, of which the channels cannot be told: --layout chw, or hwc")
    return "chw" if first else "hwc"


def main(argv: list[str] | None = None) -> None:
    """Run the command line.  Raises UserError for what cannot be imported."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("format", metavar="FORMAT", choices=FORMATS, help=", ".join(FORMATS))
    add("source", metavar="SOURCE", type=paths.read, help="directory, folder or .zip, see above")
    add("dest", metavar="DEST", type=paths.written, help="directory of the dataset, new or begun before")
    defaults = {
        name: ", ".join(f"{key} {getattr(f, name)}" for key, f in FORMATS.items()) for name in Format._fields[1:]
    }
    known = conventions.CONVENTIONS
    add("--convention", choices=known, help=f"what the data are trained in; default: {defaults['convention']}")
    add("--vae", metavar="NAME", type=paths.expand, default="", help="the autoencoder that made them, to decode with")
    add("--labels", metavar="FILE", type=paths.read, help="JSON, [[NAME, LABEL], ...], instead of the store's labels")
    add("--moments", choices=MOMENTS, help=f"default: {defaults['moments']}")
    add("--layout", choices=LAYOUTS, help=f"of an array; auto: as square latents show.  Default: {defaults['layout']}")
    add("--shard_size", metavar="N", type=int, default=dataset.SHARD_SIZE, help=f"default: {dataset.SHARD_SIZE} images")
    args = parser.parse_args(argv)
    if args.shard_size < 1:
        raise UserError(f"--shard_size is {args.shard_size}; it must be at least 1")
    setup_logging()
    own = FORMATS[args.format]
    convention = known[args.convention or own.convention]
    moments, layout = args.moments or own.moments, args.layout or own.layout
    options = Options(args.format, args.source, moments, layout, convention, args.vae, args.labels, args.shard_size)
    num = import_store(args.dest, options)
    print(f"{args.dest}: {num} latents of the convention {conventions.describe(convention)}")


if __name__ == "__main__":
    tensorflow_logging.silence_tensorflow()
    with exit_on_user_error():
        main()
