"""The scoring stage of every turn: a conversation's score, and the one it had after each of its answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TypeAlias

import pyarrow as pa

from jobs.corpus.conversations import ConversationColumns, conversations
from jobs.runs.ledger import UnitStats
from jobs.scoring.stage import (
    ConversationScorer,
    DeadRowError,
    TableScorer,
    reason_of,
    score_columns,
    warning_counts,
)
from serve_app.reward_model import Score, ScoringError
from serve_app.reward_model.turn_list import TurnList

TURN_COLUMNS = ("turn_scores", "turn_tokens")

TurnOutcome: TypeAlias = list[Score] | ScoringError
"""The scores of a row's turns, then that of its whole conversation; or the error of the first that has none."""


class TurnScorer(TableScorer[ConversationColumns, TurnOutcome]):
    """Scores conversations after each answer: adds the `SCORE_COLUMNS` and the `TURN_COLUMNS` to tables, and the
    `ATTRIBUTES` of a model that has any.
    """

    def _rows(self, model: ConversationScorer, table: pa.Table) -> list[TurnOutcome]:
        turns = TurnList.of(conversations(table, self._columns, self._system_prompt), with_whole=True)
        return turns.scored(self._outcomes(model, turns.flat))

    def _given_up(self, strikes: int) -> TurnOutcome:
        return DeadRowError.after(strikes)

    def _stats(self, outcomes: Sequence[TurnOutcome], *, seconds: float) -> UnitStats:
        """Tokens are those of whole conversations, which their turns begin."""
        scored = [row for row in outcomes if isinstance(row, list)]
        counts = {"turns": sum(len(row) - 1 for row in scored), **warning_counts([_told(row) for row in scored])}
        tokens = sum(row[-1].num_tokens for row in scored)
        return UnitStats(len(outcomes), len(outcomes) - len(scored), tokens, seconds, counts=counts)

    def _with_columns(self, table: pa.Table, outcomes: Sequence[TurnOutcome]) -> pa.Table:
        return turn_columns(table, outcomes, prefix=self._prefix, attributes=self._attributes)


def turn_columns(
    table: pa.Table, outcomes: Sequence[TurnOutcome], *, prefix: str, attributes: Sequence[str] = ()
) -> pa.Table:
    """`table` with the columns of `score_columns`, and the `TURN_COLUMNS` behind them.

    `turn_scores` (float32) and `turn_tokens` (int32) are lists with an element for each message of the assistant's, in
    order: the score of the conversation up to it, and its number of tokens. `truncated` is true where a turn was. A row
    that has an error has null in both; it names the turn, from 0.
    """
    wholes = [row if isinstance(row, ScoringError) else _told(row) for row in outcomes]
    reasons = [reason_of(row, part="turn") if isinstance(row, ScoringError) else None for row in outcomes]
    table = score_columns(table, wholes, prefix=prefix, attributes=attributes, reasons=reasons)
    rows = [None if isinstance(row, ScoringError) else row[:-1] for row in outcomes]
    columns = {
        "turn_scores": pa.array([_each(row, lambda turn: turn.value) for row in rows], pa.list_(pa.float32())),
        "turn_tokens": pa.array([_each(row, lambda turn: turn.num_tokens) for row in rows], pa.list_(pa.int32())),
    }
    for name, column in columns.items():
        table = table.append_column(prefix + name, column)
    return table


def _each(row: Sequence[Score] | None, read: Callable[[Score], float]) -> list[float] | None:
    return None if row is None else [read(turn) for turn in row]


def _told(row: Sequence[Score]) -> Score:
    """The score of the whole conversation, with what was found of any of its turns."""
    warnings = dict.fromkeys(warning for score in row for warning in score.warnings)
    return replace(row[-1], truncated=any(score.truncated for score in row), warnings=tuple(warnings))


def turns_told(counts: Mapping[str, int]) -> str:
    """What a summary says of the turns among `counts`: nothing where there are none."""
    return f"; {counts['turns']:,} turns scored" if counts.get("turns") else ""
