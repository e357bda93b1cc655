"""Checks, cases, and how errors are measured."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Check:
    """A measured error and its bound."""

    case: str  # e.g. float64/split/kappa
    framework: str  # jax | torch, each against a reference, or jax-torch: one against the other
    quantity: str  # what was compared
    error: float  # relative L2 norm of the difference unless the quantity says otherwise; inf if not comparable
    bound: float  # largest error allowed

    @property
    def ok(self) -> bool:
        """Whether the error is finite and within the bound."""
        return math.isfinite(self.error) and self.error <= self.bound

    @property
    def ratio(self) -> float:
        """Error over bound; above 1 fails.  inf for non-finite errors, and for any error above a bound of 0."""
        if self.ok:
            return self.error / self.bound if self.bound else 0.0
        return self.error / self.bound if self.bound and math.isfinite(self.error) else math.inf


@dataclasses.dataclass(frozen=True)
class Case:
    """A named group of checks that share a computation."""

    name: str
    run: Callable[["Measure"], None]
    network: str = ""  # cases of the same network share compiled programs and run consecutively


class Measure:
    """Collects the checks of one case."""

    def __init__(self, case: str):
        self.case = case
        self.checks: list[Check] = []

    def add(self, framework: str, quantity: str, error: float, bound: float) -> None:
        """Record a measured error."""
        self.checks.append(Check(self.case, framework, quantity, float(error), float(bound)))

    def compare(self, framework: str, quantity: str, got, want, bound: float) -> None:
        """Record the relative error of `got` against `want`; different shapes fail."""
        got, want = np.asarray(got), np.asarray(want)
        if got.shape != want.shape:
            quantity = f"{quantity} (shape {got.shape}, expected {want.shape})"
        self.add(framework, quantity, relative_error(got, want), bound)

    def equal(self, framework: str, quantity: str, got, want) -> None:
        """Record how many entries of two integer arrays differ; any difference fails."""
        got, want = np.asarray(got), np.asarray(want)
        differ = (got != want).sum() if got.shape == want.shape else math.inf
        self.add(framework, f"{quantity} (entries that differ)", differ, 0.0)

    def compare_worst(self, framework: str, quantity: str, got: dict, want: dict, bound: Any) -> None:
        """Record the worst entry of two dicts of arrays, by name; different names fail.

        bound: a number, or a function of the name.
        """
        if got.keys() != want.keys():
            names = ", ".join(sorted(got.keys() ^ want.keys())[:3])
            self.add(framework, f"{quantity} (only on one side: {names})", math.inf, 0.0)
            return
        checks = []
        for name in want:
            limit: Any = bound(name) if callable(bound) else bound
            error = relative_error(np.asarray(got[name]), np.asarray(want[name]))
            checks.append(Check(self.case, framework, f"{quantity} (worst: {name})", error, float(limit)))
        self.checks.append(max(checks, key=lambda check: check.ratio))


def relative_error(got: np.ndarray, want: np.ndarray) -> float:
    """Return ||got - want|| / ||want||, in float64; 0 where both are exactly 0.

    inf for different shapes or non-finite entries.
    """
    if got.shape != want.shape:
        return math.inf
    got, want = got.astype(np.float64), want.astype(np.float64)
    if not (np.isfinite(got).all() and np.isfinite(want).all()):
        return math.inf
    difference, norm = np.linalg.norm(got - want), np.linalg.norm(want)
    if difference == 0:
        return 0.0
    return float(difference / norm) if norm else math.inf
