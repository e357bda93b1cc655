"""Fixtures of the image-quality metrics, as torch-fidelity, pytorch-fid and the official repositories compute them.

Both trainers use `scores.py` and `moments.py` of `meanflow/metrics`, so one check covers both: its framework is
`jax-torch`.
"""

import functools

import numpy as np

from meanflow.metrics import scores
from meanflow.metrics.moments import Moments
from parity.checks import Measure

BOUND = 1e-10  # both in float64
FLOAT32 = 2.0**-24  # relative rounding of one float32 operation
# For rank-deficient covariances, official code keeps square roots of eigenvalues that are rounding, some 1e-8 each.
ROOTS_BOUND = 1e-6
# torch-fidelity's means are float32: an error of 2^-24 relative to the means, times twice their distance.
MEANS_BOUND = 1e-6
FRECHET = ("gsunshine_sqrtm", "imf_eigvals", "pytorch_fid", "dmf", "torchmetrics", "torch_fidelity")
BATCH = 7  # rows; the results do not depend on it


def groups(fixture) -> list[str]:
    """Return the cases that the fixture must have."""
    return list(RUNNERS)


def frechet_distances(group: str, generated: str, fixture, measure: Measure) -> None:
    """fid, fid_small: one distance, as each codebase computes it; ours from rows, and from means and covariances."""
    rows = fixture.get(f"in/{generated}"), fixture.get("in/f2")
    a, b = map(moments_of, rows)
    of_moments = scores.frechet_distance_of(a.mean, a.covariance, b.mean, b.covariance)
    measure.compare("jax-torch", "of rows", scores.frechet_distance(*rows), of_moments, BOUND)
    full_rank = min(a.count, b.count) > len(a.mean)
    for name in FRECHET:
        bound = MEANS_BOUND if name == "torch_fidelity" else BOUND if full_rank else ROOTS_BOUND
        measure.compare("jax-torch", name, of_moments, fixture.get(f"out/{group}/{name}"), bound)


def inception_scores(fixture, measure: Measure) -> None:
    """is: mean and standard deviation under both conventions; the mean for all rows as one split, not shuffled."""
    logits, splits = fixture.get("in/logits"), fixture.config["is_splits"]
    got = scores.inception_score(logits, splits)
    measure.compare("jax-torch", "torch_fidelity", got, fixture.get("out/is/torch_fidelity"), BOUND)
    whole = scores.inception_score(logits, 1, shuffle=False)[:1]
    measure.compare("jax-torch", "torch_fidelity_1split", whole, fixture.get("out/is/torch_fidelity_1split"), BOUND)
    # The score's exponent is a sum of k float32 terms on both sides; the standard deviation has the mean's error.
    got = np.array(scores.inception_score(logits, splits, "official_jax"))
    want = fixture.get("out/is/imf")
    error = np.abs(got - want).max() / want[0]
    measure.add("jax-torch", "imf (of the mean)", error, FLOAT32 * np.sqrt(logits.shape[1]) * 2)


def kernel_distances(fixture, measure: Measure) -> None:
    """kid: over subsets, and for one subset of all rows of the smaller set, whose value is also known in float64."""
    a, b = fixture.get("in/f1"), fixture.get("in/f2")
    size = min(len(a), len(b))
    whole, _ = scores.kernel_distance(a[:size], b[:size], 1, size)
    measure.compare("jax-torch", "full_f64", [whole], fixture.get("out/kid/full_f64"), BOUND)
    # The sums of kernel values nearly cancel, so float32 rounding scales with the sums; 8: many terms are added.
    pairs = ((a, a), (b, b), (a, b))
    rounding = 8 * FLOAT32 * sum(np.abs((x.astype(np.float64) @ y.T / x.shape[1] + 1) ** 3).mean() for x, y in pairs)
    settings = fixture.config["kid"]
    got = scores.kernel_distance(a, b, settings["subsets"], settings["subset_size"])
    for name, ours in {"torch_fidelity": got, "full": [whole]}.items():
        error = np.abs(np.array(ours) - fixture.get(f"out/kid/{name}")).max()
        measure.add("jax-torch", f"{name} (absolute)", error, rounding)


def precision_and_recall(fixture, measure: Measure) -> None:
    """prc: precision, recall and F-score.  They are fractions of rows: one row changes them by 1/n."""
    got = scores.precision_recall(fixture.get("in/f1"), fixture.get("in/f2"), fixture.config["prc_k"], BATCH)
    measure.compare("jax-torch", "torch_fidelity", got, fixture.get("out/prc/torch_fidelity"), 2 * FLOAT32)


def moments(group: str, rows: str, fixture, measure: Measure) -> None:
    """mu1, mu2, sigma1, sigma2: mean or covariance of rows that arrive in batches."""
    got = moments_of(fixture.get(f"in/{rows}"))
    value = got.mean if group.startswith("mu") else got.covariance
    measure.compare("jax-torch", group, value, fixture.get(f"out/{group}"), BOUND)


def moments_of(rows: np.ndarray) -> Moments:
    """Return the moments of rows [n d], accumulated in batches as by two processes."""
    halves = Moments(), Moments()
    for start in range(0, len(rows), BATCH):
        halves[start // BATCH % 2].add(rows[start : start + BATCH])
    halves[0].merge(halves[1])
    return halves[0]


RUNNERS = {
    "fid": functools.partial(frechet_distances, "fid", "f1"),
    "fid_small": functools.partial(frechet_distances, "fid_small", "f1_small"),
    "is": inception_scores,
    "kid": kernel_distances,
    "prc": precision_and_recall,
    **{f"{kind}{i}": functools.partial(moments, f"{kind}{i}", f"f{i}") for kind in ("mu", "sigma") for i in (1, 2)},
}
