"""Means, variances and correlations that no one process holds the values of.

Sums are merged by the pairwise formulas of Chan, Golub and LeVeque (1979), which do not cancel as sums of squares do.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from jobs.reporting.histogram import sums

__all__ = ["CoMoments", "Moments"]


@dataclass(frozen=True, slots=True)
class Moments:
    """Of each of some groups of values: how many, their mean, and the sum of squared distances from it."""

    count: NDArray[np.int64]
    mean: NDArray[np.float64]
    squares: NDArray[np.float64]

    @classmethod
    def of(cls, values: NDArray[np.floating], codes: NDArray[np.int64] | None = None, *, num_codes: int = 1) -> Moments:
        """Those of `values` without NaN, in groups by `codes` (-1 for none); without codes all are group 0."""
        if codes is None:
            codes = np.zeros(len(values), np.int64)
        wide, codes = values[codes >= 0].astype(np.float64), codes[codes >= 0]
        count = np.bincount(codes, minlength=num_codes)
        mean = sums(codes, wide, num_codes) / np.maximum(count, 1)
        squares = sums(codes, (wide - mean[codes]) ** 2, num_codes)
        return cls(count, mean, squares)

    def __add__(self, other: Moments) -> Moments:
        count = self.count + other.count
        share = other.count / np.maximum(count, 1)
        apart = other.mean - self.mean
        return Moments(count, self.mean + apart * share, self.squares + other.squares + apart**2 * share * self.count)

    @property
    def deviation(self) -> NDArray[np.float64]:
        """The standard deviation of each group (of a sample: divided by n - 1), NaN below two values."""
        return np.sqrt(np.where(self.count > 1, self.squares / np.maximum(self.count - 1, 1), np.nan))


@dataclass(frozen=True, slots=True)
class CoMoments:
    """Of pairs (x, y): how many, their means, and the sums of squares and products of the distances from them."""

    count: int = 0
    mean_x: float = 0.0
    mean_y: float = 0.0
    xx: float = 0.0
    yy: float = 0.0
    xy: float = 0.0

    @classmethod
    def of(cls, x: NDArray[np.floating], y: NDArray[np.floating]) -> CoMoments:
        """Those of values without NaN."""
        if not len(x):
            return cls()
        x, y = x.astype(np.float64), y.astype(np.float64)
        mean_x, mean_y = float(x.mean()), float(y.mean())
        x, y = x - mean_x, y - mean_y
        return cls(len(x), mean_x, mean_y, float(x @ x), float(y @ y), float(x @ y))

    def __add__(self, other: CoMoments) -> CoMoments:
        count = self.count + other.count
        if not count:
            return self
        share = other.count / count
        x, y = other.mean_x - self.mean_x, other.mean_y - self.mean_y
        weight = self.count * share
        return CoMoments(
            count,
            self.mean_x + x * share,
            self.mean_y + y * share,
            self.xx + other.xx + x * x * weight,
            self.yy + other.yy + y * y * weight,
            self.xy + other.xy + x * y * weight,
        )

    @property
    def correlation(self) -> float | None:
        """Pearson's r; None where x or y does not vary."""
        if self.xx <= 0 or self.yy <= 0:
            return None
        return max(-1.0, min(1.0, self.xy / math.sqrt(self.xx * self.yy)))

    @property
    def slope(self) -> float | None:
        """What y grows by where x grows by one, by least squares; None where x does not vary."""
        return self.xy / self.xx if self.xx > 0 else None
