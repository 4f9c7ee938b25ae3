"""The scoring stage: a Ray Data actor that loads the model once and adds scores to units."""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Generic, Protocol, TypeVar

import pyarrow as pa

from jobs.corpus.conversations import ConversationColumns, SystemPrompt, conversations
from jobs.corpus.files import Unit
from jobs.runs.attempts import GuardedModel, UnitAttempt
from jobs.runs.ledger import Ledger, UnitStats
from jobs.scoring.remembered import write_scores
from jobs.scoring.score_memory import memory_of
from serve_app.reward_model import Score, ScoringError
from serve_app.reward_model.conversation import WARNING_KINDS, Conversation
from serve_app.reward_model.errors import ConversationError
from serve_app.reward_model.scores import StepScores
from serve_app.reward_model.tokenizer import Truncation

SCORE_COLUMNS = ("score", "num_tokens", "truncated", "error")
ATTRIBUTES = "attributes"
"""The column of what a gating head gives beside the score: a struct with a float32 for each name."""

Columns = TypeVar("Columns")
Outcome = TypeVar("Outcome")


class DeadRowError(ScoringError):
    """The scoring process died on this row alone."""

    @classmethod
    def after(cls, strikes: int) -> DeadRowError:
        """The error of a row on which it died so many times."""
        return cls(f"the scoring process died {strikes} times on this row alone")


class ConversationScorer(Protocol):
    """A scorer of conversations: a `RewardModel` in this process, or a `ServedModel` elsewhere."""

    @property
    def processors(self) -> tuple[str, ...]:
        """The kinds of processors that scores were computed on so far; usually one."""
        ...

    def outcomes(
        self, conversations: Sequence[Conversation], *, truncation: Truncation, max_tokens: int | None, strict: bool
    ) -> Sequence[Score | ScoringError]:
        """The score of each conversation, in order, or the error that it alone has."""
        ...

    def step_outcomes(
        self,
        conversations: Sequence[Conversation],
        steps: Sequence[Sequence[str]],
        *,
        max_tokens: int | None,
        strict: bool,
    ) -> Sequence[StepScores | ScoringError]:
        """The scores of each answer's steps, in order, or the error that it alone has."""
        ...


class _Reach:
    """How far an attempt at a unit is: rows, as the share of their conversations that are scored."""

    def __init__(self, attempt: UnitAttempt[ConversationScorer]) -> None:
        self._attempt = attempt
        self.begin(0, 0)

    def begin(self, first: int, stop: int) -> None:
        """A range of rows is begun."""
        self._first, self._num_rows, self._expected, self._scored = first, stop - first, 0, 0

    def expect(self, num_conversations: int) -> None:
        """The range holds so many conversations."""
        self._expected = num_conversations

    def tell(self, num_scored: int, num_tokens: int) -> None:
        """So many more are scored, for which the model read so many tokens."""
        self._scored += num_scored
        share = min(1.0, self._scored / max(1, self._expected))
        self._attempt.guard.tell_inside(self._first + share * self._num_rows, num_tokens)


class TableScorer(ABC, Generic[Columns, Outcome]):
    """A stage that scores tables: columns, the system prompt, limits, and the prefix of what it adds. What rows are,
    and what becomes of them, its classes say.

    `attributes` are the names of those that the model gives beside a score.
    `load` makes the model, whose process may die on some rows. Without a `ledger` to note that in, tables can be scored
    with a model that is given, and units cannot.
    """

    def __init__(
        self,
        load: Callable[[], ConversationScorer],
        ledger: Ledger | None,
        *,
        columns: Columns,
        system_prompt: SystemPrompt,
        truncation: Truncation,
        max_tokens: int | None,
        prefix: str,
        strict: bool = False,
        attributes: Sequence[str] = (),
    ) -> None:
        self._ledger = ledger
        self._guarded = None if ledger is None else GuardedModel(load, ledger)
        self._columns = columns
        self._system_prompt = system_prompt
        self._truncation = truncation
        self._max_tokens = max_tokens
        self._prefix = prefix
        self._strict = strict
        self._attributes = attributes
        self._threads = threading.local()

    def process(self, unit: Unit, table: pa.Table) -> tuple[pa.Table, UnitStats]:
        """The unit's table with the scores of its rows, in input order, and its counts.

        Raises:
            RaywardError: the model cannot be loaded, or scoring fails in a way that is no row's fault.
        """
        assert self._guarded is not None, "units need a ledger"
        attempt = self._guarded.begin(unit, table.num_rows)
        memory = memory_of(attempt.model)
        reach = _Reach(attempt)
        if memory is None:
            scored, stats = self._attempted(attempt, reach, table)
            return scored, replace(stats, processors=attempt.model.processors)
        with memory.unit(reach.tell) as scores:
            scored, stats = self._attempted(attempt, reach, table)
        assert self._ledger is not None
        write_scores(self._ledger, unit, scores.table())
        counts = {**stats.counts, **scores.counts}
        return scored, replace(stats, counts=counts, processors=attempt.model.processors)

    def _attempted(
        self, attempt: UnitAttempt[ConversationScorer], reach: _Reach, table: pa.Table
    ) -> tuple[pa.Table, UnitStats]:
        started = time.perf_counter()

        def work(model: ConversationScorer, first: int, stop: int) -> list[Outcome]:
            self._threads.reach = reach
            reach.begin(first, stop)
            return self._rows(model, table.slice(first, stop - first))

        outcomes = attempt.results(work, given_up=self._given_up)
        stats = self._stats(outcomes, seconds=time.perf_counter() - started)
        return self._with_columns(table, outcomes), stats

    def scored(self, model: ConversationScorer, table: pa.Table) -> pa.Table:
        """A table with the scores of its rows, in order; a row that has none carries its error."""
        return self._with_columns(table, self._rows(model, table))

    @abstractmethod
    def _rows(self, model: ConversationScorer, table: pa.Table) -> list[Outcome]:
        """What becomes of each row, in order."""

    @abstractmethod
    def _given_up(self, strikes: int) -> Outcome:
        """What becomes of a row on which the process died so many times."""

    @abstractmethod
    def _stats(self, outcomes: Sequence[Outcome], *, seconds: float) -> UnitStats:
        """Counts of a unit's rows."""

    @abstractmethod
    def _with_columns(self, table: pa.Table, outcomes: Sequence[Outcome]) -> pa.Table:
        """The table with the columns of its outcomes."""

    def _outcomes(
        self, model: ConversationScorer, rows: Sequence[Conversation | ConversationError]
    ) -> list[Score | ScoringError]:
        reach: _Reach | None = getattr(self._threads, "reach", None)
        if reach is not None:
            reach.expect(sum(isinstance(row, Conversation) for row in rows))
        return outcomes_of(model, rows, truncation=self._truncation, max_tokens=self._max_tokens, strict=self._strict)


class UnitScorer(TableScorer[ConversationColumns, Score | ScoringError]):
    """Scores conversations: adds the `SCORE_COLUMNS` to tables, and the `ATTRIBUTES` of a model that has any."""

    def _rows(self, model: ConversationScorer, table: pa.Table) -> list[Score | ScoringError]:
        return self._outcomes(model, conversations(table, self._columns, self._system_prompt))

    def _given_up(self, strikes: int) -> Score | ScoringError:
        return DeadRowError.after(strikes)

    def _stats(self, outcomes: Sequence[Score | ScoringError], *, seconds: float) -> UnitStats:
        tokens = sum(outcome.num_tokens for outcome in outcomes if isinstance(outcome, Score))
        errors = sum(isinstance(outcome, ScoringError) for outcome in outcomes)
        return UnitStats(len(outcomes), errors, tokens, seconds, counts=warning_counts(outcomes))

    def _with_columns(self, table: pa.Table, outcomes: Sequence[Score | ScoringError]) -> pa.Table:
        return score_columns(table, outcomes, prefix=self._prefix, attributes=self._attributes)


def outcomes_of(
    model: ConversationScorer,
    rows: Sequence[Conversation | ConversationError],
    *,
    truncation: Truncation,
    max_tokens: int | None,
    strict: bool = False,
) -> list[Score | ScoringError]:
    """The outcome of each conversation, in order; what is no conversation keeps its error."""
    ready = [row for row in rows if isinstance(row, Conversation)]
    scored = iter(model.outcomes(ready, truncation=truncation, max_tokens=max_tokens, strict=strict))
    return [next(scored) if isinstance(row, Conversation) else row for row in rows]


def warning_counts(outcomes: Sequence[Score | StepScores | ScoringError]) -> dict[str, int]:
    """How many scores carry a warning, by its kind; kinds that none carries are left out."""
    scores = [outcome for outcome in outcomes if not isinstance(outcome, ScoringError)]
    return dict(Counter(warning.partition(":")[0] for score in scores for warning in score.warnings))


def warnings_told(counts: Mapping[str, int]) -> str:
    """What a summary says of `warning_counts` among `counts`: nothing where there are none."""
    found = [f"{counts[kind]:,} {kind}" for kind in WARNING_KINDS if counts.get(kind)]
    return f"; warnings: {', '.join(found)} (--strict makes them errors)" if found else ""


def score_columns(
    table: pa.Table,
    outcomes: Sequence[Score | ScoringError],
    *,
    prefix: str,
    attributes: Sequence[str] = (),
    reasons: Sequence[str | None] | None = None,
) -> pa.Table:
    """`table` with four columns more: float32 `score`, int32 `num_tokens`, bool `truncated` and string `error`.

    With names of `attributes` there is a fifth. A row that could not be scored has the reason in `error`, and null in
    the others; `reasons` are those of errors whose text does not say enough.
    """
    scores = [outcome if isinstance(outcome, Score) else None for outcome in outcomes]
    if reasons is None:
        reasons = [reason_of(outcome) if isinstance(outcome, ScoringError) else None for outcome in outcomes]
    columns = {
        "score": pa.array([score and score.value for score in scores], pa.float32()),
        "num_tokens": pa.array([score and score.num_tokens for score in scores], pa.int32()),
        "truncated": pa.array([score and score.truncated for score in scores], pa.bool_()),
        "error": pa.array(reasons, pa.string()),
    }
    if attributes:
        columns[ATTRIBUTES] = attribute_column(scores, attributes)
    for name, column in columns.items():
        table = table.append_column(prefix + name, column)
    return table


def attribute_column(scores: Sequence[Score | None], names: Sequence[str]) -> pa.Array:
    """The attributes of each score: struct of a float32 for each name, null where there is no score."""
    rows = [None if score is None else dict(score.attributes) for score in scores]
    return pa.array(rows, pa.struct([(name, pa.float32()) for name in names]))


def reason_of(error: ScoringError, *, part: str | None = None) -> str:
    """The text of an error in the column `error`; of a row's `part`, such as a "turn", with its number."""
    where = "" if part is None or error.index is None else f"{part} {error.index}: "
    error.index = None  # its place in a list that the corpus does not know
    return f"{type(error).__name__}: {where}{error}"
