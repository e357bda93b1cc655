"""Training inputs in addition to images and labels: declared in `methods`, provided by the loader."""

from typing import NamedTuple

import numpy as np

from meanflow.config.sections import Config
from meanflow.errors import UserError


class Feature(NamedTuple):
    """A feature required in every dataset record, in addition to `image` and `label`."""

    key: str
    shape: tuple[int | None, ...]  # None: any size, but the same in all records
    kind: type[np.generic]  # NumPy type, or family of types, of its values
    remedy: str  # for messages: what to do if it is missing
    unaugmented: str = ""  # a further way out if images are augmented, since features are not


class Tokens(NamedTuple):
    """Features computed from the images by config.data.encoder: grid^2 tokens of this width."""

    grid: int
    width: int


class Needs(NamedTuple):
    """What a method needs from the dataset and from config.data.encoder."""

    feature: Feature | None = None
    tokens: Tokens | None = None


def couplings(config: Config) -> Needs:
    """Return the needs of a method trained on pairs of noise and the image a flow model generated from it."""
    remedy = (
        f"config.method.name={config.method.name} learns from couplings: make them with `python -m jax_impl.reflow` or "
        "`torchrun torch_impl/reflow.py`, and set --config.data.name to their directory"
    )
    c = config.model
    return Needs(Feature("noise", (c.input_size, c.input_size, c.channels), np.floating, remedy))


def repa(config: Config) -> Needs:
    """Return the needs of representation alignment, if config.model.repa_dims enables it.

    The encoder reads the images or, if they are neither grey nor RGB, the `pixels` stored with them.  Without
    config.data.encoder, the dataset must store the `features` of all encoders.
    Raises UserError if config.data.encoder cannot provide the features.
    """
    c = config.model
    if "repa_dims" not in c or not c.repa_dims:
        return Needs()
    grid, width = c.input_size // c.patch_size, sum(c.repa_dims)
    if not config.data.encoder:
        remedy = (
            "REPA learns from the features of the images in frozen encoders: store them with the images, one row per "
            "token (config.model.input_size / config.model.patch_size, squared), the encoders concatenated along the "
            "last axis, whose width is the sum of config.model.repa_dims; or name one encoder by --config.data.encoder"
        )
        way_out = ", or train on pixels with --config.data.encoder"
        return Needs(Feature("features", (grid**2, width), np.floating, remedy, way_out))
    if len(c.repa_dims) > 1:
        raise UserError(
            f"config.model.repa_dims is {c.repa_dims}, but config.data.encoder is only one encoder: give one width, or "
            "store the `features` of all encoders with the images and leave config.data.encoder empty"
        )
    if c.channels in (1, 3):
        return Needs(tokens=Tokens(grid, width))
    remedy = (
        f"config.data.encoder reads images of 1 or 3 channels, and these have {c.channels} (config.model.channels): "
        "store the images they are latents of with them, as `pixels`, uint8 [h w 3]; or store their `features`, and "
        "leave config.data.encoder empty"
    )
    way_out = ", or train on pixels with --config.data.encoder"
    return Needs(Feature("pixels", (None, None, 3), np.uint8, remedy, way_out), Tokens(grid, width))
