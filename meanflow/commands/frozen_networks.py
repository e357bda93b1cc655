"""The frozen networks that commands use besides the model: the decoder of latents and Inception."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from absl import flags, logging

from meanflow.config import latents, options
from meanflow.data.latents import autoencoder
from meanflow.errors import UserError
from meanflow.metrics.extractor import Extract

Decode = Callable[[np.ndarray], np.ndarray]  # latents [b h w c] in data units -> images [b H W 3] in [-1, 1]


class FrozenNetworks(NamedTuple):
    """Constructors of a framework's frozen networks; the networks take and return numpy arrays."""

    make_decoder: Callable[[Any, latents.Convention], Decode]  # from the result of `autoencoder.read`
    make_inception: Callable[[str, str], Extract]  # from the path of its weights and the name of a convention


def try_decoder(config: options.Config, networks: FrozenNetworks) -> Decode | None:
    """Return `decoder(config, networks)`, or None with a warning where that fails: for image grids during training."""
    try:
        return decoder(config, networks)
    except UserError as error:
        logging.warning("samples are shown as latents, not decoded: %s", error)
        return None


def decoder(config: options.Config, networks: FrozenNetworks) -> Decode | None:
    """Return the decoder of a latent model's samples, from --vae or else config.latents.vae; None without one.

    Raises UserError for an autoencoder that cannot be read or has other latents than the model.
    """
    name, convention = _autoencoder(config)
    if not name or convention is None:
        return None
    files = autoencoder.read(name)
    channels = files.settings["latent_channels"]
    if channels != config.model.channels:
        raise UserError(
            f"the autoencoder {name} has latents of {channels} channels, the model has {config.model.channels}: "
            "name the one that made the data by --vae"
        )
    return networks.make_decoder(files, convention)


def image_side(config: options.Config) -> int:
    """Return the side in pixels of a model's samples once decoded.  Raises UserError as `decoder` does."""
    name, _ = _autoencoder(config)
    return config.model.input_size * (autoencoder.read_factor(name) if name else 1)


def _autoencoder(config: options.Config) -> tuple[str, latents.Convention | None]:
    """Return the name of the autoencoder, "" without one, and the convention of the model's latents."""
    flag = flags.FLAGS["vae"].value if "vae" in flags.FLAGS else None
    convention = latents.of(config)
    if convention is None and flag:
        raise UserError("--vae decodes latents, but this model makes images: config.latents.scale is ()")
    name = config.latents.vae if flag is None else flag
    return ("" if convention is None else name), convention
