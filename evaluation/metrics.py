"""Numbers that say how close generated images are to real ones."""

import numpy as np

from configs.errors import UserError


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Return |mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) of the Gaussians fitted to rows of features.

    a [n d], b [m d]: finite, n, m >= 2.  Covariances are unbiased; float64; never negative.
    Raises ValueError for other shapes or non-finite features.
    Source: arXiv:1706.08500, eq. 6.  With S_a = R_a^T R_a (R from a QR decomposition of the centred rows), the trace
    of the square root is the sum of the singular values of R_a R_b^T.  Departs from the official code, which takes a
    matrix square root: that one turns complex, or needs an offset, when there are fewer rows than features.
    """
    mean_a, root_a = _fit_gaussian("a", a)
    mean_b, root_b = _fit_gaussian("b", b)
    if len(mean_a) != len(mean_b):
        raise ValueError(f"a has {len(mean_a)} features a row, b has {len(mean_b)}")
    trace_of_root = np.linalg.svd(root_a @ root_b.T, compute_uv=False).sum()
    distance = np.sum((mean_a - mean_b) ** 2) + np.sum(root_a**2) + np.sum(root_b**2) - 2 * trace_of_root
    return max(float(distance), 0.0)


def class_accuracy(images: np.ndarray, labels: np.ndarray, real_images: np.ndarray, real_labels: np.ndarray) -> float:
    """Return the share, in [0, 1], of `images` that a classifier trained on the real ones gives their own label.

    images [n h w c], labels [n] ints; real_images [m h w c], real_labels [m].  The classifier is a support vector
    machine with an RBF kernel on pixels, as scikit-learn's digits example: its cost grows with m^2, so only small
    datasets suit it.  Deterministic.
    Raises UserError if the real labels are of one class only.
    """
    from sklearn import svm  # takes a second to import

    if len(np.unique(real_labels)) < 2:
        raise UserError("the real images are all of one class: set --config.evaluation.classifier=False")
    classifier = svm.SVC(kernel="rbf", gamma="scale")
    classifier.fit(real_images.reshape(len(real_images), -1), real_labels)
    return float(np.mean(classifier.predict(images.reshape(len(images), -1)) == labels))


def _fit_gaussian(name: str, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean [d] and R [min(n, d) d] with R^T R the unbiased covariance."""
    rows = np.asarray(rows, np.float64)
    if rows.ndim != 2 or len(rows) < 2:
        raise ValueError(f"{name} must be at least two rows of features, not of shape {rows.shape}")
    if not np.isfinite(rows).all():
        raise ValueError(f"{name} has features that are not finite")
    mean = rows.mean(axis=0)
    return mean, np.linalg.qr(rows - mean, mode="r") / np.sqrt(len(rows) - 1)
