"""The choosing stage of best-of-N: an actor that scores the candidates of a unit's prompts and selects among them."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from jobs.corpus.conversations import ConversationColumns, SystemPrompt, prompts
from jobs.corpus.files import Unit
from jobs.corpus.turns import cells_or_none
from jobs.generation.candidates import Candidate, Generation
from jobs.generation.stage import without_generations
from jobs.runs.attempts import GuardedModel
from jobs.runs.ledger import Ledger, UnitStats
from jobs.scoring.stage import DeadRowError, outcomes_of, reason_of, warning_counts
from serve_app.reward_model import Score, ScoringError
from serve_app.reward_model.conversation import Conversation, Message
from serve_app.reward_model.errors import ConversationError
from serve_app.reward_model.scores import order
from serve_app.reward_model.tokenizer import Truncation

if TYPE_CHECKING:
    from serve_app.reward_model import RewardModel

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
CANDIDATE_COLUMNS = {"rank": pa.int32(), "candidate": pa.int32()}


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
        return [places[at] for at in order(scores)]

    @property
    def failures(self) -> str | None:
        """Why candidates did not come or have no score, equal reasons counted: `2 of 16: HTTP 503: ...`."""
        unscored = [reason_of(outcome) for outcome in self.outcomes if isinstance(outcome, ScoringError)]
        counted = Counter([*self.generation.failures, *unscored])
        total = len(self.outcomes) + len(self.generation.failures)
        return "; ".join(f"{count} of {total}: {reason}" for reason, count in counted.items()) or None

    def row(self, place: int | None) -> dict[str, Any]:
        """The added columns of the candidate at `place`, or those of a prompt that has no response."""
        row: dict[str, Any] = dict.fromkeys([*ADDED_COLUMNS, *CANDIDATE_COLUMNS])
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
    return _with_columns(repeated, [row for rows in ranked for row in rows], ADDED_COLUMNS | CANDIDATE_COLUMNS, prefix)


def _with_columns(
    table: pa.Table, rows: Sequence[dict[str, Any]], kinds: dict[str, pa.DataType], prefix: str
) -> pa.Table:
    for name, kind in kinds.items():
        table = table.append_column(prefix + name, pa.array([row[name] for row in rows], kind))
    return table


@dataclass(frozen=True, slots=True)
class ChoosingTerms:
    """Terms on which candidates are scored and selected: prompt columns, the system prompt that the reward model alone
    sees, limits, the prefix of new columns, and whether all candidates are kept."""

    columns: ConversationColumns
    system_prompt: SystemPrompt
    truncation: Truncation
    max_tokens: int | None
    prefix: str
    keep_all: bool
    strict: bool = False


class CandidateScorer:
    """Scores the candidates of units and keeps the best of each prompt, or with `keep_all` all of them, ranked.

    `load` makes the model.
    """

    def __init__(self, load: Callable[[], RewardModel], ledger: Ledger, terms: ChoosingTerms) -> None:
        self._guarded = GuardedModel(load, ledger)
        self._terms = terms

    def process(self, unit: Unit, table: pa.Table) -> tuple[pa.Table, UnitStats]:
        """The unit's rows with what was selected, in input order, and their counts.

        Raises:
            RaywardError: the model cannot be loaded, or scoring fails in a way that is no candidate's fault.
        """
        table, generations = without_generations(table)
        rows = prompts(table, self._terms.columns)
        candidates = list(self._conversations(table, rows, generations))
        attempt = self._guarded.begin(unit, len(candidates))
        started = time.perf_counter()
        outcomes = attempt.results(
            lambda model, first, stop: outcomes_of(
                model,
                candidates[first:stop],
                truncation=self._terms.truncation,
                max_tokens=self._terms.max_tokens,
                strict=self._terms.strict,
            ),
            given_up=DeadRowError.after,
        )
        seconds = time.perf_counter() - started
        judged = _judged(rows, generations, outcomes)
        select = all_rows if self._terms.keep_all else best_rows
        selected = select(table, judged, prefix=self._terms.prefix)
        stats = _stats(judged, selected.num_rows, seconds, keep_all=self._terms.keep_all)
        return selected, replace(stats, processors=attempt.model.processors)

    def _conversations(
        self,
        table: pa.Table,
        rows: Sequence[Conversation | ConversationError],
        generations: Sequence[Generation],
    ) -> Iterator[Conversation | ConversationError]:
        """Each candidate behind its prompt, prompt by prompt; their order is that of `generations`."""
        column = self._terms.system_prompt.column
        cells = cells_or_none(table, column)
        for row, generation, cell in zip(rows, generations, cells, strict=True):
            if isinstance(row, Conversation):
                for candidate in generation.candidates:
                    yield self._conversation(row, candidate.text, cell)

    def _conversation(self, prompt: Conversation, response: str, cell: object) -> Conversation | ConversationError:
        whole = Conversation((*prompt.messages, Message("assistant", response)), prompt.reference)
        try:
            return self._terms.system_prompt.before(whole, cell)
        except ConversationError as error:
            return error


def _judged(
    rows: Sequence[Conversation | ConversationError],
    generations: Sequence[Generation],
    outcomes: Sequence[Score | ScoringError],
) -> list[Judged]:
    left = iter(outcomes)
    return [
        Judged(
            generation,
            tuple(islice(left, len(generation.candidates))),
            row if isinstance(row, ConversationError) else None,
        )
        for row, generation in zip(rows, generations, strict=True)
    ]


def _stats(judged: Sequence[Judged], output_rows: int, seconds: float, *, keep_all: bool) -> UnitStats:
    scores = [outcome for one in judged for outcome in one.outcomes if isinstance(outcome, Score)]
    answered = [one for one in judged if one.order]
    counts = {
        "candidates": sum(len(one.outcomes) for one in judged),
        "answered_in_part": sum(one.failures is not None for one in answered),
        **warning_counts(scores),
    }
    return UnitStats(
        rows=len(judged),
        errors=len(judged) - len(answered),
        tokens=sum(score.num_tokens for score in scores),
        seconds=seconds,
        counts=counts | ({"added_rows": output_rows - len(judged)} if keep_all else {}),
    )
