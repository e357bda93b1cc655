"""Single examples: the records of a dataset, checked against the model and converted to data units."""

import copy
import dataclasses
import json
import pathlib
from typing import Any

import numpy as np
from absl import logging

from meanflow.config import latents, options
from meanflow.config.features import Feature
from meanflow.data import sources
from meanflow.data.latents.units import sample_posterior, to_data_units
from meanflow.errors import UserError

MAX_KEPT_BYTES = 2**28  # in each loader process, of decoded images
FLOATS = ("moments", "moments_flip", "features", "noise")
METADATA, CONVENTION = "metadata.json", "convention"  # file and key with the convention of a dataset of latents


@dataclasses.dataclass(frozen=True)
class Examples:
    """Records of a source, checked against config.model and converted to data units.

    `examples[i]` is {'image': float32 [h w c], 'label': int32 scalar}.  uint8 images become x/127.5 - 1, in [-1, 1];
    floating images are assumed to be in data units and only cast to float32.  Latents have `moments`, float32
    [h w 2c], in place of the image (see `posterior`), and optionally `moments_flip`, those of the mirrored image.
    `features`, float32 [n d], `noise`, float32 [h w c], and `pixels`, uint8 [h w 3], are included if the source has
    them.  A small dataset stays in memory once read: decoding an 8x8 image costs more than everything else in loading.
    Raises UserError for a record that does not fit the model.
    """

    source: sources.ImageSource
    title: str  # of the dataset, for messages
    shape: tuple[int, int, int]
    num_classes: int
    convention: latents.Convention | None = None  # of latents
    kept: dict[int, dict[str, np.ndarray]] = dataclasses.field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        example = self.kept.get(index)
        if example is None:
            example = self._read(index)
            if len(self) * sum(value.nbytes for value in example.values()) <= MAX_KEPT_BYTES:
                self.kept[index] = example
        return example

    def _read(self, index: int) -> dict[str, Any]:
        record: Any = self.source[index]
        label, where = record["label"], f"record {index} of {self.title}"
        self._check_shape(record, where)
        if not 0 <= label < self.num_classes:
            raise UserError(
                f"{where} has label {label}, outside [0, {self.num_classes}): set --config.model.num_classes, or "
                "choose a labelled split"
            )
        if "moments" in record and self.convention is None:
            raise UserError(
                f"{where} has moments of latents, but neither the dataset nor the config says what becomes of them: "
                "set --config.latents.shift and --config.latents.scale; meanflow/config/latents.py has the systems'"
            )
        example = dict(record) | {"label": np.int32(label)}
        if "image" in record:
            example["image"] = self._to_data_units(np.asarray(record["image"]), where)
        return example | {key: np.asarray(record[key], np.float32) for key in FLOATS if key in record}

    def _check_shape(self, record: dict[str, Any], where: str) -> None:
        height, width, channels = self.shape
        for key, shape in (("image", self.shape), ("moments", (height, width, 2 * channels))):
            given = np.shape(record[key]) if key in record else shape
            if given != shape:
                kind = "an image" if key == "image" else "moments (mean and deviation)"
                raise UserError(
                    f"{where} is {kind} of shape {given}, but the model expects {shape}: set --config.model.input_size "
                    "(height and width) and --config.model.channels, or choose another dataset"
                )

    def _to_data_units(self, image: np.ndarray, where: str) -> np.ndarray:
        if image.dtype == np.uint8 and self.convention:
            raise UserError(
                f"{where} is an image of pixels, but config.latents.scale says that the data are latents: set it to "
                "(), or choose a dataset of latents"
            )
        if image.dtype == np.uint8:
            return image.astype(np.float32) / np.float32(127.5) - np.float32(1)
        if np.issubdtype(image.dtype, np.floating):
            return image.astype(np.float32)
        raise UserError(f"{where} is an image of {image.dtype}: only uint8 and floating images can be read")


def open_examples(config: options.Config, split: str, extra: Feature | None = None) -> Examples:
    """Return a split of config.data.name.  Raises UserError as `open_source`, and for latents of another convention."""
    source = sources.open_source(config.data.name, split, config.data.dir, extra)
    title = f"{config.data.name} ({split})"
    return Examples(source, title, shape_of(config), config.model.num_classes, latents.of(with_latents(config)))


def shape_of(config: options.Config) -> tuple[int, int, int]:
    """Return the shape of an image, h w c."""
    return config.model.input_size, config.model.input_size, config.model.channels


def posterior(
    example: dict[str, np.ndarray], rng: np.random.Generator, convention: latents.Convention | None
) -> dict[str, np.ndarray]:
    """Return an example of latents with an `image` sampled from its `moments`, in data units; others unchanged.

    The image is (mean + deviation * unit normal - shift) * scale, float32 [h w c].
    """
    if "moments" not in example:
        return example
    moments, rest = example["moments"], {k: v for k, v in example.items() if not k.startswith("moments")}
    noise = rng.standard_normal((*moments.shape[:-1], moments.shape[-1] // 2), np.float32)
    assert convention is not None  # `Examples` refuses moments without one
    return rest | {"image": to_data_units(sample_posterior(moments, noise), convention)}


def with_latents(config: options.Config) -> options.Config:
    """Return a copy of the config with config.latents taken from the dataset, if that states them.

    Raises UserError naming both if the config states something else.
    """
    stored = stored_latents(config.data.name)
    if stored is None:
        return config
    convention, vae = stored
    ours = latents.of(config)
    if ours:
        latents.check_same(ours, convention, "the config (config.latents)", f"the dataset {config.data.name}")
    config = copy.deepcopy(config)
    config.latents.update(convention._asdict())
    if vae and vae != config.latents.vae:
        if config.latents.vae:
            logging.info(
                "samples are decoded by %s, which made the data, not by config.latents.vae %s: --vae of sample and "
                "evaluate names another", vae, config.latents.vae,
            )  # fmt: skip
        config.latents.vae = vae
    return config


def stored_latents(name: str) -> tuple[latents.Convention, str] | None:
    """Return the convention of a dataset of latents and the name of the autoencoder; None for any other dataset.

    Raises UserError if the metadata is damaged.
    """
    path = pathlib.Path(name, METADATA)
    if not path.is_file():
        return None
    try:
        metadata = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is damaged ({error}): copy the dataset again, or write it anew") from error
    if not isinstance(metadata, dict) or CONVENTION not in metadata:
        return None
    return latents.from_dict(metadata[CONVENTION]), str(metadata.get("vae", ""))
