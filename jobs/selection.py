"""Candidates and their scores -> rows: the best of each prompt, or all of them with their ranks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from jobs.generators.candidate import Candidate, Generation
from jobs.scorer import reason_of
from serve_app.reward_model import Score, ScoringError, ranking

__all__ = ["ADDED_COLUMNS", "RANK_COLUMNS", "Judged", "all_rows", "best_rows"]

ADDED_COLUMNS = {
    "response": pa.large_string(),
    "finish_reason": pa.string(),
    "score": pa.float32(),
    "num_tokens": pa.int32(),
    "truncated": pa.bool_(),
    "num_candidates": pa.int32(),
    "failures": pa.string(),
    "error": pa.string(),
}
RANK_COLUMNS = {"rank": pa.int32(), "candidate": pa.int32()}


@dataclass(frozen=True, slots=True)
class Judged:
    """A prompt with an outcome for each candidate that came, or the `error` for which none was asked for."""

    generation: Generation
    outcomes: tuple[Score | ScoringError, ...]
    error: ScoringError | None = None

    @property
    def order(self) -> list[int]:
        """Places of the candidates that have a score, the best first; of equal ones the first generated.

        The model card's own best-of-N takes `rank`'s result, which its code fills with this order, for ranks, and
        so picks another candidate than the best for most lists of three or more.
        """
        places = [place for place, outcome in enumerate(self.outcomes) if isinstance(outcome, Score)]
        scores = [outcome.value for outcome in self.outcomes if isinstance(outcome, Score)]
        return [places[at] for at in ranking.order(scores)]

    @property
    def failures(self) -> str | None:
        """Why candidates did not come or have no score, equal reasons counted: `2 of 16: HTTP 503: ...`."""
        unscored = [reason_of(outcome) for outcome in self.outcomes if isinstance(outcome, ScoringError)]
        counted = Counter([*self.generation.failures, *unscored])
        total = len(self.outcomes) + len(self.generation.failures)
        return "; ".join(f"{count} of {total}: {reason}" for reason, count in counted.items()) or None

    def row(self, place: int | None) -> dict[str, Any]:
        """The added columns of the candidate at `place`, or those of a prompt that has no response."""
        row: dict[str, Any] = dict.fromkeys([*ADDED_COLUMNS, *RANK_COLUMNS])
        row |= {"num_candidates": len(self.outcomes), "failures": self.failures}
        if place is None:
            return row | {
                "error": reason_of(self.error) if self.error else f"no candidate has a score: {self.failures}"
            }
        row |= {"candidate": place} | _texts(self.generation.candidates[place])
        outcome = self.outcomes[place]
        if isinstance(outcome, ScoringError):
            return row | {"error": reason_of(outcome)}
        return row | {"score": outcome.value, "num_tokens": outcome.num_tokens, "truncated": outcome.truncated}

    def ranked_rows(self) -> Iterator[dict[str, Any]]:
        """A row for each candidate, the best first, those without a score last; one row where none came."""
        order = self.order
        for rank, place in enumerate(order):
            yield self.row(place) | {"rank": rank}
        unscored = sorted(set(range(len(self.outcomes))) - set(order))
        yield from (self.row(place) for place in unscored)
        if not self.outcomes:
            yield self.row(None)


def _texts(candidate: Candidate) -> dict[str, Any]:
    return {"response": candidate.text, "finish_reason": candidate.finish_reason}


def best_rows(table: pa.Table, judged: Sequence[Judged], *, prefix: str) -> pa.Table:
    """`table` with the best response of each prompt: `ADDED_COLUMNS`, where there is none null but for `error`."""
    rows = [one.row(next(iter(one.order), None)) for one in judged]
    return _with_columns(table, rows, ADDED_COLUMNS, prefix)


def all_rows(table: pa.Table, judged: Sequence[Judged], *, prefix: str) -> pa.Table:
    """The rows of `table` repeated for each candidate, the best first: `ADDED_COLUMNS`, `rank` (0 is the best) and
    `candidate` (its place in the order of generation). A prompt without candidates keeps one row.
    """
    ranked = [list(one.ranked_rows()) for one in judged]
    sources = [place for place, rows in enumerate(ranked) for _ in rows]
    repeated = table.take(pa.array(sources, pa.int64()))
    return _with_columns(repeated, [row for rows in ranked for row in rows], ADDED_COLUMNS | RANK_COLUMNS, prefix)


def _with_columns(
    table: pa.Table, rows: Sequence[dict[str, Any]], kinds: dict[str, pa.DataType], prefix: str
) -> pa.Table:
    for name, kind in kinds.items():
        table = table.append_column(prefix + name, pa.array([row[name] for row in rows], kind))
    return table
