"""Arranges images in a grid for viewing."""

import io
import math
import os

import numpy as np

from meanflow import files
from meanflow.errors import UserError

MIN_SIDE = 32  # pixels: smaller images are magnified to at least this


# How images in [-1, 1] become integers: public codebases differ.
ROUNDINGS = {
    "round": lambda x: np.rint(255 * (x + 1) / 2),  # inverse of the loader's; improved MeanFlow in PyTorch
    "shift": lambda x: 127.5 * x + 128,  # then truncated: the official JAX code, EDM2
    "floor": lambda x: 255 * (x + 1) / 2,  # then truncated: py-meanflow, decoupled MeanFlow, Re-MeanFlow's latents
}


def to_uint8(images: np.ndarray, rounding: str = "round") -> np.ndarray:
    """Return images in [-1, 1], of any shape, as uint8 in [0, 255]; values outside are clipped.

    rounding: one of `ROUNDINGS`, applied in the images' precision.  Raises UserError for values that are not finite.
    """
    if not np.isfinite(images).all():
        raise UserError("some images have values that are not finite: the model has diverged")
    return np.clip(ROUNDINGS[rounding](np.asarray(images)), 0, 255).astype(np.uint8)


def grid(images: np.ndarray, columns: int | None = None, padding: int = 1, scale: int | None = None) -> np.ndarray:
    """Return images [n h w c] in [-1, 1] as one picture, uint8 [H W 3] or [H W 1], filled row by row.

    columns: if None, as square as possible.  padding: black pixels around each image.
    scale: each pixel becomes scale x scale; if None, such that a side has at least `MIN_SIDE` pixels.
    With four or more channels (latents) the first three are shown as RGB, with two the first.
    Raises UserError for values that are not finite.
    """
    num, height, width, channels = images.shape
    columns = columns or math.ceil(math.sqrt(num))
    rows = math.ceil(num / columns)
    scale = scale or math.ceil(MIN_SIDE / min(height, width))
    shown = to_uint8(images[..., : 3 if channels >= 3 else 1])
    shown = shown.repeat(scale, axis=1).repeat(scale, axis=2)
    shown = np.pad(shown, ((0, rows * columns - num), (0, padding), (0, padding), (0, 0)))
    _, cell_height, cell_width, depth = shown.shape
    picture = shown.reshape(rows, columns, cell_height, cell_width, depth).swapaxes(1, 2)
    picture = picture.reshape(rows * cell_height, columns * cell_width, depth)
    return np.pad(picture, ((padding, 0), (padding, 0), (0, 0)))


def save_png(path: str | os.PathLike, images: np.ndarray, columns: int | None = None) -> None:
    """Write a grid of images [n h w c] in [-1, 1] to `path`, atomically; creates parent directories.

    Raises UserError if the path cannot be written, or for values that are not finite.
    """
    import PIL.Image  # slow: imported only here, because the trainers import this module

    picture = grid(images, columns)
    picture = picture[..., 0] if picture.shape[-1] == 1 else picture
    buffer = io.BytesIO()
    PIL.Image.fromarray(picture).save(buffer, format="PNG")
    files.replace_bytes(path, buffer.getvalue())
