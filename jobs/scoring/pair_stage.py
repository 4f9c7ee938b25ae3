"""The scoring stage of pairs: both sides of each row in one pass, so that their prompt is computed once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np
import pyarrow as pa

from jobs.corpus.preferences import PreferenceColumns, preference_pairs
from jobs.intervals import interval
from jobs.runs.ledger import UnitStats
from jobs.scoring.stage import (
    ConversationScorer,
    DeadRowError,
    TableScorer,
    attribute_column,
    reason_of,
    warning_counts,
)
from serve_app.reward_model import Score, ScoringError

PAIR_SCORE_COLUMNS = (
    "chosen_score",
    "rejected_score",
    "margin",
    "chosen_num_tokens",
    "rejected_num_tokens",
    "truncated",
    "error",
)
PAIR_ATTRIBUTES = ("chosen_attributes", "rejected_attributes")
"""The columns of what a gating head gives beside the two scores: each a struct with a float32 for each name."""

PairOutcome: TypeAlias = tuple[Score | ScoringError, Score | ScoringError]
"""What became of the chosen and of the rejected side."""


class PairScorer(TableScorer[PreferenceColumns, PairOutcome]):
    """Scores pairs: adds the `PAIR_SCORE_COLUMNS` to tables, and the `PAIR_ATTRIBUTES` where the model
    has attributes.
    """

    def _rows(self, model: ConversationScorer, table: pa.Table) -> list[PairOutcome]:
        sides = [side for row in preference_pairs(table, self._columns, self._system_prompt) for side in row]
        outcomes = self._outcomes(model, sides)
        return list(zip(outcomes[::2], outcomes[1::2], strict=True))

    def _given_up(self, strikes: int) -> PairOutcome:
        return DeadRowError.after(strikes), DeadRowError.after(strikes)

    def _stats(self, outcomes: Sequence[PairOutcome], *, seconds: float) -> UnitStats:
        return pair_stats(outcomes, seconds=seconds)

    def _with_columns(self, table: pa.Table, outcomes: Sequence[PairOutcome]) -> pa.Table:
        return pair_columns(table, outcomes, prefix=self._prefix, attributes=self._attributes)


def pair_stats(outcomes: Sequence[PairOutcome], *, seconds: float) -> UnitStats:
    """Counts of scored pairs: a row is an error where a side of it is; `pairs_tied` have equal scores."""
    scores = [outcome for row in outcomes for outcome in row if isinstance(outcome, Score)]
    whole = [
        (chosen.value, rejected.value)
        for chosen, rejected in outcomes
        if isinstance(chosen, Score) and isinstance(rejected, Score)
    ]
    counts = {
        "pairs": len(whole),
        "pairs_right": sum(chosen > rejected for chosen, rejected in whole),
        "pairs_tied": sum(chosen == rejected for chosen, rejected in whole),
        **warning_counts(scores),
    }
    tokens = sum(score.num_tokens for score in scores)
    return UnitStats(len(outcomes), len(outcomes) - len(whole), tokens, seconds, counts=counts)


def accuracy_told(counts: Mapping[str, int]) -> str:
    """What a summary says of the pairs among `counts`: nothing where there are none. A tie counts as half right."""
    pairs, tied = counts.get("pairs", 0), counts.get("pairs_tied", 0)
    if not pairs:
        return ""
    right = counts.get("pairs_right", 0) + tied / 2
    low, high = interval(right, pairs)
    ties = f", {tied:,} ties as half" if tied else ""
    return (
        f"; accuracy {right / pairs:.1%} of {pairs:,} pairs (95 % interval {float(low):.1%} to {float(high):.1%}{ties})"
    )


def pair_columns(
    table: pa.Table, outcomes: Sequence[PairOutcome], *, prefix: str, attributes: Sequence[str] = ()
) -> pa.Table:
    """`table` with the `PAIR_SCORE_COLUMNS` more, and with names of `attributes` the `PAIR_ATTRIBUTES`.

    Scores and the margin (chosen minus rejected) are float32, numbers of tokens int32. `truncated` says whether a side
    was shortened, `error` why one has no score. A side that could be scored keeps its score beside the other's error.
    """
    chosen, rejected = (
        [side if isinstance(side, Score) else None for side in sides]
        for sides in (zip(*outcomes, strict=True) if outcomes else ((), ()))
    )
    pairs = list(zip(chosen, rejected, strict=True))
    margins = [np.float32(one.value) - np.float32(two.value) if one and two else None for one, two in pairs]
    columns = {
        "chosen_score": pa.array([score and score.value for score in chosen], pa.float32()),
        "rejected_score": pa.array([score and score.value for score in rejected], pa.float32()),
        "margin": pa.array(margins, pa.float32()),
        "chosen_num_tokens": pa.array([score and score.num_tokens for score in chosen], pa.int32()),
        "rejected_num_tokens": pa.array([score and score.num_tokens for score in rejected], pa.int32()),
        "truncated": pa.array(
            [one.truncated or two.truncated if one and two else None for one, two in pairs], pa.bool_()
        ),
        "error": pa.array([_reason(row) for row in outcomes], pa.string()),
    }
    if attributes:
        columns |= zip(
            PAIR_ATTRIBUTES, (attribute_column(side, attributes) for side in (chosen, rejected)), strict=True
        )
    for name, column in columns.items():
        table = table.append_column(prefix + name, column)
    return table


def _reason(outcome: PairOutcome) -> str | None:
    """The error of each side by its name; once where both have the same."""
    told = {
        name: reason_of(side)
        for name, side in zip(("chosen", "rejected"), outcome, strict=True)
        if isinstance(side, ScoringError)
    }
    if len(told) == 2 and told["chosen"] == told["rejected"]:
        return f"both: {told['chosen']}"
    return "; ".join(f"{name}: {reason}" for name, reason in told.items()) or None
