"""Metrics of how close generated images are to real ones.

All but the classifier take features of any network, and are those of the official evaluations: Fréchet distance (FID
with Inception features), Inception score, kernel distance (KID), precision and recall.
"""

import numpy as np

from meanflow.errors import UserError

SEED = 2020  # official seed of the row order (Inception score) and the subsets (kernel distance)
NOT_A_COVARIANCE = 1e-3  # relative to the largest eigenvalue; float32 statistics stay far below
LOG_OFFSET = 1e-10  # added inside the official JAX code's logarithms


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Return |mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) of the Gaussians fitted to rows of features.

    a [n d], b [m d]: finite, n, m >= 2.  Covariances are unbiased; float64; never negative.
    Raises ValueError for other shapes or non-finite features.
    Source: arXiv:1706.08500, eq. 6.  With S_a = R_a^T R_a (R from a QR decomposition of the centred rows), the trace
    of the square root is the sum of the singular values of R_a R_b^T.  Departs from the official code, whose matrix
    square root becomes complex, or needs an offset, with fewer rows than features.
    """
    mean_a, root_a = _fit_gaussian("a", a)
    mean_b, root_b = _fit_gaussian("b", b)
    if len(mean_a) != len(mean_b):
        raise ValueError(f"a has {len(mean_a)} features per row, b has {len(mean_b)}")
    return _distance(mean_a, root_a, mean_b, root_b)


def frechet_distance_of(
    mean_a: np.ndarray, covariance_a: np.ndarray, mean_b: np.ndarray, covariance_b: np.ndarray
) -> float:
    """Return the Fréchet distance of two Gaussians, |mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)).

    mean_a, mean_b [d]; covariance_a, covariance_b [d d], symmetric, of any rank.  float64; never negative.
    Raises ValueError for other shapes or values that are not finite, UserError for matrices that are not covariances.
    Source: arXiv:1706.08500, eq. 6.  The trace of the square root is the sum of the singular values of
    S_a^(1/2) S_b^(1/2), which are the square roots of the eigenvalues of S_a^(1/2) S_b S_a^(1/2).  Eigenvalues of a
    covariance below its rounding error count as 0.  Departs from the official code, which keeps their square roots:
    about 1e-8 of the result with few samples.
    """
    mean_a, mean_b = _finite("mean_a", mean_a, 1), _finite("mean_b", mean_b, 1)
    for name, mean, covariance in (("a", mean_a, covariance_a), ("b", mean_b, covariance_b)):
        if np.shape(covariance) != (len(mean), len(mean)):
            raise ValueError(f"covariance_{name} has shape {np.shape(covariance)}, mean_{name} {mean.shape}")
    if len(mean_a) != len(mean_b):
        raise ValueError(f"mean_a has {len(mean_a)} features, mean_b has {len(mean_b)}")
    return _distance(mean_a, _root("covariance_a", covariance_a), mean_b, _root("covariance_b", covariance_b))


def inception_score(
    logits: np.ndarray, splits: int = 10, convention: str = "torch_fidelity", shuffle: bool = True
) -> tuple[float, float]:
    """Return mean and standard deviation over splits of the rows of exp(mean KL(p(y|x) || p(y))), in [1, k].

    logits: [n k], n >= splits.  shuffle: first permute the rows by RandomState(2020).permutation.
    convention: torch_fidelity (rows i*n//splits to (i+1)*n//splits, float64) or official_jax (n//splits rows each,
    dropping the remainder, float32, with 1e-10 added inside the logarithms).
    Raises UserError for another convention, too few rows or logits that are not finite.
    Source: arXiv:1606.03498; torch-fidelity, metric_isc.py; Lyy-iiis/imeanflow, the JAX code's evaluation.
    """
    if convention not in IS_CONVENTIONS:
        raise UserError(f"{convention!r} is not a convention of the Inception score: {' or '.join(IS_CONVENTIONS)}")
    logits = np.asarray(logits)
    if logits.ndim != 2 or not 1 <= splits <= len(logits):
        raise UserError(f"an Inception score with {splits} splits needs as many rows of logits, not {logits.shape}")
    if not np.isfinite(logits).all():
        raise UserError("some logits are not finite: the model has diverged")
    score, bounds = IS_CONVENTIONS[convention]
    order = np.random.RandomState(SEED).permutation(len(logits)) if shuffle else np.arange(len(logits))
    scores = [score(logits[order[start:stop]]) for start, stop in bounds(len(logits), splits)]
    return float(np.mean(scores)), float(np.std(scores))


def kernel_distance(
    a: np.ndarray, b: np.ndarray, subsets: int = 100, subset_size: int = 1000, seed: int = SEED
) -> tuple[float, float]:
    """Return mean and standard deviation, over random subsets of both sets, of the squared MMD (KID of Inception).

    a [n d], b [m d]: features; 2 <= subset_size <= n, m.  The kernel is (x.y / d + 1)^3; the estimate is unbiased, so
    it can be negative.  float64.  A subset of `a` is drawn, then one of `b`, both without replacement.
    Raises UserError for other subset sizes, other shapes or features that are not finite.
    Source: arXiv:1801.01401, section 4; torch-fidelity, metric_kid.py, which computes in float32.
    """
    a, b = _features("a", a), _features("b", b)
    _check_width(a, b)
    if not 2 <= subset_size <= min(len(a), len(b)):
        raise UserError(
            f"subsets of {subset_size} rows cannot be drawn from {len(a)} and {len(b)} rows for the kernel distance: "
            "use more samples, or a subset_size from 2 to the smaller number"
        )
    if subset_size == len(a) == len(b):  # every subset is the whole set: only rounding would vary
        return _squared_mmd(a.astype(np.float64), b.astype(np.float64)), 0.0
    rng = np.random.RandomState(seed)
    distances = []
    for _ in range(subsets):
        x = a[rng.choice(len(a), subset_size, replace=False)].astype(np.float64)
        y = b[rng.choice(len(b), subset_size, replace=False)].astype(np.float64)
        distances.append(_squared_mmd(x, y))
    return float(np.mean(distances)), float(np.std(distances))


def precision_recall(
    generated: np.ndarray, real: np.ndarray, k: int = 3, batch_size: int = 2048
) -> tuple[float, float, float]:
    """Return precision, recall and their F-score, in [0, 1].

    generated [n d], real [m d]: features; n, m > k.  Precision is the fraction of generated rows that are closer to
    some real row than its k-th nearest other real row; recall swaps the sets.  float64.
    batch_size: distances are computed in blocks of batch_size x batch_size.
    Raises UserError for too few rows, other shapes or features that are not finite.
    Source: arXiv:1904.06991, eq. 1 and 2; torch-fidelity, metric_prc.py, whose F-score is 2pr / max(p + r, 1e-5).
    """
    generated, real = _features("generated", generated), _features("real", real)
    _check_width(generated, real)
    if not 1 <= k < min(len(generated), len(real)):
        raise UserError(
            f"precision and recall need more than k = {k} >= 1 rows of each set, not {len(generated)} and {len(real)}"
        )
    radii, real_radii = _squared_radii(generated, k, batch_size), _squared_radii(real, k, batch_size)
    precise, recalled = np.zeros(len(generated), bool), np.zeros(len(real), bool)
    for rows in _blocks(len(generated), batch_size):
        for columns in _blocks(len(real), batch_size):
            distances = _squared_distances(generated[rows], real[columns])
            precise[rows] |= (distances <= real_radii[columns]).any(axis=1)
            recalled[columns] |= (distances <= radii[rows, None]).any(axis=0)
    precision, recall = float(precise.mean()), float(recalled.mean())
    return precision, recall, 2 * precision * recall / max(precision + recall, 1e-5)


def class_accuracy(images: np.ndarray, labels: np.ndarray, real_images: np.ndarray, real_labels: np.ndarray) -> float:
    """Return the fraction, in [0, 1], of `images` to which a classifier trained on the real ones assigns their label.

    images [n h w c], labels [n] ints; real_images [m h w c], real_labels [m].  The classifier is a support vector
    machine with an RBF kernel on pixels, as in scikit-learn's digits example; its cost grows with m^2, so it only suits
    small datasets.  Deterministic.
    Raises UserError if there is only one class.
    """
    from sklearn import svm  # takes a second to import

    if len(np.unique(real_labels)) < 2:
        raise UserError("all real images have the same class: set --config.evaluation.classifier=False")
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


def _distance(mean_a: np.ndarray, root_a: np.ndarray, mean_b: np.ndarray, root_b: np.ndarray) -> float:
    """Return the Fréchet distance; roots R [r d] of covariances R^T R."""
    distance = np.sum((mean_a - mean_b) ** 2) + np.sum(root_a**2) + np.sum(root_b**2)
    return max(float(distance - 2 * _trace_of_root(root_a, root_b)), 0.0)


def _trace_of_root(root_a: np.ndarray, root_b: np.ndarray) -> float:
    """Return tr (S_a S_b)^(1/2) of S_a = root_a^T root_a and S_b."""
    return np.linalg.svd(root_a @ root_b.T, compute_uv=False).sum()


def _root(name: str, covariance: np.ndarray) -> np.ndarray:
    """Return R [rank d] with R^T R the covariance."""
    covariance = _finite(name, covariance, 2)
    values, vectors = np.linalg.eigh((covariance + covariance.T) / 2)
    if values[0] < -NOT_A_COVARIANCE * np.abs(values).max():
        raise UserError(
            f"{name} is not a covariance: it has an eigenvalue {values[0]:.3g}, the largest is {values[-1]:.3g}"
        )
    kept = values > len(values) * np.finfo(np.float64).eps * values[-1]
    return np.sqrt(values[kept])[:, None] * vectors[:, kept].T


def _finite(name: str, array: np.ndarray, ndim: int) -> np.ndarray:
    array = np.asarray(array, np.float64)
    if array.ndim != ndim:
        raise ValueError(f"{name} must have {ndim} dimensions, not the shape {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} has values that are not finite")
    return array


def _features(name: str, rows: np.ndarray) -> np.ndarray:
    rows = np.asarray(rows)
    if rows.ndim != 2 or not len(rows):
        raise UserError(f"{name} must be rows of features, not of shape {rows.shape}")
    if not np.isfinite(rows).all():
        raise UserError(f"{name} has features that are not finite: the model has diverged")
    return rows


def _check_width(a: np.ndarray, b: np.ndarray) -> None:
    if a.shape[1] != b.shape[1]:
        raise UserError(f"the rows of one set have {a.shape[1]} features, of the other {b.shape[1]}: not the same kind")


def _even_splits(num_rows: int, splits: int) -> list[tuple[int, int]]:
    return [(i * num_rows // splits, (i + 1) * num_rows // splits) for i in range(splits)]


def _whole_splits(num_rows: int, splits: int) -> list[tuple[int, int]]:
    return [(i * (num_rows // splits), (i + 1) * (num_rows // splits)) for i in range(splits)]


def _score(logits: np.ndarray) -> float:
    """Return exp(mean KL) of one split [n k], in float64."""
    logits = logits.astype(np.float64)
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    p = np.exp(log_p)
    marginal = p.mean(axis=0)
    entropy = -np.sum(marginal * np.log(np.where(marginal > 0, marginal, 1)))
    return np.exp((p * log_p).sum(axis=1).mean() + entropy)


def _score_with_offset(logits: np.ndarray) -> float:
    """Return exp(mean KL) of one split [n k], in float32."""
    logits = logits.astype(np.float32)
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    offset = np.float32(LOG_OFFSET)
    divergence = p * (np.log(p + offset) - np.log(p.mean(axis=0) + offset))
    return np.exp(divergence.sum(axis=1).mean())


IS_CONVENTIONS = {"torch_fidelity": (_score, _even_splits), "official_jax": (_score_with_offset, _whole_splits)}


def _squared_mmd(x: np.ndarray, y: np.ndarray) -> float:
    """Return the unbiased estimate for x, y [n d]."""
    num = len(x)
    within = sum(kernel.sum() - np.trace(kernel) for kernel in (_kernel(x, x), _kernel(y, y)))
    return within / (num * (num - 1)) - 2 * _kernel(x, y).mean()


def _kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _squared_radii(rows: np.ndarray, k: int, batch_size: int) -> np.ndarray:
    """Return the squared distance [n] of each row to its k-th nearest other row."""
    radii = np.empty(len(rows))
    for block in _blocks(len(rows), batch_size):
        nearest = np.full((len(rows[block]), k + 1), np.inf)  # a row itself, at 0, is among them
        for others in _blocks(len(rows), batch_size):
            candidates = np.concatenate([nearest, _squared_distances(rows[block], rows[others])], axis=1)
            nearest = np.partition(candidates, k, axis=1)[:, : k + 1]
        radii[block] = nearest[:, k]
    return radii


def _squared_distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    x, y = x.astype(np.float64), y.astype(np.float64)
    products = x @ y.T
    return np.maximum(np.sum(x**2, axis=1)[:, None] + np.sum(y**2, axis=1) - 2 * products, 0)


def _blocks(num_rows: int, batch_size: int) -> list[slice]:
    return [slice(start, start + batch_size) for start in range(0, num_rows, batch_size)]
