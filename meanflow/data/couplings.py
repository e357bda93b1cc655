"""Couplings as a dataset: `noise`, the `image` that a flow model makes of it, and its `label`.

`make` writes those of a model.  `import_folder` reads the official layout (Xinxi-Zhang/Re-MeanFlow): a folder with
NAME.npy, an image [c h w], NAME_noise.npy, its noise, and a file of labels (`label_files`), in it or above it.
"""

import hashlib
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from meanflow.data import label_files, records
from meanflow.data.record_reader import Feature
from meanflow.errors import UserError
from meanflow.sampling import noise as noise_and_labels

NAME = "couplings"
SHARD_SIZE = 2048  # pairs; 64 MiB for ImageNet's latents
Coupler = Callable[[np.ndarray, np.ndarray], np.ndarray]


class Plan(NamedTuple):
    """Which couplings to generate."""

    shape: tuple[int, int, int]  # of an image: h w c
    num_samples: int
    num_classes: int
    seed: int  # of noise and random labels
    labels: Sequence[int] | None = None  # repeated as often as needed; None: random
    distance_clip: float = 0.0  # keep pairs whose mean squared distance is below it; 0: all
    shard_size: int = SHARD_SIZE
    batch_size: int = 128


def features(shape: tuple[int, int, int]) -> dict[str, Feature]:
    """Return the features of couplings of images of a shape (h w c): the image in data units, unit normal noise."""
    return {"image": Feature("array", shape), "noise": Feature("array", shape), "label": Feature("integer")}


def make(
    directory: pathlib.Path,
    plan: Plan,
    coupler: Coupler,
    settings: Mapping[str, Any],
    metadata: Any = None,
    process: int = 0,
    num_processes: int = 1,
) -> list[int]:
    """Write this process's share of the couplings of `plan`, or the part of it that is missing.

    coupler: (noise float32 [b h w c], labels int32 [b]) -> images [b h w c], always with plan.batch_size rows.
    settings: what the coupler depends on.  Pair i depends only on these, the plan's seed and i, and every shard starts
    a new batch: the number of processes changes nothing.  Returns and raises as `records.begin` and `records.write`;
    also raises UserError for a label outside the classes and for images that are not finite.
    """
    shards = records.split_into_shards(plan.num_samples, plan.shard_size)
    layout = records.Layout(directory, NAME, features(plan.shape), len(shards))
    own = {name: getattr(plan, name) for name in ("num_samples", "seed", "distance_clip", "shard_size")}
    records.begin(layout, {**settings, **own})
    pending = sum(len(shards[number]) for number in records.own_shards(layout, process, num_processes))
    disable = True if process else None  # None: shown only on a terminal
    with tqdm(total=pending, desc="couplings", unit="pair", disable=disable) as bar:
        return records.write(
            layout, lambda number: _couple(plan, coupler, shards[number], bar), process, num_processes, metadata
        )


def _couple(plan: Plan, coupler: Coupler, indices: range, bar: tqdm) -> Iterator[dict[str, Any]]:
    """Yield the pairs with these indices whose distance is below plan.distance_clip."""
    for start in indices[:: plan.batch_size]:
        rows = np.arange(start, min(start + plan.batch_size, indices.stop))
        noise, labels, _ = noise_and_labels.draw(rows, plan.shape, plan.num_classes, plan.seed)
        if plan.labels is not None:
            labels = np.array([plan.labels[int(row) % len(plan.labels)] for row in rows], np.int32)
        if not 0 <= labels.min() <= labels.max() < plan.num_classes:
            raise UserError(
                f"labels {labels.min()} to {labels.max()} are not in [0, {plan.num_classes}), the teacher's"
            )
        missing = plan.batch_size - len(rows)  # pad the last batch: all have one shape, compiled once
        padded = np.pad(noise, [(0, missing), (0, 0), (0, 0), (0, 0)]), np.pad(labels, (0, missing))
        images = np.asarray(coupler(*padded)[: len(rows)], np.float32)
        if not np.isfinite(images).all():
            raise UserError(f"the teacher's images of the noises {rows[0]} to {rows[-1]} are not finite")
        distances = np.square(noise - images).mean((1, 2, 3), np.float64)
        for image, e, label, distance in zip(images, noise, labels, distances, strict=True):
            if not plan.distance_clip or distance < plan.distance_clip:
                yield {"image": image, "noise": e, "label": int(label)}
        bar.update(len(rows))


def import_folder(source: pathlib.Path, dest: pathlib.Path, index: pathlib.Path, shard_size: int = SHARD_SIZE) -> int:
    """Write the couplings of a folder in the official layout, see above, as a dataset.  Returns their number.

    index: the file of labels.  The arrays are in `source`, or in the folder that the index names, see `_folder`.
    Continues a dataset that is not complete.
    Raises UserError for a file that is missing, of another shape than the first or not of this layout, and as
    `records.begin`.
    """
    pairs, root = label_files.read_index(index)
    folder = _folder(source, root, pairs[0][0])
    shape = _read_array(folder / f"{pairs[0][0]}.npy").shape
    shards = records.split_into_shards(len(pairs), shard_size)
    layout = records.Layout(dest, NAME, features(shape), len(shards))
    digest = hashlib.sha256(json.dumps(pairs).encode()).hexdigest()
    records.begin(
        layout, {"source": source.name, "labels": digest, "num_samples": len(pairs), "shard_size": shard_size}
    )

    def read(number: int) -> Iterator[dict[str, Any]]:
        for i in shards[number]:
            name, label = pairs[i]
            image, noise = (_read_array(folder / f"{name}{suffix}.npy", shape) for suffix in ("", "_noise"))
            yield {"image": image, "noise": noise, "label": label}
            bar.update()

    pending = sum(len(shards[number]) for number in layout.missing())
    with tqdm(total=pending, desc="importing", unit="pair", disable=None) as bar:
        records.write(layout, read, metadata={"source": str(source.resolve())})
    return len(pairs)


def _folder(source: pathlib.Path, root: str, name: str) -> pathlib.Path:
    """Return the folder of the arrays: `source`, its subfolder with the name of `root`, or `root`, if it has the file.

    root: the folder on the machine that made them, '' if unknown.  Officially the index lies beside it, as
    DIR/dataset.json and DIR/samples.
    """
    places = [source, source / pathlib.PurePath(root).name, pathlib.Path(root)] if root else [source]
    return next((place for place in places if (place / f"{name}.npy").is_file()), source)


def _read_array(path: pathlib.Path, shape: tuple[int, int, int] | None = None) -> np.ndarray:
    """Return an array [c h w] as float32 [h w c].  Raises UserError unless it is finite and of the given shape."""
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
