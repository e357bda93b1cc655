"""Distances against closed forms, and the classifier on data with a known answer."""

import numpy as np
import pytest

from meanflow.errors import UserError
from meanflow.metrics import scores


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
    assert scores.frechet_distance(a, b) == pytest.approx(expected, rel=1e-12)


def test_covariances_that_do_not_commute():
    """Two features: tr (S_a S_b)^(1/2) = sqrt(tr(S_a S_b) + 2 sqrt(det S_a det S_b))."""
    rng = np.random.default_rng(1)
    a, b = rng.standard_normal((40, 2)) @ [[1, 2], [0, 1]], rng.standard_normal((30, 2)) @ [[1, 0], [-3, 1]]
    s_a, s_b = np.cov(a.T), np.cov(b.T)
    root = np.sqrt(np.trace(s_a @ s_b) + 2 * np.sqrt(np.linalg.det(s_a) * np.linalg.det(s_b)))
    shift = np.sum((a.mean(axis=0) - b.mean(axis=0)) ** 2)
    expected = shift + np.trace(s_a) + np.trace(s_b) - 2 * root
    assert scores.frechet_distance(a, b) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("num", [5, 64, 300])
def test_equal_and_shifted_sets(num):
    """Also with fewer rows than the 64 features, where covariances have no full rank."""
    a = np.random.default_rng(2).standard_normal((num, 64))
    assert scores.frechet_distance(a, a) == pytest.approx(0, abs=1e-10)
    assert scores.frechet_distance(a, a + 0.5) == pytest.approx(64 * 0.25, rel=1e-10)


def test_symmetric_and_computed_in_float64():
    rng = np.random.default_rng(3)
    a, b = rng.standard_normal((20, 8)).astype(np.float32), rng.standard_normal((50, 8)).astype(np.float32)
    assert scores.frechet_distance(a, b) == pytest.approx(scores.frechet_distance(b, a), rel=1e-12)
    # In float32 the offset would swallow the spread of the rows.
    exact = scores.frechet_distance(a.astype(np.float64), b)
    assert scores.frechet_distance(a.astype(np.float64) + 1e6, b.astype(np.float64) + 1e6) == pytest.approx(exact)


@pytest.mark.parametrize(
    ("a", "b", "words"),
    [
        (np.zeros((1, 3)), np.zeros((5, 3)), "a must be at least two rows"),
        (np.zeros((5, 3)), np.zeros(5), "b must be at least two rows"),
        (np.zeros((5, 3)), np.zeros((5, 4)), "3 features per row, b has 4"),
        (np.zeros((5, 3)), np.full((5, 3), np.nan), "b has features that are not finite"),
    ],
)
def test_features_that_cannot_be_compared(a, b, words):
    with pytest.raises(ValueError, match=words):
        scores.frechet_distance(a, b)


def test_class_accuracy():
    """Three well separated classes; a third of the images carries a wrong label."""
    rng = np.random.default_rng(4)
    labels = np.arange(30) % 3
    images = labels[:, None, None, None] + 0.01 * rng.standard_normal((30, 2, 2, 1))
    assert scores.class_accuracy(images, labels, images, labels) == 1
    wrong = np.where(np.arange(30) < 10, (labels + 1) % 3, labels)
    assert scores.class_accuracy(images, wrong, images, labels) == pytest.approx(2 / 3)


def test_one_class_cannot_be_classified():
    images, labels = np.zeros((4, 2, 2, 1)), np.zeros(4, int)
    with pytest.raises(UserError, match="--config.evaluation.classifier=False"):
        scores.class_accuracy(images, labels, images, labels)


def moments_of(rows):
    return rows.mean(axis=0), np.cov(rows, rowvar=False)


@pytest.mark.parametrize(("num_a", "num_b"), [(200, 90), (5, 90), (5, 3), (2, 200)])
def test_distance_of_moments_is_that_of_rows(num_a, num_b):
    """Also without full rank and on scales of their own, where square roots of rounding would be 1e-8."""
    rng = np.random.default_rng(5)
    a, b = rng.standard_normal((num_a, 32)) * np.geomspace(1, 1e-3, 32), rng.standard_normal((num_b, 32)) + 0.3
    expected = scores.frechet_distance(a, b)
    assert scores.frechet_distance_of(*moments_of(a), *moments_of(b)) == pytest.approx(expected, rel=1e-12)
    assert scores.frechet_distance_of(*moments_of(a), *moments_of(a)) == pytest.approx(0, abs=1e-11)


def test_distance_of_a_point():
    """Without any spread only the means and the other's variances count."""
    zero, other = np.zeros((3, 3)), np.diag([1.0, 2.0, 3.0])
    assert scores.frechet_distance_of(np.ones(3), zero, np.zeros(3), other) == pytest.approx(9, rel=1e-12)
    assert scores.frechet_distance_of(np.ones(3), zero, np.zeros(3), zero) == 3


@pytest.mark.parametrize(
    ("mean", "covariance", "words"),
    [
        (np.zeros(3), np.eye(2), r"covariance_a has shape \(2, 2\), mean_a \(3,\)"),
        (np.zeros(2), np.eye(2), "mean_a has 2 features, mean_b has 3"),
        (np.full(3, np.nan), np.eye(3), "mean_a has values that are not finite"),
        (np.zeros(3), np.diag([1, np.inf, 1]), "covariance_a has values that are not finite"),
        (np.zeros(3), np.diag([1.0, 1.0, -0.1]), "covariance_a is not a covariance"),
    ],
)
def test_moments_that_cannot_be_compared(mean, covariance, words):
    with pytest.raises(ValueError, match=words):
        scores.frechet_distance_of(mean, covariance, np.zeros(3), np.eye(3))


@pytest.mark.parametrize("convention", scores.IS_CONVENTIONS)
def test_inception_score_of_known_answers(convention):
    """The same logits everywhere: 1.  Certain of one of k classes, all equally often: k."""
    assert scores.inception_score(np.ones((20, 5)), 2, convention) == pytest.approx((1, 0), abs=1e-5)
    certain = 100 * np.eye(4)[np.arange(40) % 4]
    assert scores.inception_score(certain, 10, convention, shuffle=False) == pytest.approx((4, 0), rel=1e-5)
    halves = certain[np.argsort(np.arange(40) % 4)]
    assert scores.inception_score(halves, 2, convention, shuffle=False) == pytest.approx((2, 0), rel=1e-5)
    assert scores.inception_score(halves, 1, convention)[0] == pytest.approx(4, rel=1e-5)


def test_inception_score_of_probabilities_that_vanish():
    """A class that no row can have adds nothing."""
    logits = np.concatenate([np.zeros((10, 3)), np.full((10, 1), -2000.0)], axis=1)
    assert scores.inception_score(logits, 2) == (1, 0)


def test_splits_of_the_inception_score():
    """23 rows in 5 splits: all rows, unevenly, or 4 rows each and 3 dropped."""
    logits = np.zeros((23, 2))
    logits[-3:, 0] = 50
    assert scores.inception_score(logits, 5, "official_jax", shuffle=False) == pytest.approx((1, 0), abs=1e-6)
    mean, std = scores.inception_score(logits, 5, shuffle=False)
    assert mean > 1.01 and std > 0.01
    assert scores.inception_score(logits, 5, "official_jax")[0] > 1.01  # the order is another


@pytest.mark.parametrize(
    ("logits", "options", "words"),
    [
        (np.zeros((20, 3)), {"convention": "tf"}, "'tf' is not a convention .* torch_fidelity or official_jax"),
        (np.zeros((9, 3)), {}, "10 splits needs as many rows"),
        (np.zeros(30), {}, "10 splits needs as many rows"),
        (np.full((20, 3), np.nan), {}, "not finite"),
    ],
)
def test_no_inception_score(logits, options, words):
    with pytest.raises(UserError, match=words):
        scores.inception_score(logits, **options)


def test_kernel_distance_of_two_pairs():
    """By hand: x = 1, -1 and y = 2, 0 of one feature; the kernel is (xy + 1)^3."""
    x, y = np.array([[1.0], [-1.0]]), np.array([[2.0], [0.0]])
    expected = 2 * 0 / 2 + 2 * 1 / 2 - 2 * (27 + 1 - 1 + 1) / 4
    assert scores.kernel_distance(x, y, 3, 2) == pytest.approx((expected, 0))


def test_kernel_distance_is_unbiased():
    """Two sets of one distribution: 0 on average, so that half of the values are negative."""
    a, b = np.random.default_rng(6).standard_normal((2, 2000, 4))
    distances = [scores.kernel_distance(a[i : i + 20], b[i : i + 20], 1, 20)[0] for i in range(0, 2000, 20)]
    assert abs(np.mean(distances)) < 3 * np.std(distances) / 10
    assert min(distances) < 0 < max(distances)
    mean, std = scores.kernel_distance(a, b, 30, 200)
    assert abs(mean) < std


def test_subsets_of_the_kernel_distance():
    """The same for the same seed, another for another; float32 features are taken at their exact values."""
    a, b = np.random.default_rng(7).standard_normal((2, 40, 4)).astype(np.float32)
    first = scores.kernel_distance(a, b, 2, 10)
    assert scores.kernel_distance(a.astype(np.float64), b, 2, 10) == first
    assert scores.kernel_distance(a, b, 2, 10, seed=1) != first


@pytest.mark.parametrize(
    ("num_a", "num_b", "size", "words"),
    [
        (10, 20, 11, "subsets of 11 rows cannot be drawn from 10 and 20 rows"),
        (20, 10, 11, "subsets of 11 rows cannot be drawn from 20 and 10 rows"),
        (10, 10, 1, "a subset_size from 2"),
    ],
)
def test_subsets_that_cannot_be_drawn(num_a, num_b, size, words):
    with pytest.raises(UserError, match=words):
        scores.kernel_distance(np.zeros((num_a, 2)), np.zeros((num_b, 2)), 1, size)


def naive_precision_recall(generated, real, k):
    def share(points, others):
        within = np.linalg.norm(others[:, None] - others, axis=2)
        radii = np.sort(within, axis=1)[:, k]
        return (np.linalg.norm(points[:, None] - others, axis=2) <= radii).any(axis=1).mean()

    return share(generated, real), share(real, generated)


@pytest.mark.parametrize("batch_size", [1, 7, 100])
def test_precision_recall_in_blocks(batch_size):
    rng = np.random.default_rng(8)
    generated, real = 0.7 * rng.standard_normal((30, 3)), rng.standard_normal((50, 3))
    for k in (1, 3):
        precision, recall = naive_precision_recall(generated, real, k)
        assert precision != recall
        got = scores.precision_recall(generated, real, k, batch_size)
        assert got == pytest.approx((precision, recall, 2 * precision * recall / (precision + recall)), rel=1e-12)


def test_precision_recall_of_known_answers():
    """A line of points and half of it: all of the half is real, and reaches one point beyond itself."""
    real, half = np.arange(10.0)[:, None], np.arange(5.0)[:, None]
    assert scores.precision_recall(half, real, 1) == pytest.approx((1, 0.6, 0.75))
    assert scores.precision_recall(real, half, 1) == pytest.approx((0.6, 1, 0.75))
    assert scores.precision_recall(real + 100, real) == (0, 0, 0)


def test_too_few_rows_for_precision_recall():
    with pytest.raises(UserError, match="more than k = 3 >= 1 rows of each set, not 9 and 3"):
        scores.precision_recall(np.zeros((9, 2)), np.zeros((3, 2)))


@pytest.mark.parametrize("measure", [scores.kernel_distance, scores.precision_recall])
@pytest.mark.parametrize(
    ("a", "b", "words"),
    [
        (np.zeros((9, 2)), np.zeros((9, 3)), "of one set have 2 features, of the other 3"),
        (np.full((9, 2), np.inf), np.zeros((9, 2)), "features that are not finite"),
        (np.zeros((9, 2)), np.zeros(9), "must be rows of features"),
        (np.zeros((9, 2)), np.zeros((0, 2)), "must be rows of features"),
    ],
)
def test_features_that_are_none(measure, a, b, words):
    with pytest.raises(UserError, match=words):
        measure(a, b)
