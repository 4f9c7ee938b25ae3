"""The scoring stage of candidates: all responses of a row in one pass, so that their prompt is computed once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np
import pyarrow as pa

from jobs.corpus.candidates import CandidateColumns, candidate_rows
from jobs.runs.ledger import UnitStats
from jobs.scoring.stage import (
    ATTRIBUTES,
    ConversationScorer,
    DeadRowError,
    TableScorer,
    attribute_column,
    reason_of,
    warning_counts,
)
from serve_app.reward_model import Score, ScoringError

CANDIDATE_SCORE_COLUMNS = ("scores", "best", "num_tokens", "truncated", "error")

CandidateOutcome: TypeAlias = list[Score | ScoringError] | ScoringError
"""What became of each response of a row; an error alone where the row has no responses."""


class CandidateListScorer(TableScorer[CandidateColumns, CandidateOutcome]):
    """Scores candidates: adds the `CANDIDATE_SCORE_COLUMNS` to tables, and the `ATTRIBUTES` of a model
    that has any, in lists.
    """

    def _rows(self, model: ConversationScorer, table: pa.Table) -> list[CandidateOutcome]:
        rows = candidate_rows(table, self._columns, self._system_prompt)
        scored = iter(self._outcomes(model, [candidate for row in rows if isinstance(row, list) for candidate in row]))
        return [[next(scored) for _ in row] if isinstance(row, list) else row for row in rows]

    def _given_up(self, strikes: int) -> CandidateOutcome:
        return DeadRowError.after(strikes)

    def _stats(self, outcomes: Sequence[CandidateOutcome], *, seconds: float) -> UnitStats:
        return candidate_stats(outcomes, seconds=seconds)

    def _with_columns(self, table: pa.Table, outcomes: Sequence[CandidateOutcome]) -> pa.Table:
        return candidate_columns(table, outcomes, prefix=self._prefix, attributes=self._attributes)


def candidate_stats(outcomes: Sequence[CandidateOutcome], *, seconds: float) -> UnitStats:
    """Counts of scored candidates: a row is an error where one of its responses is, or where it has none."""
    scores = [outcome for row in outcomes for outcome in _scores(row) if outcome is not None]
    counts = {
        "candidates": sum(len(row) for row in outcomes if isinstance(row, list)),
        "candidates_scored": len(scores),
        **warning_counts(scores),
    }
    errors = sum(_reason(row) is not None for row in outcomes)
    return UnitStats(len(outcomes), errors, sum(score.num_tokens for score in scores), seconds, counts=counts)


def candidates_told(counts: Mapping[str, int]) -> str:
    """What a summary says of the candidates among `counts`: nothing where there are none."""
    if not counts.get("candidates"):
        return ""
    return f"; {counts.get('candidates_scored', 0):,} of {counts['candidates']:,} candidates scored"


def candidate_columns(
    table: pa.Table, outcomes: Sequence[CandidateOutcome], *, prefix: str, attributes: Sequence[str] = ()
) -> pa.Table:
    """`table` with the `CANDIDATE_SCORE_COLUMNS` more, and with names of `attributes` the `ATTRIBUTES`.

    `scores` (float32), `num_tokens` (int32) and `truncated` (bool) are lists with an element for each response, null
    where that one failed; they are null where the row has no responses. `best` (int32) is the index of the highest
    score, of equal ones the first; null where there is none. `error` says which responses have no score, and why.
    """
    rows = [_scores(row) if isinstance(row, list) else None for row in outcomes]
    columns = {
        "scores": _lists([row and [score and score.value for score in row] for row in rows], pa.float32()),
        "best": pa.array([row and _best(row) for row in rows], pa.int32()),
        "num_tokens": _lists([row and [score and score.num_tokens for score in row] for row in rows], pa.int32()),
        "truncated": _lists([row and [score and score.truncated for score in row] for row in rows], pa.bool_()),
        "error": pa.array([_reason(row) for row in outcomes], pa.string()),
    }
    if attributes:
        each = attribute_column([score for row in rows if row for score in row], attributes)
        lengths = [0 if row is None else len(row) for row in rows]
        ends = pa.array(np.cumsum([0, *lengths]), pa.int32())
        columns[ATTRIBUTES] = pa.ListArray.from_arrays(ends, each, mask=pa.array([row is None for row in rows]))
    for name, column in columns.items():
        table = table.append_column(prefix + name, column)
    return table


def _scores(row: CandidateOutcome) -> list[Score | None]:
    return [outcome if isinstance(outcome, Score) else None for outcome in row] if isinstance(row, list) else []


def _lists(rows: Sequence[object], element: pa.DataType) -> pa.Array:
    return pa.array(rows, pa.list_(element))


def _best(row: Sequence[Score | None]) -> int | None:
    scored = [(-score.value, place) for place, score in enumerate(row) if score is not None]
    return min(scored)[1] if scored else None


def _reason(row: CandidateOutcome) -> str | None:
    """The errors of a row: each once, behind the places of the responses that have it."""
    if isinstance(row, ScoringError):
        return reason_of(row)
    places: dict[str, list[str]] = {}
    for place, outcome in enumerate(row):
        if isinstance(outcome, ScoringError):
            places.setdefault(reason_of(outcome), []).append(str(place))
    told = (f"response{'s' if len(own) > 1 else ''} {', '.join(own)}: {reason}" for reason, own in places.items())
    return "; ".join(told) or None
