"""The first look at a corpus: how far its scores and lengths reach, and which values its columns of few values have.

    extents (of each stretch) -> scales (of the corpus), on which everything else is counted

Counts over bins can be added where the bins are known beforehand. So narrow columns are read once for the bins, and
once more to count.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from jobs.corpus.turns import cells
from jobs.errors import CorpusError
from jobs.grouping.quantiles import ScoreSummary, quantiles
from jobs.grouping.ranks import scores_of
from jobs.reporting.columns import ReportColumns
from jobs.reporting.stats import Axis
from serve_app.reward_model.errors import ConversationError

MAX_VALUES = 200
NO_VALUE = "(none)"
UNREADABLE = "(not valid UTF-8)"
LABELS = {"chosen": 1, "true": 1, "1": 1, "rejected": 0, "false": 0, "0": 0}


def values_of(column: pa.ChunkedArray) -> frozenset[str]:
    """The distinct values as text, `(none)` for null; some `MAX_VALUES + 1` of them where there are more."""
    unique = pc.cast(column, pa.large_string()).unique()
    return frozenset(_named(value) for value in _readable(unique.slice(0, MAX_VALUES + 1)))


def codes_of(column: pa.ChunkedArray, values: Sequence[str]) -> NDArray[np.int64]:
    """The place in `values` of each row's value."""
    places = {value: place for place, value in enumerate(values)}
    encoded, known = _encoded(column)
    return np.array([*(places[_named(value)] for value in known), places.get(NO_VALUE, -1)], np.int64)[encoded]


def label_codes(column: pa.ChunkedArray) -> NDArray[np.int64]:
    """1 for what was preferred, 0 for what was not, -1 where the row has no label; values are as in `LABELS`."""
    encoded, known = _encoded(column)
    return np.array([*(LABELS[value.casefold()] for value in known), -1], np.int64)[encoded]


def _encoded(column: pa.ChunkedArray) -> tuple[NDArray[np.int64], list[str]]:
    """The place of each row's value in the list of distinct ones, which null stands behind."""
    text = pa.concat_arrays([pa.array([], pa.large_string()), *pc.cast(column, pa.large_string()).chunks])
    encoded = text.dictionary_encode()
    known = [value for value in _readable(encoded.dictionary) if value is not None]
    assert len(known) == len(encoded.dictionary)
    return encoded.indices.fill_null(len(known)).to_numpy(zero_copy_only=False).astype(np.int64), known


def _readable(values: pa.Array) -> list[str | None]:
    """The texts of an array; those that are not UTF-8 have one name in common."""
    found = cells(pa.chunked_array([values]))
    return [UNREADABLE if isinstance(value, ConversationError) else value for value in found]


def _named(value: str | None) -> str:
    return NO_VALUE if value is None else value


LOG_FROM_RATIO = 8.0
OUTLIER_STRETCH = 1.5
LENGTH_SHARES = 10
MAX_LENGTH_BINS = 40


@dataclass(frozen=True, slots=True)
class Extents:
    """Extents of a stretch: quantiles of its scores by column, those of the scores and of the token counts of the rows
    that have both, and the values of its groups."""

    num_rows: int
    scores: Mapping[str, ScoreSummary]
    lengths: Mapping[str, tuple[ScoreSummary, ScoreSummary]]
    values: Mapping[str, frozenset[str]]

    @classmethod
    def of(cls, tables: Iterable[pa.Table], columns: ReportColumns) -> Extents:
        """Extents of a stretch, whose tables have the narrow columns at least."""
        names = {name for score in columns.scores for name in (score.name, score.tokens) if name}
        grouping = {*columns.by, *([columns.label.name] if columns.label else [])}
        found: dict[str, list[NDArray[np.float32]]] = {name: [np.empty(0, np.float32)] for name in names}
        values: dict[str, frozenset[str]] = dict.fromkeys(grouping, frozenset())
        num_rows = 0
        for table in tables:
            num_rows += table.num_rows
            for name, parts in found.items():
                parts.append(finite_scores(table, name))
            for name in grouping:
                if len(values[name]) <= MAX_VALUES:
                    values[name] |= values_of(table.column(name))
        numbers = {name: np.concatenate(parts) for name, parts in found.items()}
        lengths = {}
        for score in columns.scores:
            if score.tokens:
                both = has_both(numbers[score.name], numbers[score.tokens])
                lengths[score.name] = (
                    ScoreSummary.of(numbers[score.name][both]),
                    ScoreSummary.of(numbers[score.tokens][both]),
                )
        scores = {score.name: ScoreSummary.of(numbers[score.name]) for score in columns.scores}
        return cls(num_rows, scores, lengths, values)


@dataclass(frozen=True, slots=True)
class MidRanks:
    """The share of values that are below a value, equal ones counted by half: what Spearman correlates.

    `points` are in order; `below` has the share before each, and 1 at the end.
    """

    points: NDArray[np.float32]
    below: NDArray[np.float64]

    @classmethod
    def of(cls, summaries: Sequence[ScoreSummary]) -> MidRanks:
        """Mid-ranks of all values of the summaries: exact where none of them is shortened."""
        points = np.concatenate([np.empty(0, np.float32), *(summary.points for summary in summaries)])
        weights = np.concatenate([np.empty(0, np.int64), *(summary.weights for summary in summaries)])
        order = np.argsort(points, kind="stable")
        below = np.concatenate([[0.0], np.cumsum(weights[order])])
        return cls(points[order], below / max(below[-1], 1))

    def __call__(self, values: NDArray[np.float32]) -> NDArray[np.float64]:
        first = self.below[np.searchsorted(self.points, values, side="left")]
        last = self.below[np.searchsorted(self.points, values, side="right")]
        ranks: NDArray[np.float64] = (first + last) / 2
        return ranks


@dataclass(frozen=True, slots=True)
class ScoreScale:
    """The axis on which a column's scores are counted, and their quantiles by share (empty without scores)."""

    axis: Axis
    quantiles: Mapping[str, float]

    @classmethod
    def of(cls, summaries: Sequence[ScoreSummary]) -> ScoreScale:
        found = quantiles(summaries)
        return cls(Axis(*_reach(found)), found)

    def margins(self, other: ScoreScale) -> Axis:
        """The axis of differences between a score of this scale and one of the other."""
        span = max(self.axis.high, other.axis.high) - min(self.axis.low, other.axis.low)
        return Axis(-span, span)


@dataclass(frozen=True, slots=True)
class LengthScale:
    """Bins of token counts, for a map and in shares of equally many rows (by their inner edges), and the ranks of the
    scores and token counts of rows that have both."""

    axis: Axis
    share_edges: NDArray[np.float32]
    score_ranks: MidRanks
    ranks: MidRanks

    @classmethod
    def of(cls, scores: Sequence[ScoreSummary], tokens: Sequence[ScoreSummary]) -> LengthScale:
        found = quantiles(tokens)
        ranks = MidRanks.of(tokens)
        low, high = _reach(found)
        low = max(low, found.get("0", 1.0), 1.0)
        high = max(high, low + 1)
        total = sum(int(summary.weights.sum()) for summary in tokens)
        num_bins = int(np.clip(np.sqrt(total) / 1.5, 8, MAX_LENGTH_BINS))
        axis = Axis(low, high, num_bins, is_log=high / low > LOG_FROM_RATIO)
        return cls(axis, _share_edges(ranks, total), MidRanks.of(scores), ranks)


@dataclass(frozen=True, slots=True)
class Scales:
    """Scales of a corpus, known before it is counted: scales by column of scores, lengths where these are known, and
    the sorted values of columns of groups, None where they are too many."""

    num_rows: int
    scores: Mapping[str, ScoreScale]
    lengths: Mapping[str, LengthScale]
    values: Mapping[str, tuple[str, ...] | None]

    @classmethod
    def of(cls, parts: Sequence[Extents]) -> Scales:
        """Scales of a corpus, from the extents of its stretches."""
        values = {name: frozenset[str]().union(*(part.values[name] for part in parts)) for name in parts[0].values}
        return cls(
            sum(part.num_rows for part in parts),
            {name: ScoreScale.of([part.scores[name] for part in parts]) for name in parts[0].scores},
            {
                name: LengthScale.of(*zip(*(part.lengths[name] for part in parts), strict=True))
                for name in parts[0].lengths
            },
            {name: tuple(sorted(found)) if len(found) <= MAX_VALUES else None for name, found in values.items()},
        )


def settled(columns: ReportColumns, scales: Scales) -> tuple[ReportColumns, list[str]]:
    """The columns without those that were guessed and prove unfit, and why each of these is.

    Raises:
        CorpusError: one that was named is unfit.
    """
    groups = {name: reason for name in columns.by if (reason := _unfit_group(name, scales))}
    label = _unfit_label(columns.label.name, scales) if columns.label else None
    if groups and not columns.guessed_by:
        raise CorpusError(next(iter(groups.values())))
    if label and not columns.guessed_label:
        raise CorpusError(label)
    by = tuple(name for name in columns.by if name not in groups)
    kept = replace(columns, by=by, label=None if label else columns.label)
    return kept, [*groups.values(), *([label] if label else [])]


def finite_scores(table: pa.Table, name: str) -> NDArray[np.float32]:
    """A column's numbers: NaN where there is none, or an infinite one."""
    scores = scores_of(table, name)
    return np.where(np.isfinite(scores), scores, np.float32(np.nan))


def has_both(scores: NDArray[np.float32], tokens: NDArray[np.float32]) -> NDArray[np.bool_]:
    """A mask of the rows that have a score and a length."""
    both: NDArray[np.bool_] = ~np.isnan(scores) & (tokens > 0)
    return both


def _unfit_group(name: str, scales: Scales) -> str | None:
    if scales.values[name] is None:
        return f"column {name!r} has more than {MAX_VALUES} values; --by is for domains, languages and the like"
    return None


def _unfit_label(name: str, scales: Scales) -> str | None:
    values = scales.values[name]
    if values is not None and all(value == "(none)" or value.casefold() in LABELS for value in values):
        return None if set(values) - {"(none)"} else f"column {name!r} has no values, so there are no labels"
    shown = "more than can be listed" if values is None else ", ".join(values[:5])
    return f"column {name!r} has the values {shown}; labels are booleans, 1 and 0, or 'chosen' and 'rejected'"


def _reach(found: Mapping[str, float]) -> tuple[float, float]:
    """From where to where an axis goes: all values, or nearly all where a few lie far out."""
    if not found:
        return 0.0, 1.0
    low, high = found["0"], found["1"]
    inner = found["0.99"] - found["0.01"]
    if inner > 0:
        low = max(low, found["0.01"] - OUTLIER_STRETCH * inner)
        high = min(high, found["0.99"] + OUTLIER_STRETCH * inner)
    if high > low:
        return low, high
    return low - 0.5, low + 0.5  # all values are one


def _share_edges(ranks: MidRanks, total: int) -> NDArray[np.float32]:
    """Where to cut values so that each share has about equally many, of some 8 or more."""
    shares = int(np.clip(total // 8, 1, LENGTH_SHARES))
    places = np.searchsorted(ranks.below[1:], np.arange(1, shares) / shares)
    return np.unique(ranks.points[places]) if len(ranks.points) else np.empty(0, np.float32)
