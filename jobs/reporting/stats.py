"""Statistics that no one process holds the values of: moments and histograms, each stretch by itself, then added up."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class GroupMoments:
    """Of each of some groups of values: how many, their mean, and the sum of squared distances from it."""

    count: NDArray[np.int64]
    mean: NDArray[np.float64]
    squares: NDArray[np.float64]

    @classmethod
    def of(
        cls, values: NDArray[np.floating], codes: NDArray[np.int64] | None = None, *, num_codes: int = 1
    ) -> GroupMoments:
        """Moments of `values` without NaN, in groups by `codes` (-1 for none); without codes all are group 0."""
        if codes is None:
            codes = np.zeros(len(values), np.int64)
        wide, codes = values[codes >= 0].astype(np.float64), codes[codes >= 0]
        count = np.bincount(codes, minlength=num_codes)
        mean = sums(codes, wide, num_codes) / np.maximum(count, 1)
        squares = sums(codes, (wide - mean[codes]) ** 2, num_codes)
        return cls(count, mean, squares)

    def __add__(self, other: GroupMoments) -> GroupMoments:
        count = self.count + other.count
        share = other.count / np.maximum(count, 1)
        apart = other.mean - self.mean
        return GroupMoments(
            count, self.mean + apart * share, self.squares + other.squares + apart**2 * share * self.count
        )

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
        """Co-moments of values without NaN."""
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
        """Growth of y where x grows by one, by least squares; None where x does not vary."""
        return self.xy / self.xx if self.xx > 0 else None


# Has many divisors: figures join fine bins into as many as suit them.
FINE_BINS = 960
COARSE_BINS = (8, 10, 12, 15, 16, 20, 24, 30, 32, 40, 48, 60)


@dataclass(frozen=True, slots=True)
class Axis:
    """`num_bins` bins of equal width from `low` to `high`, or of equal ratio where `is_log`."""

    low: float
    high: float
    num_bins: int = FINE_BINS
    is_log: bool = False

    @property
    def edges(self) -> NDArray[np.float64]:
        """The `num_bins + 1` edges."""
        return self.coarse_edges(self.num_bins)

    def bins_of(self, values: NDArray[np.floating]) -> NDArray[np.int64]:
        """The bin of each value: 1 to `num_bins`, 0 below the axis and `num_bins + 1` above. NaN is no value.

        A bin has its lower edge and not its upper one; the last has both, as in `numpy.histogram`.
        """
        bins = np.searchsorted(self.edges, values, side="right").astype(np.int64)
        bins[values == self.edges[-1]] = self.num_bins
        return bins

    def coarse_edges(self, num_bins: int) -> NDArray[np.float64]:
        """The edges of `num_bins` bins over the same range."""
        if self.is_log:
            return np.geomspace(self.low, self.high, num_bins + 1)
        return np.linspace(self.low, self.high, num_bins + 1)


def histogram(
    axis: Axis, values: NDArray[np.floating], codes: NDArray[np.int64] | None = None, *, num_codes: int = 1
) -> NDArray[np.int64]:
    """Counts of values in each bin: [num_codes, num_bins + 2], what is below the axis first, what is above last.

    Args:
        axis: the bins.
        values: without NaN.
        codes: which row each value counts in; -1 for none. Without them all count in row 0.
        num_codes: rows.
    """
    bins, width = axis.bins_of(values), axis.num_bins + 2
    if codes is not None:
        bins = (codes * width + bins)[codes >= 0]
    counts: NDArray[np.int64] = np.bincount(bins, minlength=num_codes * width).reshape(num_codes, width)
    return counts


def sums(codes: NDArray[np.integer], values: NDArray[np.float64], num_codes: int) -> NDArray[np.float64]:
    """The sum of the values of each code, 0 to `num_codes - 1`."""
    found: NDArray[np.float64] = np.asarray(np.bincount(codes, values, minlength=num_codes), np.float64)
    return found


def coarse(counts: NDArray[np.int64], num_bins: int) -> NDArray[np.int64]:
    """Fine counts [..., FINE_BINS + 2] joined into `num_bins`, a divisor of `FINE_BINS`; what is off the axis is left
    out."""
    inside = counts[..., 1:-1]
    joined: NDArray[np.int64] = inside.reshape(*inside.shape[:-1], num_bins, -1).sum(-1)
    return joined


def coarse_bins(axis: Axis, counts: NDArray[np.int64]) -> int:
    """Number of bins that shows a distribution best by the rule of Freedman and Diaconis (1981) in `COARSE_BINS`."""
    total = int(counts.sum())
    spread = quantile(axis, counts, 0.75) - quantile(axis, counts, 0.25)
    if not total or spread <= (axis.high - axis.low) / axis.num_bins:  # finer than can be seen here
        return COARSE_BINS[0]
    wanted = (axis.high - axis.low) / (2 * spread * total ** (-1 / 3))
    return min(COARSE_BINS, key=lambda bins: abs(bins - wanted))


def quantile(axis: Axis, counts: NDArray[np.int64], share: float) -> float:
    """The value below which `share` of what one row [num_bins + 2] counts lies, off by a bin's width at most.

    What is below or above the axis counts as its end. NaN where nothing is counted.
    """
    below = np.cumsum(counts)
    if not below[-1]:
        return float("nan")
    wanted = share * below[-1]
    place = int(np.searchsorted(below, wanted, side="left")) if share > 0 else int(np.flatnonzero(counts)[0])
    if place == 0:
        return axis.low
    if place > axis.num_bins:
        return axis.high
    left, right = axis.edges[place - 1 : place + 1]
    part = (wanted - below[place - 1]) / counts[place]
    return float(left + np.clip(part, 0, 1) * (right - left))
