"""Feature extractors: functions from images to features, with known widths."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

Extract = Callable[[np.ndarray], Any]  # images uint8 [b h w c] -> {name: features [b d]}


class Extractor:
    """Extracts features {name: [b d]} from images uint8 [b h w c]."""

    def __init__(self, function: Extract, widths: Mapping[str, int]):
        """widths: d by name, known before the first image."""
        self.function, self.widths = function, widths

    def __call__(self, images: np.ndarray) -> dict[str, np.ndarray]:
        return self.function(images)
