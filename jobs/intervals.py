"""Intervals of shares, for every table and summary that gives an accuracy."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def interval(
    right: NDArray[np.float64] | float, pairs: NDArray[np.float64] | float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The 95 % interval of a share, by Wilson (1927); it takes pairs as independent of each other."""
    z = 1.96
    pairs = np.asarray(pairs, np.float64)
    share = np.asarray(right, np.float64) / pairs
    middle = (share + z * z / (2 * pairs)) / (1 + z * z / pairs)
    half = z / (1 + z * z / pairs) * np.sqrt(share * (1 - share) / pairs + (z / (2 * pairs)) ** 2)
    return np.maximum(middle - half, 0.0), np.minimum(middle + half, 1.0)
