"""The handwritten digits that come with scikit-learn: a real dataset that needs no download."""

from collections.abc import Iterator
from typing import ClassVar

import numpy as np
import tensorflow_datasets as tfds

NUM_TRAIN = 1397
MAX_INK = 16  # values are the number of inked pixels in each 4x4 cell


class Digits(tfds.core.GeneratorBasedBuilder):
    """1797 grey 8x8 images of the digits 0 to 9: 1397 to train on, 400 to test.

    Features: image uint8 [8 8 1] in [0, 255]; label int in [0, 10).
    Source: sklearn.datasets.load_digits, which is the test part of
    https://archive.ics.uci.edu/dataset/80/optical+recognition+of+handwritten+digits.
    Departs from the source: values 0..16 are scaled to 0..255 and rounded; the split is ours, and fixed.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar = {"1.0.0": "First version."}

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "image": tfds.features.Image(shape=(8, 8, 1), dtype=np.uint8, encoding_format="png"),
            "label": tfds.features.ClassLabel(num_classes=10),
        }
        return self.dataset_info_from_configs(
            description="Handwritten digits of scikit-learn, 8x8 pixels.",
            features=tfds.features.FeaturesDict(features),
            supervised_keys=("image", "label"),
            homepage="https://archive.ics.uci.edu/dataset/80/optical+recognition+of+handwritten+digits",
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        from sklearn import datasets  # slow to import, and only needed to prepare the dataset

        images, labels = datasets.load_digits(return_X_y=True)
        images = np.rint(images * (255 / MAX_INK)).astype(np.uint8).reshape(-1, 8, 8, 1)
        # RandomState instead of a Generator: its stream is frozen, so the split is the same in every NumPy version.
        order = np.random.RandomState(0).permutation(len(images))
        return {
            "train": self._generate_examples(images, labels, order[:NUM_TRAIN]),
            "test": self._generate_examples(images, labels, order[NUM_TRAIN:]),
        }

    def _generate_examples(self, images: np.ndarray, labels: np.ndarray, rows: np.ndarray) -> Iterator:
        for row in rows:
            yield int(row), {"image": images[row], "label": int(labels[row])}
