"""Quantiles of scores that no one process holds: each task sums its own up, and the sums are merged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

QUANTILES = (0.0, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1.0)
MAX_POINTS = 2048


@dataclass(frozen=True, slots=True)
class ScoreSummary:
    """At most `MAX_POINTS` scores, in order, each standing for `weights` rows, and the extremes."""

    points: NDArray[np.float32]
    weights: NDArray[np.int64]

    @classmethod
    def of(cls, scores: NDArray[np.float32]) -> ScoreSummary:
        """Sum up scores; those that are NaN are passed over."""
        ordered = np.sort(scores[~np.isnan(scores)])
        if len(ordered) <= MAX_POINTS:
            return cls(ordered, np.ones(len(ordered), np.int64))
        edges = np.linspace(0, len(ordered), MAX_POINTS - 1).round().astype(np.int64)
        middles = (edges[:-1] + edges[1:]) // 2
        points = np.concatenate([ordered[:1], ordered[middles], ordered[-1:]])
        weights = np.concatenate([[0], np.diff(edges), [0]])  # the extremes are there for their values alone
        return cls(points, weights)


def quantiles(summaries: Sequence[ScoreSummary]) -> dict[str, float]:
    """The score below which each share of `QUANTILES` lies, by share; each off by 0.05 % of the rows at most.

    They are exact where no summary had more than `MAX_POINTS` scores. Empty where there are no scores.
    """
    points = np.concatenate([np.empty(0, np.float32), *(summary.points for summary in summaries)])
    weights = np.concatenate([np.empty(0, np.int64), *(summary.weights for summary in summaries)])
    if not weights.sum():
        return {}
    order = np.argsort(points, kind="stable")
    points, below = points[order], np.cumsum(weights[order])
    wanted = [max(1, int(np.ceil(share * below[-1]))) for share in QUANTILES]
    found = {
        f"{share:g}": float(points[np.searchsorted(below, rows)]) for share, rows in zip(QUANTILES, wanted, strict=True)
    }
    return found | {"0": float(points[0]), "1": float(points[-1])}
