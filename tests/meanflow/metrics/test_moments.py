"""Streaming moments against numpy's, on data that cost digits, in any batches, and within their memory."""

import subprocess
import sys

import numpy as np
import pytest

from meanflow.errors import UserError
from meanflow.metrics.moments import BLOCK, Moments


def moments_of(rows, size):
    moments = Moments()
    for start in range(0, len(rows), size):
        moments.add(rows[start : start + size])
    return moments


def relative(got, want):
    return np.linalg.norm(got - want) / np.linalg.norm(want)


@pytest.mark.parametrize("size", [1, 7, 300, 5000])
def test_far_from_zero(size):
    """Mean 1e4, deviation 1: a difference of mean squares would leave eight digits, these leave twelve."""
    noise = np.random.default_rng(0).standard_normal((3000, 6)) @ np.random.default_rng(1).standard_normal((6, 6))
    moments = moments_of(noise + 1e4, size)
    exact = (noise + 1e4).astype(np.longdouble)
    centred = exact - exact.mean(axis=0)
    assert moments.count == 3000
    assert relative(moments.mean, exact.mean(axis=0)) < 1e-14
    assert relative(moments.covariance, centred.T @ centred / 2999) < 1e-12
    assert relative(moments.covariance, np.cov(noise + 1e4, rowvar=False)) < 1e-12


def test_more_rows_than_a_block():
    rows = np.random.default_rng(2).standard_normal((2 * BLOCK + 5, 3)).astype(np.float32)
    moments = moments_of(rows, len(rows))
    assert relative(moments.covariance, np.cov(rows.astype(np.float64), rowvar=False)) < 1e-14


def test_merge():
    """Parts of different means and sizes, one of them empty, through their arrays."""
    rng = np.random.default_rng(3)
    parts = [rng.standard_normal((num, 4)) + shift for num, shift in ((50, 0), (1, 9), (30, -3))]
    merged = Moments()
    for part in [Moments(), *(moments_of(rows, 8) for rows in parts), Moments()]:
        merged.merge(Moments.from_arrays(part.to_arrays()))
    rows = np.concatenate(parts)
    assert merged.count == len(rows)
    np.testing.assert_allclose(merged.mean, rows.mean(axis=0), rtol=1e-13)
    np.testing.assert_allclose(merged.covariance, np.cov(rows, rowvar=False), rtol=1e-12)


def test_a_part_is_left_as_it_was():
    """What is merged into an empty one stays its own."""
    part = moments_of(np.random.default_rng(4).standard_normal((9, 2)), 9)
    before = part.covariance.copy()
    for merged in (Moments(), Moments.from_arrays(part.to_arrays())):
        merged.merge(part)
        merged.add(np.ones((5, 2)))
    np.testing.assert_array_equal(part.covariance, before)
    assert part.count == 9


def test_rows_that_are_not_finite():
    moments = moments_of(np.zeros((3, 2)), 3)
    rows = np.zeros((4, 2))
    rows[1, 0], rows[2] = np.nan, np.inf
    with pytest.raises(UserError, match="2 of 4 samples are not finite"):
        moments.add(rows)
    assert moments.count == 3


def test_too_few_rows():
    moments = Moments()
    with pytest.raises(UserError, match="of 0 samples: at least 1"):
        _ = moments.mean
    moments.add(np.zeros((1, 2)))
    with pytest.raises(UserError, match="of 1 samples: at least 2"):
        _ = moments.covariance


@pytest.mark.parametrize("rows", [np.zeros((3, 4)), np.zeros(2), np.zeros((1, 1, 2))])
def test_rows_of_another_shape(rows):
    moments = moments_of(np.zeros((3, 2)), 3)
    with pytest.raises(ValueError, match="expected rows of 2 features"):
        moments.add(rows)


def test_merge_of_another_width():
    with pytest.raises(ValueError, match="cannot merge moments of 3 features into those of 2"):
        moments_of(np.zeros((3, 2)), 3).merge(moments_of(np.zeros((3, 3)), 3))


def test_memory():
    """Many rows take the memory of a few, beside one copy of a batch: in float32 these are 98 MiB."""
    script = (
        "import numpy as np\n"
        "from meanflow.metrics.moments import Moments\n"
        # Of this program alone: ru_maxrss begins with what the process that started it has had.
        "status = lambda: dict(line.split(':') for line in open('/proc/self/status'))\n"
        "peak = lambda: int(status()['VmHWM'].split()[0]) / 2**10\n"
        "moments, rows = Moments(), np.ones((50_000, 512), np.float32)\n"
        "before = peak()\n"
        "moments.add(rows)\n"
        "for i in range(10): moments.add(rows[:5000])\n"
        "moments.covariance\n"
        "print(peak() - before)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 130  # MiB; as one block in float64 the rows would take 195 more
