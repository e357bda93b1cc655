"""The embedded dataset: its two splits are scikit-learn's digits, each image once."""

import numpy as np
import pytest
from sklearn.datasets import load_digits

from meanflow.data import sources


@pytest.fixture(scope="module")
def splits(datasets_dir):
    opened = {name: sources.open_source("digits", name, datasets_dir) for name in ("train", "test")}
    return {name: [source[i] for i in range(len(source))] for name, source in opened.items()}


def test_sizes(splits):
    assert len(splits["train"]) == 1397
    assert len(splits["test"]) == 400


def test_features(splits):
    for record in splits["train"] + splits["test"]:
        assert record["image"].shape == (8, 8, 1)
        assert record["image"].dtype == np.uint8
        assert 0 <= record["label"] < 10
    assert max(record["image"].max() for record in splits["train"]) == 255


def test_splits_are_the_fixed_permutation_of_the_whole(splits):
    """Disjoint and complete, with each label at its image."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.RandomState(0).permutation(1797)
    for name, rows in (("train", order[:1397]), ("test", order[1397:])):
        expected = {(np.rint(images[row] * 255 / 16).astype(np.uint8).tobytes(), labels[row]) for row in rows}
        found = {(record["image"].tobytes(), record["label"]) for record in splits[name]}
        assert len(found) == len(splits[name])  # no two digits are equal, so that a set loses none
        assert found == expected
