"""What the public evaluation pipelines do to images before Inception sees them: no two of them agree.

Source: torch-fidelity (feature_extractor_inceptionv3.py, metric_isc.py), Lyy-iiis/imeanflow and Gsunshine/meanflow
(utils/jax_fid/resize.py and inception.py), pytorch-fid (inception.py) as Re-MeanFlow uses it.
"""

from typing import NamedTuple

import numpy as np

from meanflow.errors import UserError

SIDE = 299  # pixels of the images that Inception reads
WIDTHS = {"pool": 2048, "logits": 1008}  # of Inception's features


class Convention(NamedTuple):
    """One pipeline."""

    resize: str  # bilinear: tf1, whose pixels are points at i, or half_pixel, at i + 1/2
    half_range: float  # Inception reads x / half_range - 1, x in [0, 255]
    rounding: str  # of generated images in [-1, 1] to uint8, see `grids.to_uint8`
    score: str  # how the Inception score is computed, see `metrics.inception_score`


CONVENTIONS = {
    # torchmetrics too, and TensorFlow's own of 2015
    "torch_fidelity": Convention("tf1", 128.0, "round", "torch_fidelity"),
    # Official MeanFlow and improved MeanFlow in JAX
    "jax_meanflow": Convention("half_pixel", 128.0, "shift", "official_jax"),
    # Re-MeanFlow; it has no Inception score of its own
    "pytorch_fid": Convention("half_pixel", 127.5, "floor", "torch_fidelity"),
}


def get(name: str) -> Convention:
    """Return a convention by its name.  Raises UserError if there is none."""
    if name not in CONVENTIONS:
        raise UserError(f"there is no convention of evaluation {name!r}: choose {' | '.join(CONVENTIONS)}")
    return CONVENTIONS[name]


def check_images(images: np.ndarray) -> None:
    """Raise UserError unless images are uint8 [b h w c], grey or RGB."""
    if images.ndim != 4 or images.dtype != np.uint8 or images.shape[3] not in (1, 3):
        raise UserError(f"images of {images.dtype} {images.shape}: Inception takes uint8 [b h w 1] or [b h w 3]")


def resize_matrix(size: int, resize: str) -> np.ndarray:
    """Return the matrix [SIDE size] float64 that resizes an axis of `size` pixels bilinearly, with no low-pass filter.

    Each row has one or two entries, with a sum of 1; beyond the border the last pixel is repeated.
    """
    scale = size / SIDE
    places = np.arange(SIDE) * scale if resize == "tf1" else (np.arange(SIDE) + 0.5) * scale - 0.5
    places = places.clip(0, size - 1)
    below = np.minimum(places.astype(int), size - 1)
    above = np.minimum(below + 1, size - 1)
    matrix = np.zeros((SIDE, size))
    np.add.at(matrix, (np.arange(SIDE), below), 1 - (places - below))
    np.add.at(matrix, (np.arange(SIDE), above), places - below)
    return matrix
