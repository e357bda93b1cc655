"""Moments of an autoencoder's posterior, raw latents as it decodes them, and latents in data units."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from meanflow.config import latents as conventions
from meanflow.errors import UserError

RAW = conventions.Convention((0.0,), (1.0,))  # data units that are raw latents


def check_moments(moments: np.ndarray, name: str, way_out: str) -> None:
    """Raise UserError, with the name and the fix, for moments not finite or a standard deviation below 0."""
    if not np.isfinite(moments).all():
        raise UserError(f"the moments of {name} are not finite: {way_out}")
    if moments[..., moments.shape[-1] // 2 :].min() < 0:
        raise UserError(f"the moments of {name} have a standard deviation below 0: {way_out}")


def sample_posterior(moments: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """Return raw latents [... c], mean + std * noise, from moments [... 2c] and unit normal noise [... c]."""
    mean, std = np.split(moments, 2, axis=-1)
    return mean + std * noise


def to_data_units(raw: np.ndarray, convention: conventions.Convention) -> np.ndarray:
    """Return raw latents [... c] in data units, (raw - shift) * scale, in their dtype.

    Raises UserError for a convention with another number of channels.
    """
    shift, scale = _numbers(raw, convention)
    return (raw - shift) * scale


def to_raw(z: np.ndarray, convention: conventions.Convention) -> np.ndarray:
    """Return latents [... c] in data units as the autoencoder decodes them.  Inverse of `to_data_units`."""
    shift, scale = _numbers(z, convention)
    return z / scale + shift


def _numbers(latents: np.ndarray, convention: conventions.Convention) -> tuple[np.ndarray, np.ndarray]:
    conventions.check(convention, latents.shape[-1])
    return np.asarray(convention.shift, latents.dtype), np.asarray(convention.scale, latents.dtype)


def normalising(statistics: Mapping[str, Any], std: float = 1.0) -> conventions.Convention:
    """Return the convention that gives the data mean 0 and this standard deviation in each channel.

    statistics: metadata of a dataset of latents.  Raises UserError for a constant channel.
    """
    if not all(number > 0 and math.isfinite(number) for number in statistics["std"]):
        raise UserError(f"latents of standard deviation {statistics['std']} cannot be normalised: name a convention")
    pixels = conventions.from_dict(statistics["convention"]).pixels
    scale = tuple(std / number for number in statistics["std"])
    return conventions.Convention(tuple(statistics["mean"]), scale, pixels)
