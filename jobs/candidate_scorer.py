"""The scoring stage of best-of-N: an actor that scores the candidates of a unit's prompts and selects among them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice

import pyarrow as pa

from jobs.attempts import GuardedModel
from jobs.columns import ConversationColumns, prompts
from jobs.corpus import Unit
from jobs.generation import without_generations
from jobs.generators.candidate import Generation
from jobs.ledger import Ledger, UnitStats
from jobs.scorer import DeadRowError, outcomes_of
from jobs.selection import Judged, all_rows, best_rows
from jobs.system_prompt import SystemPrompt
from serve_app.reward_model import RewardModel, Score, ScoringError
from serve_app.reward_model.conversation import Conversation, Message
from serve_app.reward_model.errors import ConversationError
from serve_app.reward_model.tokenizer import Truncation

__all__ = ["CandidateScorer"]


class CandidateScorer:
    """Scores the candidates of units and keeps the best of each prompt, or with `keep_all` all of them, ranked.

    `load` makes the model. The system prompt is for the reward model alone: the generator never saw it.
    """

    def __init__(
        self,
        load: Callable[[], RewardModel],
        ledger: Ledger,
        *,
        columns: ConversationColumns,
        system_prompt: SystemPrompt,
        truncation: Truncation,
        max_tokens: int | None,
        prefix: str,
        keep_all: bool,
    ) -> None:
        self._guarded = GuardedModel(load, ledger)
        self._columns = columns
        self._system_prompt = system_prompt
        self._truncation = truncation
        self._max_tokens = max_tokens
        self._prefix = prefix
        self._keep_all = keep_all

    def process(self, unit: Unit, table: pa.Table) -> tuple[pa.Table, UnitStats]:
        """The unit's rows with what was selected, in input order, and their counts.

        Raises:
            RaywardError: the model cannot be loaded, or scoring fails in a way that is no candidate's fault.
        """
        table, generations = without_generations(table)
        rows = prompts(table, self._columns)
        candidates = list(self._conversations(table, rows, generations))
        attempt = self._guarded.begin(unit, len(candidates))
        started = time.perf_counter()
        outcomes = attempt.results(
            lambda model, first, stop: outcomes_of(
                model, candidates[first:stop], truncation=self._truncation, max_tokens=self._max_tokens
            ),
            given_up=DeadRowError.after,
        )
        seconds = time.perf_counter() - started
        judged = _judged(rows, generations, outcomes)
        select = all_rows if self._keep_all else best_rows
        selected = select(table, judged, prefix=self._prefix)
        return selected, _stats(judged, selected.num_rows, seconds, keep_all=self._keep_all)

    def _conversations(
        self,
        table: pa.Table,
        rows: Sequence[Conversation | ConversationError],
        generations: Sequence[Generation],
    ) -> Iterator[Conversation | ConversationError]:
        """Each candidate behind its prompt, prompt by prompt; their order is that of `generations`."""
        column = self._system_prompt.column
        cells = [None] * table.num_rows if column is None else table.column(column).to_pylist()
        for row, generation, cell in zip(rows, generations, cells, strict=True):
            if isinstance(row, Conversation):
                for candidate in generation.candidates:
                    yield self._conversation(row, candidate.text, cell)

    def _conversation(self, prompt: Conversation, response: str, cell: object) -> Conversation | ConversationError:
        whole = Conversation((*prompt.messages, Message("assistant", response)))
        try:
            return self._system_prompt.before(whole, cell)
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
    }
    return UnitStats(
        rows=len(judged),
        errors=len(judged) - len(answered),
        tokens=sum(score.num_tokens for score in scores),
        seconds=seconds,
        counts=counts | ({"added_rows": output_rows - len(judged)} if keep_all else {}),
    )
