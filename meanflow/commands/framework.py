"""What a framework hands to the commands that sample and judge, and where their processes stand."""

import io
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from absl import flags, logging

from meanflow.config import latents, options
from meanflow.data.latents import autoencoder
from meanflow.errors import UserError

Decode = Callable[[np.ndarray], np.ndarray]  # latents [b h w c] in data units -> images [b H W 3] in [-1, 1]
Extract = Callable[[np.ndarray], Any]  # images uint8 [b h w c] -> {name: features [b d]}


class Extractor:
    """Makes features of images uint8 [b h w c]: {name: [b d]}."""

    def __init__(self, function: Extract, widths: Mapping[str, int]):
        """widths: d by name, known before any image is seen."""
        self.function, self.widths = function, widths

    def __call__(self, images: np.ndarray) -> dict[str, np.ndarray]:
        return self.function(images)


class Tools(NamedTuple):
    """What a framework computes beside samples; numpy in and out."""

    make_decoder: Callable[[Any, latents.Convention], Decode]  # of what `autoencoder.read` returns
    make_inception: Callable[[str, str], Extract]  # of the path of its weights and a convention's name


class Place(NamedTuple):
    """One process among those of a command."""

    process: int = 0
    num_processes: int = 1
    gather: Callable[[bytes], list[bytes]] = lambda part: [part]  # of each process's bytes those of all, to the first
    together: bool = False  # the processes make every batch together, and each has all its rows; else batches in turn


ALONE = Place()


def try_decoder(config: options.Config, tools: Tools) -> Decode | None:
    """Return what `decoder` does, or None, with a warning, where that would be an error: for pictures on the way."""
    try:
        return decoder(config, tools)
    except UserError as error:
        logging.warning("samples are shown as latents, not decoded: %s", error)
        return None


def decoder(config: options.Config, tools: Tools) -> Decode | None:
    """Return what decodes the samples of a model of latents, by --vae or else config.latents.vae; None: nothing does.

    Raises UserError for an autoencoder that cannot be read, or one of other latents than the model's.
    """
    name, convention = _autoencoder(config)
    if not name or convention is None:
        return None
    files = autoencoder.read(name)
    channels = files.settings["latent_channels"]
    if channels != config.model.channels:
        raise UserError(
            f"the autoencoder {name} has latents of {channels} channels, the model of {config.model.channels}: name "
            "the one that made the data, by --vae"
        )
    return tools.make_decoder(files, convention)


def image_side(config: options.Config) -> int:
    """Return the side, in pixels, of the samples of a model, decoded by what `decoder` takes.  Raises as that."""
    name, _ = _autoencoder(config)
    return config.model.input_size * (autoencoder.read_factor(name) if name else 1)


def _autoencoder(config: options.Config) -> tuple[str, latents.Convention | None]:
    """Return the name of the autoencoder, "" if nothing decodes, and the convention of the model's latents."""
    flag = flags.FLAGS["vae"].value if "vae" in flags.FLAGS else None
    convention = latents.of(config)
    if convention is None and flag:
        raise UserError("--vae decodes latents, and this model is of none: config.latents.scale is ()")
    name = config.latents.vae if flag is None else flag
    return ("" if convention is None else name), convention


def gather_rows(parts: list[dict[str, np.ndarray]], place: Place) -> dict[str, np.ndarray]:
    """Return the rows {name: [n ...]} of all processes, in the order of their `indices`; nothing but in the first one.

    Every process calls it.  parts: the batches of this process, with the same names; there may be none.
    """
    own = {key: np.concatenate([part[key] for part in parts]) for key in (parts[0] if parts else ())}
    if place.num_processes > 1:
        every = [part for part in map(unpack, place.gather(pack(own))) if part]
        own = {key: np.concatenate([part[key] for part in every]) for key in (every[0] if every else ())}
    if not own:
        return {}
    order = np.argsort(own["indices"], kind="stable")
    return {key: rows[order] for key, rows in own.items()}


def pack(arrays: dict[str, np.ndarray]) -> bytes:
    """Return arrays as the bytes of an .npz."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # pyright: ignore  # it takes any name
    return buffer.getvalue()


def unpack(content: bytes) -> dict[str, np.ndarray]:
    """Return the arrays of such bytes."""
    with np.load(io.BytesIO(content), allow_pickle=False) as file:
        return {key: file[key] for key in file.files}
