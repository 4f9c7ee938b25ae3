"""Counts of a corpus once its scales are known: scores and errors, each stretch by itself, then added up."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from jobs.reporting.columns import ReportColumns, ScoreColumn
from jobs.reporting.extremes import Extremes
from jobs.reporting.scales import LengthScale, Scales, ScoreScale, codes_of, finite_scores, has_both, label_codes
from jobs.reporting.stats import CoMoments, GroupMoments, histogram

MAX_KINDS = 100
MAX_KIND_CHARS = 60
MAX_EXAMPLE_CHARS = 300
NO_REASON, NOT_FINITE, OTHERS = "(no reason given)", "(the score is not finite)", "(other kinds)"


@dataclass(frozen=True, slots=True)
class ErrorKind:
    """Number of rows that have an error of a kind, and the text of one: the first in the order of texts."""

    count: int
    example: str

    def __add__(self, other: ErrorKind) -> ErrorKind:
        return ErrorKind(self.count + other.count, min(self.example, other.example))


@dataclass(frozen=True, slots=True)
class ErrorKinds:
    """Rows without a score by the kind of their error: what stands before its colon, in `jobs.score` its type."""

    kinds: Mapping[str, ErrorKind] = field(default_factory=dict)

    @classmethod
    def of(cls, table: pa.Table, column: ScoreColumn) -> ErrorKinds:
        """Error kinds of a table of rows that have no score."""
        kinds: dict[str, ErrorKind] = {}
        if not table.num_rows:
            return cls(kinds)
        texts = pa.nulls(table.num_rows, pa.large_string())
        if column.error is not None:
            texts = pc.cast(table.column(column.error), pa.large_string())
        reason = pc.if_else(pc.is_valid(table.column(column.name)), NOT_FINITE, NO_REASON)
        for entry in pc.value_counts(pc.coalesce(texts, reason)).to_pylist():
            text = entry["values"]
            kind = text if text in (NO_REASON, NOT_FINITE) else text.partition(":")[0].strip()[:MAX_KIND_CHARS]
            found = ErrorKind(entry["counts"], "" if kind == text else text[:MAX_EXAMPLE_CHARS])
            kinds[kind] = kinds[kind] + found if kind in kinds else found
        return cls(_bounded(kinds))

    def __add__(self, other: ErrorKinds) -> ErrorKinds:
        kinds = dict(self.kinds)
        for kind, found in other.kinds.items():
            kinds[kind] = kinds[kind] + found if kind in kinds else found
        return ErrorKinds(_bounded(kinds))

    @property
    def total(self) -> int:
        return sum(kind.count for kind in self.kinds.values())


def _bounded(kinds: dict[str, ErrorKind]) -> dict[str, ErrorKind]:
    """The most frequent kinds, and the others as one."""
    if len(kinds) <= MAX_KINDS:
        return kinds
    ordered = sorted(kinds.items(), key=lambda item: (item[0] == OTHERS, -item[1].count, item[0]))
    kept = dict(ordered[: MAX_KINDS - 1])
    left = [kind for _, kind in ordered[MAX_KINDS - 1 :]]
    return kept | {OTHERS: ErrorKind(sum(kind.count for kind in left), left[0].example)}


MAP_BINS = 48


@dataclass(frozen=True, slots=True)
class GroupCounts:
    """The scores of each of some groups: counts of fine bins, [groups, FINE_BINS + 2], and moments."""

    histogram: NDArray[np.int64]
    moments: GroupMoments

    @classmethod
    def of(
        cls,
        scores: NDArray[np.float32],
        scale: ScoreScale,
        codes: NDArray[np.int64] | None = None,
        *,
        num_codes: int = 1,
    ) -> GroupCounts:
        """Counts of scores without NaN; the groups are by `codes`, -1 for none."""
        return cls(
            histogram(scale.axis, scores, codes, num_codes=num_codes),
            GroupMoments.of(scores, codes, num_codes=num_codes),
        )

    def __add__(self, other: GroupCounts) -> GroupCounts:
        return GroupCounts(self.histogram + other.histogram, self.moments + other.moments)


@dataclass(frozen=True, slots=True)
class LengthCounts:
    """Scores against token counts.

    `map` has the rows of each bin of tokens and of scores, without those off an axis; `shares` the scores of each
    share of the lengths and `lengths` its tokens; `linear` correlates tokens with scores, `ranked` their ranks, and
    `doubling` the logarithm of base 2 of the tokens with scores.
    """

    map: NDArray[np.int64]
    shares: GroupMoments
    lengths: GroupMoments
    linear: CoMoments
    ranked: CoMoments
    doubling: CoMoments

    @classmethod
    def of(
        cls, scores: NDArray[np.float32], tokens: NDArray[np.float32], scale: ScoreScale, lengths: LengthScale
    ) -> LengthCounts:
        """Counts of the rows that have both."""
        both = has_both(scores, tokens)
        scores, tokens = scores[both], tokens[both]
        columns = lengths.axis.num_bins
        fine = histogram(scale.axis, scores, lengths.axis.bins_of(tokens) - 1, num_codes=columns + 1)[:columns]
        share = np.searchsorted(lengths.share_edges, tokens, side="left").astype(np.int64)
        num_shares = len(lengths.share_edges) + 1
        return cls(
            fine[:, 1:-1].reshape(columns, MAP_BINS, -1).sum(-1),
            GroupMoments.of(scores, share, num_codes=num_shares),
            GroupMoments.of(tokens, share, num_codes=num_shares),
            CoMoments.of(tokens, scores),
            CoMoments.of(lengths.ranks(tokens), lengths.score_ranks(scores)),
            CoMoments.of(np.log2(tokens.astype(np.float64)), scores),
        )

    def __add__(self, other: LengthCounts) -> LengthCounts:
        return LengthCounts(*(getattr(self, each.name) + getattr(other, each.name) for each in fields(self)))


MAX_TURNS = 64
"""Turns that are told apart; scores of later ones count with the last of these."""


def turn_moments(column: pa.ChunkedArray) -> GroupMoments:
    """Moments of the scores in lists, by their place in the list: turn 0, turn 1, ... up to `MAX_TURNS` - 1."""
    rows = pc.list_parent_indices(column).to_numpy()
    turns = np.minimum(np.arange(len(rows)) - np.searchsorted(rows, rows, side="left"), MAX_TURNS - 1)
    scores = pc.cast(pc.list_flatten(column), pa.float32()).to_numpy(zero_copy_only=False)
    finite = np.isfinite(scores)
    return GroupMoments.of(scores[finite], turns[finite].astype(np.int64), num_codes=MAX_TURNS)


@dataclass(frozen=True, slots=True)
class ScoreCounts:
    """All that is counted of a column of scores. `sides` are the groups of the label: 0 rejected, 1 chosen; `turns`
    those of scores after each answer.
    """

    scores: GroupCounts
    by: Mapping[str, GroupCounts]
    sides: GroupCounts | None
    lengths: LengthCounts | None
    errors: ErrorKinds
    extremes: Extremes
    turns: GroupMoments | None = None

    def __add__(self, other: ScoreCounts) -> ScoreCounts:
        return ScoreCounts(
            self.scores + other.scores,
            {name: own + other.by[name] for name, own in self.by.items()},
            self.sides + other.sides if self.sides and other.sides else None,
            self.lengths + other.lengths if self.lengths and other.lengths else None,
            self.errors + other.errors,
            self.extremes + other.extremes,
            self.turns + other.turns if self.turns and other.turns else None,
        )


Counts = dict[str, ScoreCounts]
"""By the name of the column of scores."""


def counts_of(
    tables: Iterable[pa.Table], columns: ReportColumns, scales: Scales, *, stretch: int, num_examples: int
) -> Counts:
    """The counts of a stretch, the `stretch`-th of the corpus, whose tables have the narrow columns at least."""
    total: Counts = {}
    first_row = 0
    for table in tables:
        by = {name: codes_of(table.column(name), scales.values[name] or ()) for name in columns.by}
        sides = sides_of(table, columns)
        for column in columns.scores:
            extremes = Extremes.of(
                finite_scores(table, column.name), stretch=stretch, first_row=first_row, k=num_examples
            )
            found = _score_counts(table, column, scales, by, sides, extremes)
            total[column.name] = total[column.name] + found if column.name in total else found
        first_row += table.num_rows
    return total


def sides_of(table: pa.Table, columns: ReportColumns) -> NDArray[np.int64] | None:
    """1 for each chosen row, 0 for each rejected one, -1 for each that is neither; None without a label."""
    return label_codes(table.column(columns.label.name)) if columns.label else None


def _score_counts(
    table: pa.Table,
    column: ScoreColumn,
    scales: Scales,
    by: Mapping[str, NDArray[np.int64]],
    sides: NDArray[np.int64] | None,
    extremes: Extremes,
) -> ScoreCounts:
    scores, scale = finite_scores(table, column.name), scales.scores[column.name]
    has_score = ~np.isnan(scores)
    scored = scores[has_score]

    def grouped(codes: NDArray[np.int64], num_codes: int) -> GroupCounts:
        return GroupCounts.of(scored, scale, codes[has_score], num_codes=num_codes)

    return ScoreCounts(
        GroupCounts.of(scored, scale),
        {name: grouped(codes, len(scales.values[name] or ())) for name, codes in by.items()},
        None if sides is None else grouped(sides, 2),
        LengthCounts.of(scores, finite_scores(table, column.tokens), scale, scales.lengths[column.name])
        if column.tokens
        else None,
        ErrorKinds.of(table.filter(pa.array(~has_score)), column),
        extremes,
        turn_moments(table.column(column.turns)) if column.turns else None,
    )
