"""The scoring stage: a Ray Data actor that loads the model once and adds scores to units."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pyarrow as pa

from jobs.attempts import AttemptLog, Attempts
from jobs.columns import ConversationColumns, conversations
from jobs.corpus import Unit
from jobs.errors import ScorerError
from jobs.ledger import Ledger, UnitStats
from serve_app.reward_model import RewardModel, Score, ScoringError
from serve_app.reward_model.conversation import Conversation
from serve_app.reward_model.errors import ConversationError
from serve_app.reward_model.tokenizer import Truncation

__all__ = ["DeadRowError", "ModelSource", "UnitScorer", "score_columns"]


class DeadRowError(ScoringError):
    """The scoring process died on this row alone."""


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Which model the actors load and how; `fingerprint` is that of the files the driver planned with."""

    model: str
    revision: str | None
    fingerprint: str
    device: str
    dtype: str
    token_budget: int | None
    num_threads: int

    def load(self) -> RewardModel:
        """Load the model on this worker.

        Raises:
            ScorerError: the worker's copy of the model is not the driver's.
        """
        import torch

        torch.set_num_threads(self.num_threads)
        model = RewardModel.from_pretrained(
            self.model,
            revision=self.revision,
            device=self.device,
            dtype=self.dtype,
            token_budget=self.token_budget or "auto",
        )
        if model.fingerprint != self.fingerprint:
            raise ScorerError(
                f"the files of {self.model} on worker {os.uname().nodename} are not those on the driver "
                f"({model.fingerprint} there, {self.fingerprint} here); give a --revision or a shared folder"
            )
        return model


class UnitScorer:
    """Scores units: adds `score`, `num_tokens`, `truncated` and `error` to their tables.

    `load` makes the model. It runs with the first unit, inside that unit's attempt, so that a process which dies
    while loading is noticed like one that dies while scoring.
    """

    def __init__(
        self,
        load: Callable[[], RewardModel],
        ledger: Ledger,
        *,
        run: str,
        columns: ConversationColumns,
        truncation: Truncation,
        max_tokens: int | None,
        prefix: str,
    ) -> None:
        self._load = load
        self._model: RewardModel | None = None
        self._ledger = ledger
        self._run = run
        self._columns = columns
        self._truncation = truncation
        self._max_tokens = max_tokens
        self._prefix = prefix

    def score(self, unit: Unit, table: pa.Table) -> tuple[pa.Table, UnitStats]:
        """The unit's table with its scores, in input order, and its counts.

        Raises:
            RaywardError: the model cannot be loaded, or scoring fails in a way that is no row's fault.
        """
        log = AttemptLog(self._ledger.filesystem, f"{self._ledger.folder}/_attempts/{unit.id}.json", run=self._run)
        noted = log.read()
        attempts = noted.after_death() if noted else Attempts.of(table.num_rows)
        model = self._loaded(log, attempts)
        started = time.perf_counter()
        rows = conversations(table, self._columns)
        outcomes = self._outcomes(model, rows, attempts, log)
        seconds = time.perf_counter() - started
        log.remove()
        tokens = sum(outcome.num_tokens for outcome in outcomes if isinstance(outcome, Score))
        errors = sum(isinstance(outcome, ScoringError) for outcome in outcomes)
        return score_columns(table, outcomes, prefix=self._prefix), UnitStats(len(outcomes), errors, tokens, seconds)

    def _loaded(self, log: AttemptLog, attempts: Attempts) -> RewardModel:
        if self._model is None:
            attempts.loading = True
            log.write(attempts)
            self._model = self._load()
            attempts.loading = False
        return self._model

    def _outcomes(
        self,
        model: RewardModel,
        rows: Sequence[Conversation | ConversationError],
        attempts: Attempts,
        log: AttemptLog,
    ) -> list[Score | ScoringError]:
        """The outcome of each row, in row order. Rows with the same prompt are scored beside each other."""
        outcomes: list[Score | ScoringError | None] = [row if isinstance(row, ScoringError) else None for row in rows]
        order = _prompts_together(rows)
        for position in attempts.given_up:
            strikes = attempts.strikes[position]
            outcomes[order[position]] = DeadRowError(f"the scoring process died {strikes} times on this row alone")
        for index, (first, stop) in enumerate(attempts.ranges):
            attempts.current = index
            log.write(attempts)
            ready = [(number, row) for number in order[first:stop] if isinstance(row := rows[number], Conversation)]
            scored = model.outcomes([row for _, row in ready], truncation=self._truncation, max_tokens=self._max_tokens)
            for (number, _), outcome in zip(ready, scored, strict=True):
                outcomes[number] = outcome
        return [outcome for outcome in outcomes if outcome is not None]


def _prompts_together(rows: Sequence[Conversation | ConversationError]) -> list[int]:
    """Row numbers, those with equal prompts in a row, in order of first appearance."""
    groups: dict[object, list[int]] = {}
    for number, row in enumerate(rows):
        groups.setdefault(row.prompt if isinstance(row, Conversation) else number, []).append(number)
    return [number for group in groups.values() for number in group]


def score_columns(table: pa.Table, outcomes: Sequence[Score | ScoringError], *, prefix: str) -> pa.Table:
    """`table` with four columns more: float32 `score`, int32 `num_tokens`, bool `truncated` and string `error`.

    A row that could not be scored has the reason in `error`, and null in the other three.
    """
    scores = [outcome if isinstance(outcome, Score) else None for outcome in outcomes]
    reasons = [_reason(outcome) if isinstance(outcome, ScoringError) else None for outcome in outcomes]
    columns = {
        "score": pa.array([score and score.value for score in scores], pa.float32()),
        "num_tokens": pa.array([score and score.num_tokens for score in scores], pa.int32()),
        "truncated": pa.array([score and score.truncated for score in scores], pa.bool_()),
        "error": pa.array(reasons, pa.string()),
    }
    for name, column in columns.items():
        table = table.append_column(prefix + name, column)
    return table


def _reason(error: ScoringError) -> str:
    error.index = None  # its place in a list that the corpus does not know
    return f"{type(error).__name__}: {error}"
