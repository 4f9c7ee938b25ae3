"""Labelled pairs: rows of one prompt meet, every preferred one makes a pair with every other, and what their margins
tell.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from jobs.reporting.columns import ReportColumns, ScoreColumn
from jobs.reporting.counts import sides_of
from jobs.reporting.scales import Scales, codes_of, finite_scores
from jobs.reporting.stats import Axis, histogram, sums

CONFIDENCE_BINS = 10


@dataclass(frozen=True, slots=True)
class PairCounts:
    """Counts of the pairs of one column of scores (or of two, one for each side).

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
        """Counts of pairs.

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


def _counted(right: NDArray[np.float64], codes: NDArray[np.integer], number: int) -> NDArray[np.float64]:
    """Number of pairs of each value, and of right ones among them: [2, number]."""
    known = codes >= 0
    return np.stack(
        [
            np.bincount(codes[known], minlength=number).astype(np.float64),
            sums(codes[known], right[known], number),
        ]
    )


MAX_SIDE = 16


@dataclass(frozen=True, slots=True)
class LabelledRows:
    """Rows that have a label: the key of their prompt [rows, 2], their side (1 chosen, 0 rejected), scores and token
    counts by column (NaN for none), and the places of their values by column."""

    keys: NDArray[np.uint64]
    side: NDArray[np.int8]
    numbers: Mapping[str, NDArray[np.float32]]
    codes: Mapping[str, NDArray[np.int16]]

    @classmethod
    def of(cls, table: pa.Table, columns: ReportColumns, scales: Scales) -> LabelledRows:
        """The rows of a table that have a label."""
        side = sides_of(table, columns)
        assert side is not None
        assert columns.label is not None
        names = {name for score in columns.scores for name in (score.name, score.tokens) if name}
        rows = cls(
            columns.label.keys.of(table),
            side.astype(np.int8),
            {name: finite_scores(table, name) for name in names},
            {name: codes_of(table.column(name), scales.values[name] or ()).astype(np.int16) for name in columns.by},
        )
        return rows.select(side >= 0)

    def select(self, rows: NDArray[np.int64] | NDArray[np.bool_]) -> LabelledRows:
        return LabelledRows(
            self.keys[rows],
            self.side[rows],
            {name: values[rows] for name, values in self.numbers.items()},
            {name: values[rows] for name, values in self.codes.items()},
        )


@dataclass(frozen=True, slots=True)
class PairedRows:
    """The rows of pairs by their indices; `prompts` have a pair, `alone` labelled rows have none, and of `cut` prompts
    not all pairs are taken."""

    chosen: NDArray[np.int64]
    rejected: NDArray[np.int64]
    prompts: int
    alone: int
    cut: int


def paired_rows(keys_N2: NDArray[np.uint64], side_N: NDArray[np.int8]) -> PairedRows:
    """Every chosen row with every rejected row of its prompt; of each side the first `MAX_SIDE` of a prompt.

    Args:
        keys_N2: the prompt of each row; two zeros for none.
        side_N: 1 chosen, 0 rejected.
    """
    has_key = np.flatnonzero(keys_N2.any(axis=1))
    # Chosen rows of a prompt before the rejected ones, each in input order.
    order = has_key[np.lexsort((-side_N[has_key], keys_N2[has_key, 1], keys_N2[has_key, 0]))]
    keys, chosen = keys_N2[order], side_N[order] == 1
    starts = np.flatnonzero(np.append(True, (keys[1:] != keys[:-1]).any(axis=1))) if len(order) else order
    sizes = np.diff(np.append(starts, len(order)))
    num_chosen = np.add.reduceat(chosen, starts, dtype=np.int64) if len(starts) else starts
    num_rejected = sizes - num_chosen
    paired = (num_chosen > 0) & (num_rejected > 0)
    some_chosen, some_rejected = np.minimum(num_chosen, MAX_SIDE), np.minimum(num_rejected, MAX_SIDE)
    pairs_of_group = np.where(paired, some_chosen * some_rejected, 0)
    group = np.repeat(np.arange(len(starts)), pairs_of_group)
    place = np.arange(len(group)) - np.repeat(np.cumsum(pairs_of_group) - pairs_of_group, pairs_of_group)
    width = some_rejected[group]
    return PairedRows(
        order[starts[group] + place // np.maximum(width, 1)],
        order[starts[group] + num_chosen[group] + place % np.maximum(width, 1)],
        prompts=int(paired.sum()),
        alone=len(side_N) - int(sizes[paired].sum()),
        cut=int((paired & (np.maximum(num_chosen, num_rejected) > MAX_SIDE)).sum()),
    )


@dataclass(frozen=True, slots=True)
class PairsByColumn:
    """The pairs of a corpus, counted for each column of scores, or for the two columns of each side as one (`name`).

    `prompts` have a pair, `alone` labelled rows have none, of `cut` prompts not all pairs are taken; these are 0 where
    a row is a pair.
    """

    counts: Mapping[str, PairCounts]
    prompts: int = 0
    alone: int = 0
    cut: int = 0

    def __add__(self, other: PairsByColumn) -> PairsByColumn:
        counts = {name: own + other.counts[name] for name, own in self.counts.items()}
        return PairsByColumn(counts, self.prompts + other.prompts, self.alone + other.alone, self.cut + other.cut)


def joined(parts: Sequence[LabelledRows]) -> LabelledRows:
    """Rows one after the other, of at least one piece."""
    return LabelledRows(
        np.concatenate([part.keys for part in parts]),
        np.concatenate([part.side for part in parts]),
        {name: np.concatenate([part.numbers[name] for part in parts]) for name in parts[0].numbers},
        {name: np.concatenate([part.codes[name] for part in parts]) for name in parts[0].codes},
    )


def split(rows: LabelledRows, num_shares: int) -> list[LabelledRows]:
    """Rows by the share that their prompt belongs to, each in input order."""
    share = rows.keys[:, 0] % np.uint64(num_shares)
    order = np.argsort(share, kind="stable")
    ends = np.searchsorted(share[order], np.arange(num_shares), side="right")
    return [rows.select(own) for own in np.split(order, ends[:-1])]


def pairs_of_prompts(rows: LabelledRows, columns: ReportColumns, scales: Scales) -> PairsByColumn:
    """The pairs of labelled rows, all of whose prompts are whole."""
    found = paired_rows(rows.keys, rows.side)
    chosen, rejected = rows.select(found.chosen), rows.select(found.rejected)
    codes = {name: (own, len(scales.values[name] or ())) for name, own in chosen.codes.items()}
    counts = {}
    for column in columns.scores:
        scale = scales.scores[column.name]
        counts[column.name] = PairCounts.of(
            chosen.numbers[column.name],
            rejected.numbers[column.name],
            scale.margins(scale),
            longer=_longer(chosen.numbers, rejected.numbers, column, column),
            codes=codes,
        )
    return PairsByColumn(counts, found.prompts, found.alone, found.cut)


def pairs_of_rows(table: pa.Table, columns: ReportColumns, scales: Scales) -> PairsByColumn:
    """The pairs of a table in which every row is one."""
    assert columns.pair is not None
    chosen, rejected = columns.pair.chosen, columns.pair.rejected
    names = {name for score in (chosen, rejected) for name in (score.name, score.tokens) if name}
    numbers = {name: finite_scores(table, name) for name in names}
    values = {name: scales.values[name] or () for name in columns.by}
    counts = PairCounts.of(
        numbers[chosen.name],
        numbers[rejected.name],
        scales.scores[chosen.name].margins(scales.scores[rejected.name]),
        longer=_longer(numbers, numbers, chosen, rejected) if chosen.tokens != rejected.tokens else None,
        codes={name: (codes_of(table.column(name), own), len(own)) for name, own in values.items()},
    )
    return PairsByColumn({columns.pair.name: counts})


def _longer(
    chosen: Mapping[str, NDArray[np.float32]],
    rejected: Mapping[str, NDArray[np.float32]],
    chosen_column: ScoreColumn,
    rejected_column: ScoreColumn,
) -> NDArray[np.float32] | None:
    """By how many tokens the chosen response is longer: both have the same prompt."""
    if chosen_column.tokens is None or rejected_column.tokens is None:
        return None
    return chosen[chosen_column.tokens] - rejected[rejected_column.tokens]
