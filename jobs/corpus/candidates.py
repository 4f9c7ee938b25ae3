"""Candidates of rows: several responses to one prompt, in a list, each a conversation of its own."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

import pyarrow as pa

from jobs.corpus.conversations import (
    NO_SYSTEM_PROMPT,
    SystemPrompt,
    check_column,
    conversation_of,
    describe,
    is_list,
    is_messages,
    is_sharegpt,
    is_text,
)
from jobs.corpus.preferences import SharedPrompt, completed, shared_prompt
from jobs.corpus.turns import about, cells, cells_or_none, line_errors
from jobs.errors import CorpusError
from serve_app.reward_model.conversation import Conversation
from serve_app.reward_model.errors import ConversationError

TEXT_FIELDS = ("response", "answer")
"""Fields that hold the text of a candidate: https://huggingface.co/datasets/openbmb/UltraFeedback has `response`,
https://huggingface.co/datasets/berkeley-nest/Nectar has `answer`."""

Candidates: TypeAlias = list[Conversation | ConversationError] | ConversationError
"""The conversation of each candidate of a row, or why it is none; an error alone where the row has no list."""


@dataclass(frozen=True, slots=True)
class CandidateColumns:
    """The column of lists of responses, and those of the prompt and the reference, where there is one, by name.

    A response is a text, a list of messages, one message, or a struct with one of the `TEXT_FIELDS`.
    """

    responses: str
    prompt: str | None = None
    reference: str | None = None

    @property
    def identity(self) -> dict[str, str | None]:
        """For a run's identity: which columns are read, and that they are read as candidates."""
        return asdict(self)

    def check(self, schema: pa.Schema) -> None:
        """Refuse a schema that lacks one of the columns, or has it in a type that cannot be read.

        Raises:
            CorpusError: the text lists the columns and the flags.
        """
        for role in ("prompt", "reference"):
            if (name := getattr(self, role)) is not None:
                check_column(schema, name, role, text_or_messages=True)
        if schema.names.count(self.responses) != 1:
            raise CorpusError(f"there is no column {self.responses!r} for --responses-column.\n{describe(schema)}")
        kind = schema.field(self.responses).type
        if not (are_candidates(kind) or pa.types.is_null(kind)):  # nulls alone: each row is an error
            raise CorpusError(
                f"column {self.responses!r} is {kind}; --responses-column takes a list of strings, of messages, or of "
                f"structs with a {' or '.join(TEXT_FIELDS)} field.\n{describe(schema)}"
            )


def are_candidates(kind: pa.DataType) -> bool:
    """Whether a column of this type holds lists of responses."""
    if not is_list(kind):
        return False
    element = kind.value_type
    return is_text(element) or hold_messages(kind) or text_field(element) is not None


def hold_messages(kind: pa.DataType) -> bool:
    """Whether a column of lists of responses has each as messages, or as one message."""
    element = kind.value_type
    return any(is_kind(one) for is_kind in (is_messages, is_sharegpt) for one in (kind, element))


def text_field(element: pa.DataType) -> str | None:
    """The field of a struct that holds a candidate's text; None for other types."""
    if not pa.types.is_struct(element):
        return None
    texts = {field.name for field in element if is_text(field.type)}
    return next((name for name in TEXT_FIELDS if name in texts), None)


def candidate_rows(
    table: pa.Table, columns: CandidateColumns, system_prompt: SystemPrompt = NO_SYSTEM_PROMPT
) -> list[Candidates]:
    """The conversations of each row's candidates, in order, or the reason why the row has none."""
    rows = zip(
        line_errors(table),
        cells(table.column(columns.responses)),
        cells_or_none(table, columns.prompt),
        cells_or_none(table, columns.reference),
        cells_or_none(table, system_prompt.column),
        strict=True,
    )
    kind = table.schema.field(columns.responses).type
    field = text_field(kind.value_type) if is_list(kind) else None
    return [
        broken or _candidates(cell, field, prompt, reference, system, system_prompt)
        for broken, cell, prompt, reference, system in rows
    ]


def _candidates(
    cell: Any, field: str | None, prompt: Any, reference: Any, system: Any, system_prompt: SystemPrompt
) -> Candidates:
    if isinstance(cell, ConversationError):
        return about("responses", cell)
    if cell is None:
        return ConversationError("the responses are null")
    if not cell:
        return ConversationError("the list of responses is empty")
    found = shared_prompt(prompt)
    if isinstance(found, ConversationError):
        return found

    def candidate(value: Any) -> Conversation | ConversationError:
        turns = _turns(value, field, found)
        source = turns if isinstance(turns, ConversationError) else list(turns)
        return conversation_of(source, system_prompt, system, reference)

    return [candidate(value) for value in cell]


def _turns(value: Any, field: str | None, prompt: SharedPrompt) -> Any:
    if isinstance(value, dict):
        value = value[field] if field is not None else [value]
    return completed(value, prompt)
