"""Functions from images to features, with the widths of the features."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

Extract = Callable[[np.ndarray], Any]  # images uint8 [b h w c] -> {name: features [b d]}


class Extractor:
    """Makes features of images uint8 [b h w c]: {name: [b d]}."""

    def __init__(self, function: Extract, widths: Mapping[str, int]):
        """widths: d by name, known before any image is seen."""
        self.function, self.widths = function, widths

    def __call__(self, images: np.ndarray) -> dict[str, np.ndarray]:
        return self.function(images)
