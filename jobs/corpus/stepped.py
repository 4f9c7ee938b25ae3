"""Answers in steps: a prompt and a list of texts in each row, for process reward models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from jobs.corpus.conversations import (
    NO_SYSTEM_PROMPT,
    ConversationColumns,
    SystemPrompt,
    describe,
    is_list,
    is_text,
    prompts,
)
from jobs.corpus.files import Corpus
from jobs.corpus.readings import prompt_reading, same_reading
from jobs.corpus.turns import about, cells
from jobs.errors import CorpusError
from serve_app.reward_model.conversation import Conversation
from serve_app.reward_model.errors import ConversationError
from serve_app.reward_model.steps import SteppedAnswer


@dataclass(frozen=True, slots=True)
class StepColumns:
    """The column of prompts, `prompt` or `messages`, and that of lists of steps."""

    prompt: ConversationColumns
    steps: str

    @property
    def identity(self) -> dict[str, Any]:
        """For a run's identity."""
        return {**self.prompt.identity, "steps": self.steps}


def step_columns(corpus: Corpus, chosen: ConversationColumns, steps: str) -> StepColumns:
    """The columns of answers in steps, the same in every file.

    Raises:
        CorpusError: a file has no column of prompts, several, or no lists of strings in the column of steps.
    """
    for file, schema in zip(corpus.files, corpus.schemas, strict=True):
        if schema.names.count(steps) != 1:
            raise CorpusError(f"{file.path}: there is no column {steps!r} for --steps-column.\n{describe(schema)}")
        kind = schema.field(steps).type
        if not (pa.types.is_null(kind) or (is_list(kind) and is_text(kind.value_type))):
            raise CorpusError(f"{file.path}: column {steps!r} is {kind}; --steps-column takes lists of strings")
    found = same_reading(corpus, lambda schema: prompt_reading(schema, chosen), reads_all=False)
    return StepColumns(found, steps)


def stepped_rows(
    table: pa.Table, columns: StepColumns, system_prompt: SystemPrompt = NO_SYSTEM_PROMPT
) -> list[SteppedAnswer | ConversationError]:
    """The answer in steps of each row, in order, or the reason why the row has none."""
    rows = zip(prompts(table, columns.prompt, system_prompt), cells(table.column(columns.steps)), strict=True)
    return [_answer(prompt, cell) for prompt, cell in rows]


def _answer(
    prompt: Conversation | ConversationError, cell: Sequence[Any] | ConversationError | None
) -> SteppedAnswer | ConversationError:
    if isinstance(prompt, ConversationError):
        return prompt
    if isinstance(cell, ConversationError):
        return about("steps", cell)
    if cell is None:
        return ConversationError("the steps are null")
    try:
        return SteppedAnswer.parse(prompt, list(cell))
    except ConversationError as error:
        return error
