"""Counts over bins that are fixed beforehand: those of two stretches are added, and are those of both together."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["FINE_BINS", "Axis", "coarse", "coarse_bins", "histogram", "quantile", "sums"]

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
    """How many values are in each bin: [num_codes, num_bins + 2], what is below the axis first, what is above last.

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
    """How many bins show a distribution best, by the rule of Freedman and Diaconis (1981), within `COARSE_BINS`."""
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
