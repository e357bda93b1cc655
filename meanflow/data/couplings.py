"""Couplings as a dataset: `noise`, the `image` that a flow model makes of it, and its `label`.

    python -m meanflow.data.couplings SOURCE DEST [--labels FILE] [--shard_size N]

imports couplings of the official layout (Xinxi-Zhang/Re-MeanFlow): a folder with NAME.npy, an image [c h w], and
NAME_noise.npy, its noise, and a JSON file of labels, {"labels": [["00000.npy", 3], ...]} as EDM2's, [["00000", 3], ...]
or {"00000": 3, ...}.  The reflow commands make them anew.
"""

import argparse
import hashlib
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from tqdm import tqdm

from meanflow import tensorflow_logging
from meanflow.config import paths
from meanflow.console_log import setup_logging
from meanflow.data import records
from meanflow.data.images import tfds_images
from meanflow.errors import UserError, exit_on_user_error
from meanflow.sampling import noise as noise_and_labels

NAME = "couplings"
SHARD_SIZE = 2048  # pairs: of ImageNet's latents, 64 MiB
INDEX = "dataset.json"  # the file of labels, unless told otherwise
NO_LABELS = 'holds no labels: it must be {"labels": [[NAME, LABEL], ...]}, or {NAME: LABEL, ...}'
MAX_CLASSES = 2**20  # a larger label is a mistake
Coupler = Callable[[np.ndarray, np.ndarray], np.ndarray]


class Plan(NamedTuple):
    """Which couplings to make."""

    shape: tuple[int, int, int]  # of an image: h w c
    num_samples: int
    num_classes: int
    seed: int  # of noise and random labels
    labels: tfds_images.LabelSource | Sequence[int] | None = None  # repeated in turn; None: random
    distance_clip: float = 0.0  # keep pairs whose mean squared distance is below; 0: all
    shard_size: int = SHARD_SIZE
    batch_size: int = 128


def features(shape: tuple[int, int, int]) -> tfds.features.FeaturesDict:
    """Return the features of couplings of images of a shape (h w c): the image in data units, unit normal noise."""
    array = {"shape": shape, "dtype": np.float32, "encoding": "bytes"}
    image, noise = tfds.features.Tensor(**array), tfds.features.Tensor(**array)
    return tfds.features.FeaturesDict({"image": image, "noise": noise, "label": tfds.features.Scalar(np.int64)})


def make(
    directory: pathlib.Path,
    plan: Plan,
    coupler: Coupler,
    settings: Mapping[str, Any],
    metadata: Any = None,
    process: int = 0,
    num_processes: int = 1,
) -> list[int]:
    """Write this process's share of the couplings of `plan`, or what is missing of it.

    coupler: (noise float32 [b h w c], labels int32 [b]) -> images [b h w c], always of plan.batch_size rows.
    settings: what the coupler depends on.  Pair i depends on these, the plan's seed and i alone, and the batches begin
    with each shard: the number of processes changes nothing.  Returns and raises as `records.begin` and
    `records.write`; raises UserError, too, for a label outside the classes and for images that are not finite.
    """
    shards = records.split_into_shards(plan.num_samples, plan.shard_size)
    layout = records.Layout(directory, NAME, features(plan.shape), len(shards))
    own = {name: getattr(plan, name) for name in ("num_samples", "seed", "distance_clip", "shard_size")}
    records.begin(layout, {**settings, **own})
    pending = sum(len(shards[number]) for number in records.own_shards(layout, process, num_processes))
    disable = True if process else None  # None: unless stderr is a terminal
    with tqdm(total=pending, desc="couplings", unit="pair", disable=disable) as bar:
        return records.write(
            layout, lambda number: _couple(plan, coupler, shards[number], bar), process, num_processes, metadata
        )


def _couple(plan: Plan, coupler: Coupler, indices: range, bar: tqdm) -> Iterator[dict[str, Any]]:
    """Yield the pairs of these indices that are near enough."""
    for start in indices[:: plan.batch_size]:
        rows = np.arange(start, min(start + plan.batch_size, indices.stop))
        noise, labels, _ = noise_and_labels.draw(rows, plan.shape, plan.num_classes, plan.seed)
        if plan.labels is not None:
            labels = np.array([plan.labels[int(row) % len(plan.labels)] for row in rows], np.int32)
        if not 0 <= labels.min() <= labels.max() < plan.num_classes:
            raise UserError(
                f"labels {labels.min()} to {labels.max()} are not in [0, {plan.num_classes}), the teacher's"
            )
        missing = plan.batch_size - len(rows)  # fill up the last batch: one compilation serves all
        padded = np.pad(noise, [(0, missing), (0, 0), (0, 0), (0, 0)]), np.pad(labels, (0, missing))
        images = np.asarray(coupler(*padded)[: len(rows)], np.float32)
        if not np.isfinite(images).all():
            raise UserError(f"of the noises {rows[0]} to {rows[-1]} the teacher makes images that are not finite")
        distances = np.square(noise - images).mean((1, 2, 3), np.float64)
        for image, e, label, distance in zip(images, noise, labels, distances, strict=True):
            if not plan.distance_clip or distance < plan.distance_clip:
                yield {"image": image, "noise": e, "label": int(label)}
        bar.update(len(rows))


def import_folder(source: pathlib.Path, dest: pathlib.Path, index: pathlib.Path, shard_size: int = SHARD_SIZE) -> int:
    """Write the couplings of a folder in the official layout, see above, as a dataset.  Returns how many there are.

    index: the JSON file of labels.  What was begun before goes on.
    Raises UserError for a file that is missing, unlike the first image, or not of the layout, and as `records.begin`.
    """
    pairs = read_index(index)
    shape = _read_array(source / f"{pairs[0][0]}.npy").shape
    shards = records.split_into_shards(len(pairs), shard_size)
    layout = records.Layout(dest, NAME, features(shape), len(shards))
    digest = hashlib.sha256(json.dumps(pairs).encode()).hexdigest()
    records.begin(
        layout, {"source": source.name, "labels": digest, "num_samples": len(pairs), "shard_size": shard_size}
    )

    def read(number: int) -> Iterator[dict[str, Any]]:
        for i in shards[number]:
            name, label = pairs[i]
            image, noise = (_read_array(source / f"{name}{suffix}.npy", shape) for suffix in ("", "_noise"))
            yield {"image": image, "noise": noise, "label": label}
            bar.update()

    pending = sum(len(shards[number]) for number in layout.missing())
    with tqdm(total=pending, desc="importing", unit="pair", disable=None) as bar:
        records.write(layout, read, metadata={"source": str(source.resolve())})
    return len(pairs)


def read_index(path: pathlib.Path) -> list[tuple[str, int]]:
    """Return the names, without .npy, and labels of a JSON file, in its order; the module's docstring has its forms.

    Raises UserError if it is none, or has a name twice.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read the labels of {path}: {error}.  --labels names another file") from error
    pairs = parse_index(content, str(path))
    if pairs is None:
        raise UserError(f"{path} {NO_LABELS}")
    return pairs


def parse_index(content: bytes, where: str, to_name: Callable[[str], str] = str) -> list[tuple[str, int]] | None:
    """Return what `read_index` does, of the content of a file; None for {"labels": null}, as of an unlabelled dataset.

    to_name: from a name there to the one returned.
    """
    try:
        parsed = json.loads(content)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"cannot read the labels of {where}: {error}.  --labels names another file") from error
    if isinstance(parsed, dict) and "labels" in parsed:
        parsed = parsed["labels"]
        if parsed is None:
            return None
    entries = list(parsed.items()) if isinstance(parsed, dict) else parsed
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{where} {NO_LABELS}")
    pairs = [_read_entry(where, entry, to_name) for entry in entries]
    names = set()
    for name, _ in pairs:
        if name in names:
            raise UserError(f"{where} names {name} twice: leave one of them")
        names.add(name)
    return pairs


def _read_entry(where: str, entry: Any, to_name: Callable[[str], str]) -> tuple[str, int]:
    name, label = entry if isinstance(entry, (list, tuple)) and len(entry) == 2 else (None, None)
    if type(name) not in (str, int) or type(label) is not int or not 0 <= label < MAX_CLASSES:
        raise UserError(
            f"{where} has the entry {json.dumps(entry):.200}, which is no name and label, a whole number "
            f"from 0 on, below {MAX_CLASSES}"
        )
    return to_name(str(name)).removesuffix(".npy"), label


def _read_array(path: pathlib.Path, shape: tuple[int, int, int] | None = None) -> np.ndarray:
    """Return an array [c h w] as float32 [h w c].  Raises UserError unless it is one, finite and of that shape."""
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"cannot read {path}: {error}.  Every name has NAME.npy and NAME_noise.npy") from error
    if not isinstance(array, np.ndarray) or array.ndim != 3 or not np.issubdtype(array.dtype, np.floating):
        raise UserError(f"{path} holds no floating array of the shape [c h w]")
    array = np.ascontiguousarray(array.transpose(1, 2, 0), np.float32)
    if shape not in (None, array.shape):
        raise UserError(f"{path} is of shape {array.shape} (h w c), but the first image of {shape}: all must be alike")
    if not np.isfinite(array).all():
        raise UserError(f"{path} has values that are not finite: remove it from the labels")
    return array


def main(argv: list[str] | None = None) -> None:
    """Run the command line.  Raises UserError for what cannot be imported."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="SOURCE", type=paths.read, help="folder of .npy files")
    parser.add_argument(
        "dest", metavar="DEST", type=paths.written, help="directory of the dataset, new or begun before"
    )
    parser.add_argument("--labels", metavar="FILE", type=paths.read, help=f"default: SOURCE/{INDEX}")
    parser.add_argument("--shard_size", metavar="N", type=int, default=SHARD_SIZE, help=f"default: {SHARD_SIZE} pairs")
    args = parser.parse_args(argv)
    if args.shard_size < 1:
        raise UserError(f"--shard_size is {args.shard_size}; it must be at least 1")
    setup_logging()
    num = import_folder(args.source, args.dest, args.labels or args.source / INDEX, args.shard_size)
    print(f"{args.dest}: {num} pairs")


if __name__ == "__main__":
    tensorflow_logging.silence_tensorflow()
    with exit_on_user_error():
        main()
