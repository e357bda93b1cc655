"""EDM's augmentation of pixels: each transform applies with some probability, and its amounts are labels for the net.

Source: arXiv:2206.00364, appendix F.2; official repository NVlabs/edm, training/augment.py, as py-meanflow runs it.
It is NumPy code that runs where examples are loaded: both trainers learn from the same images, and the work is done
in the loader's processes while the accelerator computes.

Departs from the source: an image is padded by its own size, not by the margin that the largest transform in its batch
needs, so the result does not depend on the batch; and an image without geometric transforms is returned unchanged
instead of being resampled by the identity.  Over 300 random batches these changed at most 2e-5 of the images' norm.
"""

import functools
import math
from typing import NamedTuple

import numpy as np

from meanflow.config import options
from meanflow.errors import UserError

# Strengths: standard deviations of normal draws, maxima of uniform ones.
SCALE_STD = 0.2  # of log2 of the factor
ROTATE_FRAC_MAX = 1.0  # of the angle, in half turns
ANISO_STD = 0.2  # of log2 of the factor
ANISO_ROTATE_PROB = 0.5  # of stretching along a random axis instead of the horizontal one
TRANSLATE_FRAC_STD = 0.125  # of the shift, in widths and heights
TRANSLATE_INT_MAX = 0.125  # of the shift, in widths and heights
BRIGHTNESS_STD = 0.2  # of the shift, in data units
CONTRAST_STD = 0.5  # of log2 of the factor
HUE_MAX = 1.0  # of the angle, in half turns
SATURATION_STD = 1.0  # of log2 of the factor

# The number of labels of each transform, in the order of both transforms and labels.
NUM_LABELS = {
    "xflip": 1, "yflip": 1, "rotate_int": 2, "translate_int": 2, "scale": 1, "rotate_frac": 2, "aniso": 2,
    "translate_frac": 2, "brightness": 1, "contrast": 1, "lumaflip": 1, "hue": 2, "saturation": 1,
}  # fmt: skip
GEOMETRIC = ("scale", "rotate_frac", "aniso", "translate_frac")
COLOUR = ("brightness", "contrast", "lumaflip", "hue", "saturation")

# Low-pass filter of the least asymmetric orthogonal wavelet with six vanishing moments: I. Daubechies, Ten Lectures
# on Wavelets, table 6.3.
SYM6 = np.array([
    0.015404109327027373, 0.0034907120842174702, -0.11799011114819057, -0.048311742585633, 0.4910559419267466,
    0.787641141030194, 0.3379294217276218, -0.07263752278646252, -0.021060292512300564, 0.04472490177066578,
    0.0017677118642428036, -0.007800708325034148,
])  # fmt: skip
TAIL = len(SYM6) // 2 - 1  # half pixels that the filter extends beyond the first and the last pixel


class Draws(NamedTuple):
    """Raw random numbers for n images: uniforms in [0, 1), unit normals, integers.  Pairs are (x, y)."""

    apply: np.ndarray  # [13 n] uniforms: a transform, in the order of NUM_LABELS, applies below its probability
    xflip: np.ndarray  # [n] in {0, 1}
    yflip: np.ndarray  # [n] in {0, 1}
    rotate_int: np.ndarray  # [n] in {0, 1, 2, 3}, quarter turns
    translate_int: np.ndarray  # [2 n] uniforms
    scale: np.ndarray  # [n] normals
    rotate_frac: np.ndarray  # [n] uniforms
    aniso: np.ndarray  # [n] normals
    aniso_angle: np.ndarray  # [n] uniforms
    aniso_rotate: np.ndarray  # [n] uniforms: the angle counts below ANISO_ROTATE_PROB
    translate_frac: np.ndarray  # [2 n] normals
    brightness: np.ndarray  # [n] normals
    contrast: np.ndarray  # [n] normals
    lumaflip: np.ndarray  # [n] in {0, 1}
    hue: np.ndarray  # [n] uniforms
    saturation: np.ndarray  # [n] normals


def draw(rng: np.random.Generator, num_images: int) -> Draws:
    """Return the draws for `num_images` images, for all transforms: options do not shift the random stream."""
    n = num_images
    apply = rng.random((len(NUM_LABELS), n), np.float32)
    coins, turns = rng.integers(2, size=(3, n)), rng.integers(4, size=n)
    u, normals = rng.random((6, n), np.float32), rng.standard_normal((7, n), np.float32)
    return Draws(
        apply=apply, xflip=coins[0], yflip=coins[1], rotate_int=turns, translate_int=u[:2], scale=normals[0],
        rotate_frac=u[2], aniso=normals[1], aniso_angle=u[3], aniso_rotate=u[4], translate_frac=normals[2:4],
        brightness=normals[4], contrast=normals[5], lumaflip=coins[2], hue=u[5], saturation=normals[6],
    )  # fmt: skip


def num_labels(c: options.Config) -> int:
    """Return the number of labels of an image under c = config.data.augment; 0 without augmentation."""
    return sum(NUM_LABELS[name] for name, prob in _probs(c).items() if prob > 0)


def augment(images: np.ndarray, draws: Draws, c: options.Config) -> tuple[np.ndarray, np.ndarray]:
    """Augment images [n h w c] float32; c = config.data.augment.

    Returns the images, in the same shape, and labels [n k] float32, k = num_labels(c): the amount of each transform, 0
    where it did not apply.  The result for an image depends only on its own draws.
    Raises UserError: quarter turns of images that are not square, colour transforms without 1 or 3 channels.
    """
    probs = _probs(c)
    active = [name for name, prob in probs.items() if prob > 0]
    _check_shape(images.shape, active)
    amounts = _amounts(draws, probs, images.shape[1:3])
    result = np.empty(images.shape, np.float32)
    for i, image in enumerate(images):
        a = {name: amount[..., i] for name, amount in amounts.items()}
        result[i] = _recolour(_warp(_move(image, a), a), a)
    return result, _labels(amounts, active)


def _probs(c: options.Config) -> dict[str, float]:
    """Return {transform: its probability; above 1 is always}, in the order of NUM_LABELS."""
    multipliers = (
        c.xflip, c.yflip, c.rotate_int, c.translate_int, c.scale, c.rotate_frac, c.aniso, c.translate_frac,
        c.brightness, c.contrast, c.lumaflip, c.hue, c.saturation,
    )  # fmt: skip
    prob = c.prob
    return {name: prob * multiplier for name, multiplier in zip(NUM_LABELS, multipliers, strict=True)}


def _check_shape(shape: tuple[int, ...], active: list[str]) -> None:
    _, height, width, channels = shape
    if "rotate_int" in active and height != width:
        raise UserError(
            f"images of {height}x{width} cannot be turned by 90 degrees: set --config.data.augment.rotate_int=0"
        )
    colour = [name for name in COLOUR if name in active]
    if colour and channels not in (1, 3):
        raise UserError(
            f"images of {channels} channels have no colours, only those of 1 or 3: set "
            + " ".join(f"--config.data.augment.{name}=0" for name in colour)
        )


def _amounts(draws: Draws, probs: dict[str, float], size: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Return the amount of each transform for each image, {name: [n] or [2 n]}: 0 where it does not apply.

    Flips in {0, 1}; rotate_int in quarter turns; translate_int (x, y) relative to its maximum, in whole pixels of
    images of size (h, w); angles in radians; aniso (normal, angle); the others normals.
    """
    angle = np.where(draws.aniso_rotate < ANISO_ROTATE_PROB, math.pi * (2 * draws.aniso_angle - 1), 0)
    largest = TRANSLATE_INT_MAX * np.array(size[::-1])[:, None]
    drawn = draws._asdict() | {
        "translate_int": np.round((2 * draws.translate_int - 1) * largest) / largest,
        "rotate_frac": math.pi * ROTATE_FRAC_MAX * (2 * draws.rotate_frac - 1),
        "aniso": np.stack([draws.aniso, angle]),
        "hue": math.pi * HUE_MAX * (2 * draws.hue - 1),
    }
    return {name: drawn[name] * (u < prob) for (name, prob), u in zip(probs.items(), draws.apply, strict=True)}


def _labels(amounts: dict[str, np.ndarray], active: list[str]) -> np.ndarray:
    """Return the labels [n k] of the transforms that may apply.  Angles are encoded without a jump at half a turn."""
    turns, rotation, (aniso, angle), hue = (amounts[k] for k in ("rotate_int", "rotate_frac", "aniso", "hue"))
    rows = amounts | {
        "rotate_int": ((turns == 1) | (turns == 2), (turns == 2) | (turns == 3)),
        "rotate_frac": (np.cos(rotation) - 1, np.sin(rotation)),
        "aniso": (aniso * np.cos(angle), aniso * np.sin(angle)),
        "hue": (np.cos(hue) - 1, np.sin(hue)),
    }
    return np.vstack([np.empty((0, len(turns))), *(rows[name] for name in active)]).T.astype(np.float32)


def _move(image: np.ndarray, a: dict[str, np.ndarray]) -> np.ndarray:
    """Rearrange the pixels of [h w c]: flips, then quarter turns from x towards -y, then a shift right and up.

    The shift fills in pixels mirrored at the border.  Its y axis points up, that of all other transforms down.
    """
    image = image[:, ::-1] if a["xflip"] else image
    image = image[::-1] if a["yflip"] else image
    image = np.rot90(image, int(a["rotate_int"]))
    if not a["translate_int"].any():
        return image
    size = np.array(image.shape[1::-1])
    right, up = np.rint(a["translate_int"] * TRANSLATE_INT_MAX * size).astype(int)
    columns, rows = _reflected(np.arange(size[0]) - right, size[0]), _reflected(np.arange(size[1]) + up, size[1])
    return image[rows[:, None], columns]


def _reflected(index: np.ndarray, size: int) -> np.ndarray:
    """Map any integers to indices in [0, size) by mirroring at the first and the last pixel."""
    last = size - 1
    return last - np.abs(last - index % max(2 * last, 1))


def _warp(image: np.ndarray, a: dict[str, np.ndarray]) -> np.ndarray:
    """Scale, rotate, stretch along an axis and shift an image [h w c] about its centre."""
    if not any(a[name].any() for name in GEOMETRIC):
        return image
    aniso, angle = a["aniso"]
    axis = _rotation(angle)
    squeeze = axis.T @ np.diag([2 ** (-ANISO_STD * aniso), 2 ** (ANISO_STD * aniso)]) @ axis
    inverse = 2 ** (-SCALE_STD * a["scale"]) * _rotation(a["rotate_frac"]) @ squeeze
    return _resample(image, inverse, a["translate_frac"] * TRANSLATE_FRAC_STD * image.shape[1::-1])


def _rotation(angle: float | np.ndarray) -> np.ndarray:
    return np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])


def _resample(image: np.ndarray, inverse: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """Return an image [h w c] whose pixel at p is `image` at inverse (p - shift), both (x, y) from the centre.

    `image` is mirrored at its border pixels, to three times its size, and 0 beyond.  An orthogonal wavelet filter
    upsamples it to a grid twice as fine, which is read bilinearly, and the same filter downsamples the result.
    """
    height, width, channels = image.shape
    # Positions are in half pixels, relative to the centre here, and to the first pixel below.
    x = np.arange(-TAIL, 2 * width + TAIL) - (width - 1) - 2 * shift[0]
    y = np.arange(-TAIL, 2 * height + TAIL)[:, None] - (height - 1) - 2 * shift[1]
    column, dx, to_fine_x = _window(inverse[0, 0] * x + inverse[0, 1] * y + (width - 1), width)
    row, dy, to_fine_y = _window(inverse[1, 0] * x + inverse[1, 1] * y + (height - 1), height)
    fine = to_fine_y @ image.transpose(2, 0, 1) @ to_fine_x.T
    stride = fine.shape[2]
    fine, corner = fine.reshape(channels, -1), row * stride + column
    above, above_right, below, below_right = (fine.take(corner + step, axis=1) for step in (0, 1, stride, stride + 1))
    above += dx * (above_right - above)
    below += dx * (below_right - below)
    read = above + dy * (below - above)
    return (_synthesis(height).T @ read @ _synthesis(width)).transpose(1, 2, 0)


def _window(position: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Prepare to read an axis of `size` pixels at positions [h w] of the finer grid.

    Returns the rows that are read of the upsampling matrix, [m size], the indices [h w] into m below the positions,
    and the remainders [h w] in [0, 1).
    """
    matrix = _to_fine(size)
    position = np.clip(position + 2 * (size - 1) + 1, 0, len(matrix) - 2)
    index = position.astype(np.intp)
    first = index.min()
    return index - first, (position - index).astype(np.float32), matrix[first : index.max() + 2]


@functools.lru_cache
def _to_fine(size: int) -> np.ndarray:
    """Return the matrix [m size] from pixels to half pixels of the mirrored image, one zero before, two after."""
    mirrored = np.pad(np.eye(size, dtype=np.float32), ((size - 1, size - 1), (0, 0)), mode="reflect")
    return np.pad(_synthesis(len(mirrored))[TAIL:-TAIL] @ mirrored, ((1, 2), (0, 0)))


@functools.lru_cache
def _synthesis(size: int) -> np.ndarray:
    """Return the matrix [2 size + 2 TAIL, size] from pixels to half pixels; its columns are orthonormal."""
    matrix = np.zeros((2 * size + 2 * TAIL, size), np.float32)
    for i in range(size):
        matrix[2 * i : 2 * i + len(SYM6), i] = SYM6
    return matrix


def _recolour(image: np.ndarray, a: dict[str, np.ndarray]) -> np.ndarray:
    """Change the colours of an image [h w c]: all transforms act along the grey axis or orthogonally to it.

    Along it: brightness adds, contrast scales, lumaflip mirrors.  Orthogonally: contrast and saturation scale, hue
    rotates.  A single channel is grey.
    """
    if not any(a[name] for name in COLOUR):
        return image
    contrast = 2 ** (CONTRAST_STD * a["contrast"])
    grey_gain = contrast * (1 - 2 * a["lumaflip"])
    offset = grey_gain * BRIGHTNESS_STD * a["brightness"]
    if image.shape[2] == 1:
        return grey_gain * image + offset
    grey = np.full((3, 3), 1 / 3)
    around = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)  # by a right angle: a cross product
    turned = math.cos(a["hue"]) * (np.eye(3) - grey) + math.sin(a["hue"]) * around
    matrix = grey_gain * grey + contrast * 2 ** (SATURATION_STD * a["saturation"]) * turned
    return image @ matrix.T + offset
