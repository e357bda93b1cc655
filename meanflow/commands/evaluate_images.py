"""The evaluate commands without a model: metrics of image files, and statistics of real images."""

import json
import os
import pathlib
import tempfile
import types
from collections.abc import Callable, Iterator, Mapping
from concurrent import futures
from typing import Protocol

import numpy as np
from absl import flags
from tqdm import tqdm

from meanflow import files
from meanflow.commands import image_metrics, sample
from meanflow.commands.frozen_networks import FrozenNetworks
from meanflow.config import options, paths
from meanflow.data.images import pictures
from meanflow.errors import UserError
from meanflow.metrics import accumulate, references
from meanflow.process_group import ProcessGroup

BATCH = 64  # images
KEPT, SEED = 50_000, 0  # reference images, drawn at random, whose features are kept for kid and pr
# Flags of sampling and sweeps, which do not apply to image files.
OF_MODELS = (*sample.OPTIONS, "num_samples", "save", "vae", "omegas", "intervals", "workdir")
Start = Callable[[options.Config], ProcessGroup]

flags.disclaim_key_flags()  # --help lists the flags under the command that defines them


class Images(Protocol):
    """A sequence of images, such as `meanflow.data.images.pictures.Pictures`."""

    def __len__(self) -> int: ...

    def name(self, i: int) -> str: ...

    def read(self, i: int) -> np.ndarray: ...


class NpzImages:
    """The images of an .npz in the layout of ADM's evaluator: arr_0 uint8 [n h w 1 or 3]."""

    def __init__(self, path: str):
        """Raises UserError if the file is not one."""
        self.path = path
        try:
            with np.load(path, allow_pickle=False) as file:
                self.images = file["arr_0"]
        except (OSError, *references.DAMAGE) as error:
            raise UserError(f"cannot read the images of {path}: {error}.  It needs arr_0, as --save=npz") from error
        if self.images.ndim != 4 or self.images.dtype != np.uint8 or self.images.shape[3] not in (1, 3):
            raise UserError(f"{path} has arr_0 of {self.images.dtype} {self.images.shape}, not uint8 [n h w 1 or 3]")
        if not self.images.size:
            raise UserError(f"{path} has no images, arr_0 is of shape {self.images.shape}: give another file")

    def __len__(self) -> int:
        return len(self.images)

    def name(self, i: int) -> str:
        """Return the name of image i for messages."""
        return f"{self.path}[{i}]"

    def read(self, i: int) -> np.ndarray:
        """Return image i, uint8 [h w 3]."""
        return np.broadcast_to(self.images[i], (*self.images.shape[1:3], 3))


def define_flags() -> None:
    """Define the flags for image files."""
    flags.DEFINE(
        paths.READ,
        "make_reference",
        "",
        "Only write --reference from these real images: a folder, .zip or TFDS dataset.",
    )
    flags.DEFINE(paths.READ, "samples", "", "Evaluate these images instead of a model's: a folder, .zip or .npz.")
    flags.DEFINE_string("split", "train", "Split of a TFDS dataset of real images.")
    flags.DEFINE_integer(
        "image_size", None, "Crop the images to this size as ADM does; by default they keep theirs.",
        lower_bound=1,
    )  # fmt: skip


def make_reference(framework: FrozenNetworks, start: Start, config: options.Config) -> None:
    """Write the statistics of real images that the metrics of `config.evaluation` need, and print their path.

    Default metric: fid.  For kid and pr the features of up to `KEPT` images are kept too.  Raises UserError for what is
    missing.
    """
    f, c = flags.FLAGS, config.evaluation
    check_flags("make_reference")
    c.metrics = c.metrics or ("fid",)
    if set(c.metrics) == {"is"}:
        raise UserError("--make_reference: the metric `is` needs no real images; name others by --metrics")
    if not c.reference.endswith(".npz"):
        raise UserError("--make_reference needs --reference=FILE.npz, the file to write")
    if accumulate.needs(c.metrics) & image_metrics.INCEPTION and not c.inception:
        raise UserError("--make_reference needs --inception, the weights that python -m parity.convert makes")
    group = start(config)
    if not group.process:
        files.check_writable(c.reference)
    source = pictures.open_pictures(f.make_reference, f.split, config.data.dir)
    accumulate.check_numbers(c.metrics, len(source), {})
    size = size_of(source, f.image_size)
    whole = collect(source, config, framework, f.image_size, group)
    if whole:
        kinds = [kind for kind in references.METRICS if accumulate.FEATURES[kind] in whole.features]
        keep_reference(c.reference, {kind: accumulate.to_reference(whole, kind, c.convention, size) for kind in kinds})
        print(os.path.abspath(c.reference))


def keep_reference(path: str, found: dict[str, references.Reference]) -> None:
    """Write statistics; if that fails, write them to a temporary directory and raise UserError naming it."""
    try:
        references.write(path, found)
    except UserError as error:
        other = pathlib.Path(tempfile.mkdtemp(prefix="reference_")) / pathlib.Path(path).name
        references.write(other, found)
        raise UserError(f"{error}  The statistics are in {other}") from error


def evaluate_samples(framework: FrozenNetworks, start: Start, config: options.Config) -> None:
    """Print the metrics of `config.evaluation` for the images in --samples.  Raises UserError if there are none.

    The images are uint8 already, so of the convention only Inception's preprocessing applies.
    """
    f, c = flags.FLAGS, config.evaluation
    check_flags("samples")
    if not c.metrics:
        raise UserError("--samples needs --metrics: say what to measure")
    found = image_metrics.read_references(c)
    group = start(config)
    is_npz = pathlib.Path(f.samples).suffix == ".npz"
    source = NpzImages(f.samples) if is_npz else pictures.open_pictures(f.samples, f.split, config.data.dir)
    accumulate.check_numbers(c.metrics, len(source), found)
    if found:
        image_metrics.check_sizes(c, found, size_of(source, f.image_size))
    whole = collect(source, config, framework, f.image_size, group, found)
    if whole:
        values = accumulate.results(whole, found, c.convention)
        print(json.dumps({"num_samples": len(source)} | values | image_metrics.provenance(c)))


def check_flags(flag: str) -> None:
    """Raise UserError for a flag that needs a model, given together with --`flag`."""
    given = [name for name in OF_MODELS if name in flags.FLAGS and flags.FLAGS[name].present]
    if given:
        raise UserError(f"--{given[0]} is for samples of a model, but --{flag} takes image files: leave it out")


def size_of(source: Images, size: int | None) -> tuple[int, int]:
    """Return the height and width that all images must have: those of the first, after the crop to `size`, if any."""
    h, w = read(source, 0, size).shape[:2]
    return h, w


def collect(
    source: Images,
    config: options.Config,
    framework: FrozenNetworks,
    size: int | None,
    group: ProcessGroup,
    found: Mapping[str, references.Reference] = types.MappingProxyType({}),
) -> accumulate.Collector | None:
    """Return, in the first process, the features of all images that config.evaluation.metrics need; None elsewhere.

    For a reference of more than `KEPT` images, those whose features are kept are drawn with a fixed seed.
    found: statistics by metric.  Raises UserError if an image differs in size from the first, whichever process reads
    it, and if `found` has other features.
    """
    metrics, chosen = tuple(config.evaluation.metrics), None
    if len(source) > KEPT and flags.FLAGS.make_reference:
        chosen = np.random.RandomState(SEED).choice(len(source), KEPT, replace=False)
    extract = image_metrics.extractor(metrics, config.evaluation, framework, found)
    collector, shape = accumulate.Collector(metrics, (), chosen), (*size_of(source, size), 3)
    for indices, images in read_batches(source, size, group):
        for i, image in zip(indices, images, strict=True):
            if image.shape != shape:
                raise UserError(
                    f"the images {source.name(0)} {shape} and {source.name(i)} {image.shape} (h w c) differ in "
                    "size: give --image_size to crop all to one size"
                )
        collector.add(extract(np.stack(images)), np.array(indices))
    parts = group.gather(collector.to_bytes())
    return None if group.process else accumulate.Collector.merge(parts, metrics)


def read_batches(source: Images, size: int | None, group: ProcessGroup) -> Iterator[tuple[range, list[np.ndarray]]]:
    """Yield indices and images of this process's batches, read by threads."""
    starts = range(0, len(source), BATCH)[group.process :: group.num_processes]
    with futures.ThreadPoolExecutor() as pool:
        for begin in tqdm(starts, "images", unit="batch", disable=True if group.process else None):
            indices = range(begin, min(begin + BATCH, len(source)))
            yield indices, list(pool.map(lambda i: read(source, i, size), indices))


def read(source: Images, i: int, size: int | None) -> np.ndarray:
    """Return image i, uint8 [h w 3], cropped to a size unless that is None."""
    image = source.read(i)
    return image if size is None else pictures.centre_crop(image, size)
