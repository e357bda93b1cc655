"""Distances against closed forms, and the classifier on data with a known answer."""

import numpy as np
import pytest

from configs.errors import UserError
from evaluation import metrics


def gaussian_rows(mean, std, num=None):
    """Rows whose sample mean and unbiased covariance are exactly `mean` and diag(std^2)."""
    mean, std = np.asarray(mean, float), np.asarray(std, float)
    num = num or 4 * len(mean)
    noise = np.random.default_rng(0).standard_normal((num, len(mean)))
    basis, _ = np.linalg.qr(noise - noise.mean(axis=0))
    return mean + basis * np.sqrt(num - 1) * std


def test_diagonal_gaussians():
    """Commuting covariances: |mu_a - mu_b|^2 + sum (std_a - std_b)^2."""
    a = gaussian_rows([0.0, 1.0, -2.0], [1.0, 0.5, 3.0])
    b = gaussian_rows([1.0, 1.0, 2.0], [2.0, 0.5, 0.1], num=50)
    expected = (1 + 0 + 16) + (1 + 0 + 2.9**2)
    assert metrics.frechet_distance(a, b) == pytest.approx(expected, rel=1e-12)


def test_covariances_that_do_not_commute():
    """Two features: tr (S_a S_b)^(1/2) = sqrt(tr(S_a S_b) + 2 sqrt(det S_a det S_b))."""
    rng = np.random.default_rng(1)
    a, b = rng.standard_normal((40, 2)) @ [[1, 2], [0, 1]], rng.standard_normal((30, 2)) @ [[1, 0], [-3, 1]]
    s_a, s_b = np.cov(a.T), np.cov(b.T)
    root = np.sqrt(np.trace(s_a @ s_b) + 2 * np.sqrt(np.linalg.det(s_a) * np.linalg.det(s_b)))
    shift = np.sum((a.mean(axis=0) - b.mean(axis=0)) ** 2)
    expected = shift + np.trace(s_a) + np.trace(s_b) - 2 * root
    assert metrics.frechet_distance(a, b) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("num", [5, 64, 300])
def test_equal_and_shifted_sets(num):
    """Also with fewer rows than the 64 features, where covariances have no full rank."""
    a = np.random.default_rng(2).standard_normal((num, 64))
    assert metrics.frechet_distance(a, a) == pytest.approx(0, abs=1e-10)
    assert metrics.frechet_distance(a, a + 0.5) == pytest.approx(64 * 0.25, rel=1e-10)


def test_symmetric_and_computed_in_float64():
    rng = np.random.default_rng(3)
    a, b = rng.standard_normal((20, 8)).astype(np.float32), rng.standard_normal((50, 8)).astype(np.float32)
    assert metrics.frechet_distance(a, b) == pytest.approx(metrics.frechet_distance(b, a), rel=1e-12)
    # In float32 the offset would swallow the spread of the rows.
    exact = metrics.frechet_distance(a.astype(np.float64), b)
    assert metrics.frechet_distance(a.astype(np.float64) + 1e6, b.astype(np.float64) + 1e6) == pytest.approx(exact)


@pytest.mark.parametrize(
    ("a", "b", "words"),
    [
        (np.zeros((1, 3)), np.zeros((5, 3)), "a must be at least two rows"),
        (np.zeros((5, 3)), np.zeros(5), "b must be at least two rows"),
        (np.zeros((5, 3)), np.zeros((5, 4)), "3 features a row, b has 4"),
        (np.zeros((5, 3)), np.full((5, 3), np.nan), "b has features that are not finite"),
    ],
)
def test_features_that_cannot_be_compared(a, b, words):
    with pytest.raises(ValueError, match=words):
        metrics.frechet_distance(a, b)


def test_class_accuracy():
    """Three well separated classes; a third of the images carries a wrong label."""
    rng = np.random.default_rng(4)
    labels = np.arange(30) % 3
    images = labels[:, None, None, None] + 0.01 * rng.standard_normal((30, 2, 2, 1))
    assert metrics.class_accuracy(images, labels, images, labels) == 1
    wrong = np.where(np.arange(30) < 10, (labels + 1) % 3, labels)
    assert metrics.class_accuracy(images, wrong, images, labels) == pytest.approx(2 / 3)


def test_one_class_cannot_be_classified():
    images, labels = np.zeros((4, 2, 2, 1)), np.zeros(4, int)
    with pytest.raises(UserError, match="--config.evaluation.classifier=False"):
        metrics.class_accuracy(images, labels, images, labels)
