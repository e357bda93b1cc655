"""How the public evaluation pipelines preprocess images for Inception: no two of them agree.

Source: torch-fidelity (feature_extractor_inceptionv3.py, metric_isc.py), Lyy-iiis/imeanflow and Gsunshine/meanflow
(utils/jax_fid/resize.py and inception.py), pytorch-fid (inception.py) as Re-MeanFlow uses it.
"""

from typing import NamedTuple

import numpy as np

from meanflow.errors import UserError

SIDE = 299  # pixels of Inception's input
WIDTHS = {"pool": 2048, "logits": 1008}  # Inception's features


class Convention(NamedTuple):
    """One pipeline."""

    resize: str  # bilinear with pixels at i (tf1) or at i + 1/2 (half_pixel)
    half_range: float  # Inception reads x / half_range - 1, x in [0, 255]
    rounding: str  # from generated images in [-1, 1] to uint8, see `grids.to_uint8`
    score: str  # convention of the Inception score, see `scores.inception_score`


CONVENTIONS = {
    # Also torchmetrics, and TensorFlow's original of 2015
    "torch_fidelity": Convention("tf1", 128.0, "round", "torch_fidelity"),
    # Official MeanFlow and improved MeanFlow in JAX
    "jax_meanflow": Convention("half_pixel", 128.0, "shift", "official_jax"),
    # Re-MeanFlow, which has no Inception score of its own
    "pytorch_fid": Convention("half_pixel", 127.5, "floor", "torch_fidelity"),
}


def get(name: str) -> Convention:
    """Return a convention by name.  Raises UserError if there is none."""
    if name not in CONVENTIONS:
        raise UserError(f"there is no evaluation convention {name!r}: choose {' | '.join(CONVENTIONS)}")
    return CONVENTIONS[name]


def check_images(images: np.ndarray) -> None:
    """Raise UserError unless images are uint8 [b h w c], grey or RGB."""
    if images.ndim != 4 or images.dtype != np.uint8 or images.shape[3] not in (1, 3):
        raise UserError(f"images of {images.dtype} {images.shape}: Inception takes uint8 [b h w 1] or [b h w 3]")


def resize_matrix(size: int, resize: str) -> np.ndarray:
    """Return the matrix [SIDE size] float64 that resizes an axis of `size` pixels bilinearly, without antialiasing.

    Each row has one or two entries that sum to 1; the border pixel is repeated.
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
