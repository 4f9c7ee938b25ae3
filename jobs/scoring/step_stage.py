"""The scoring stage of answers in steps, by a process reward model: a score for each step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import pyarrow as pa

from jobs.corpus.stepped import StepColumns, stepped_rows
from jobs.runs.ledger import UnitStats
from jobs.scoring.stage import ConversationScorer, DeadRowError, TableScorer, reason_of, warning_counts
from serve_app.reward_model import ScoringError
from serve_app.reward_model.scores import Aggregate, StepScores
from serve_app.reward_model.steps import SteppedAnswer

STEP_COLUMNS = ("step_scores", "num_tokens", "error")
AGGREGATED = "score"
"""The column of what an aggregate makes of a row's steps."""

StepOutcome: TypeAlias = StepScores | ScoringError


class StepScorer(TableScorer[StepColumns, StepOutcome]):
    """Scores answers in steps: adds the `STEP_COLUMNS` to tables, and the `AGGREGATED` where there is an aggregate."""

    def __init__(self, *args: Any, aggregate: Aggregate | None = None, **options: Any) -> None:
        super().__init__(*args, **options)
        self._aggregate = aggregate

    def _rows(self, model: ConversationScorer, table: pa.Table) -> list[StepOutcome]:
        rows = stepped_rows(table, self._columns, self._system_prompt)
        able = [row for row in rows if isinstance(row, SteppedAnswer)]
        found = iter(
            model.step_outcomes(
                [row.prompt for row in able],
                [row.steps for row in able],
                max_tokens=self._max_tokens,
                strict=self._strict,
            )
        )
        return [next(found) if isinstance(row, SteppedAnswer) else row for row in rows]

    def _given_up(self, strikes: int) -> StepOutcome:
        return DeadRowError.after(strikes)

    def _stats(self, outcomes: Sequence[StepOutcome], *, seconds: float) -> UnitStats:
        scored = [outcome for outcome in outcomes if isinstance(outcome, StepScores)]
        counts = {"steps": sum(len(scores.values) for scores in scored), **warning_counts(scored)}
        tokens = sum(scores.num_tokens for scores in scored)
        return UnitStats(len(outcomes), len(outcomes) - len(scored), tokens, seconds, counts=counts)

    def _with_columns(self, table: pa.Table, outcomes: Sequence[StepOutcome]) -> pa.Table:
        """`score` (float32), where an aggregate is named, `step_scores` (list of float32), `num_tokens` (int32) and
        `error`, which says why the others are null, with the step, from 0, that has no score.
        """
        scored = [outcome if isinstance(outcome, StepScores) else None for outcome in outcomes]
        columns: dict[str, pa.Array] = {}
        if self._aggregate is not None:
            how = self._aggregate
            columns[AGGREGATED] = pa.array([scores and scores.aggregate(how) for scores in scored], pa.float32())
        columns["step_scores"] = pa.array(
            [None if scores is None else list(scores.values) for scores in scored], pa.list_(pa.float32())
        )
        columns["num_tokens"] = pa.array([scores and scores.num_tokens for scores in scored], pa.int32())
        reasons = [
            reason_of(outcome, part="step") if isinstance(outcome, ScoringError) else None for outcome in outcomes
        ]
        columns["error"] = pa.array(reasons, pa.string())
        for name, column in columns.items():
            table = table.append_column(self._prefix + name, column)
        return table


def steps_told(counts: Mapping[str, int]) -> str:
    """What a summary says of the steps among `counts`: nothing where there are none."""
    return f"; {counts['steps']:,} steps scored" if counts.get("steps") else ""
