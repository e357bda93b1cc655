"""Mean and covariance of features that arrive in batches, from one process or many."""

import numpy as np

from meanflow.errors import UserError

BLOCK = 1024  # rows held in float64 at a time


class Moments:
    """Number, mean and covariance of rows in float64, in the memory of two [d d] matrices however many rows there are.

    Each batch is centred before it is squared, so a mean far from 0 costs no precision.
    Source: Chan, Golub and LeVeque, Updating formulae and a pairwise algorithm for computing sample variances, 1979.
    """

    def __init__(self):
        self._done = 0  # rows in the mean and the products
        self._mean = np.zeros(0)
        self._products = np.zeros((0, 0))  # sum of (x - mean) (x - mean)^T
        self._pending: list[np.ndarray] = []  # rows not yet added: a block costs d^2, however few rows it has

    @property
    def count(self) -> int:
        """The number of rows."""
        return self._done + sum(map(len, self._pending))

    def add(self, rows: np.ndarray) -> None:
        """Add rows [b d] of any float type.

        Raises UserError for non-finite rows, ValueError if the shape is wrong or d has changed; then none is added.
        """
        rows = np.asarray(rows)
        width = len(self._mean) or (self._pending[0].shape[1] if self._pending else 0)
        if rows.ndim != 2 or (width and len(rows) and rows.shape[1] != width):
            raise ValueError(f"expected rows of {width or 'some'} features, not of shape {rows.shape}")
        broken = np.count_nonzero(~np.isfinite(rows).all(axis=1))
        if broken:
            raise UserError(f"the features of {broken} of {len(rows)} samples are not finite: the model has diverged")
        if len(rows):
            self._pending.append(rows.copy())
        if sum(map(len, self._pending)) >= BLOCK:
            self._flush()

    def merge(self, other: "Moments") -> None:
        """Add all rows of `other`.  Raises ValueError if their number of features differs."""
        self._flush()
        other._flush()
        if self.count and other.count and len(self._mean) != len(other._mean):
            raise ValueError(f"cannot merge moments of {len(other._mean)} features into those of {len(self._mean)}")
        if other.count:
            self._combine(other.count, other._mean, other._products.copy())

    @property
    def mean(self) -> np.ndarray:
        """The mean [d] of at least one row, else UserError."""
        self._need(1)
        return self._mean

    @property
    def covariance(self) -> np.ndarray:
        """The unbiased covariance [d d] of at least two rows, else UserError."""
        self._need(2)
        return self._products / (self.count - 1)

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Return the whole state, for `from_arrays` in another process."""
        self._flush()
        return {"count": np.array(self.count), "mean": self._mean, "products": self._products}

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray]) -> "Moments":
        """Return the moments that `to_arrays` returned."""
        moments = cls()
        moments._done = int(arrays["count"])
        moments._mean = np.array(arrays["mean"], np.float64)
        moments._products = np.array(arrays["products"], np.float64)
        return moments

    def _flush(self) -> None:
        """Add the pending rows to the mean and the products."""
        pending, self._pending = self._pending, []
        rows = pending[0] if len(pending) == 1 else np.concatenate(pending or [np.zeros((0, 0))])
        for start in range(0, len(rows), BLOCK):
            block = rows[start : start + BLOCK].astype(np.float64)
            mean = block.mean(axis=0)
            block -= mean
            self._combine(len(block), mean, block.T @ block)

    def _combine(self, count: int, mean: np.ndarray, products: np.ndarray) -> None:
        """Add `count` rows with this mean and these products, whose array may be overwritten."""
        if not self._done:
            self._done, self._mean, self._products = count, mean.copy(), products
            return
        total = self._done + count
        delta = mean - self._mean
        self._products += products
        self._products += np.outer(delta, delta * (self._done * count / total))
        self._mean = self._mean + delta * (count / total)
        self._done = total

    def _need(self, count: int) -> None:
        self._flush()
        if self._done < count:
            raise UserError(f"cannot compute statistics of {self._done} samples: at least {count} are needed")
