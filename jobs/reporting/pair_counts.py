"""Margins between preferred and other responses, and what they tell: accuracy, calibration, the part of length.

The probability that the first of two responses is preferred is that of Bradley and Terry (1952) over raw scores:
sigmoid(score of the first - score of the second).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from jobs.reporting.histogram import Axis, histogram, sums

__all__ = ["CONFIDENCE_BINS", "PairCounts", "interval"]

CONFIDENCE_BINS = 10


@dataclass(frozen=True, slots=True)
class PairCounts:
    """What is counted of the pairs of one column of scores (or of two, one for each side).

    A pair is right by 1 where the chosen response scores more, by 0.5 where both score the same. `margins` counts
    chosen minus rejected over fine bins; `sizes` and `right_by_size` count absolute margins and what is right of them
    likewise. `confidence`, `predicted` and `observed` are, for each tenth of the probability of the higher score
    between 0.5 and 1, how many, the sum of the probabilities, and the sum of what is right. `by` has, for each value
    of a column, how many and what is right. `longer` has the same for pairs whose chosen response has fewer tokens,
    as many, and more.
    """

    num_pairs: int
    right: float
    ties: int
    log_loss: float
    margins: NDArray[np.int64]
    sizes: NDArray[np.int64]
    right_by_size: NDArray[np.float64]
    confidence: NDArray[np.int64]
    predicted: NDArray[np.float64]
    observed: NDArray[np.float64]
    by: Mapping[str, NDArray[np.float64]]
    longer: NDArray[np.float64]

    @classmethod
    def of(
        cls,
        chosen: NDArray[np.float32],
        rejected: NDArray[np.float32],
        axis: Axis,
        *,
        longer: NDArray[np.float32] | None = None,
        codes: Mapping[str, tuple[NDArray[np.integer], int]],
    ) -> PairCounts:
        """Those of pairs.

        Args:
            chosen, rejected: the scores of each pair; a pair in which one is NaN does not count.
            axis: the fine bins of margins.
            longer: tokens of the chosen response minus tokens of the rejected one; NaN where they are not known.
            codes: by column the place of each pair's value (-1 for none), and how many values there are.
        """
        scored = ~(np.isnan(chosen) | np.isnan(rejected))
        margin = chosen[scored].astype(np.float64) - rejected[scored]
        size, right = np.abs(margin), np.where(margin > 0, 1.0, np.where(margin < 0, 0.0, 0.5))
        # The sigmoid of the absolute margin, from 0.5 to 1.
        probability = 1 / (1 + np.exp(-size))
        place = np.minimum((probability - 0.5) * 2 * CONFIDENCE_BINS, CONFIDENCE_BINS - 1).astype(np.int64)
        sizes = Axis(0.0, axis.high, axis.num_bins)
        order = np.full(len(margin), np.nan) if longer is None else np.sign(longer[scored].astype(np.float64))
        known = ~np.isnan(order)
        return cls(
            num_pairs=len(margin),
            right=float(right.sum()),
            ties=int((margin == 0).sum()),
            log_loss=float(np.logaddexp(0, -margin).sum()),
            margins=histogram(axis, margin)[0],
            sizes=histogram(sizes, size)[0],
            right_by_size=sums(sizes.bins_of(size), right, axis.num_bins + 2),
            confidence=np.bincount(place, minlength=CONFIDENCE_BINS),
            predicted=sums(place, probability, CONFIDENCE_BINS),
            observed=sums(place, right, CONFIDENCE_BINS),
            by={name: _counted(right, own[scored], number) for name, (own, number) in codes.items()},
            longer=_counted(right[known], order[known].astype(np.int64) + 1, 3),
        )

    def __add__(self, other: PairCounts) -> PairCounts:
        own = {each.name: getattr(self, each.name) for each in fields(self)}
        added = {name: value + getattr(other, name) for name, value in own.items() if name != "by"}
        return PairCounts(**added, by={name: value + other.by[name] for name, value in self.by.items()})

    @property
    def accuracy(self) -> float:
        """The share of the pairs that is right; NaN without pairs."""
        return self.right / self.num_pairs if self.num_pairs else float("nan")

    @property
    def calibration_error(self) -> float:
        """The expected calibration error (Naeini et al. 2015): how far what was observed is from the predicted
        probability, by `confidence` bins, weighted by their pairs."""
        return float(np.abs(self.observed - self.predicted).sum() / max(self.num_pairs, 1))

    @property
    def mean_log_loss(self) -> float:
        """The mean of -log(probability that the chosen response is preferred): what reward models are trained on."""
        return self.log_loss / max(self.num_pairs, 1)


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


def _counted(right: NDArray[np.float64], codes: NDArray[np.integer], number: int) -> NDArray[np.float64]:
    """How many pairs each value has and what is right of them: [2, number]."""
    known = codes >= 0
    return np.stack(
        [
            np.bincount(codes[known], minlength=number).astype(np.float64),
            sums(codes[known], right[known], number),
        ]
    )
