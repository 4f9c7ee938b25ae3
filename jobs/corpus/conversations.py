"""Conversations of rows: the columns that make them, each row's conversation or prompt, and the system message put in
front. Which columns a corpus has is found in `readings.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from jobs.corpus.turns import (
    about,
    cells,
    cells_or_none,
    is_transcript,
    line_errors,
    message_of,
    messages_of,
    prompt_turns,
)
from jobs.errors import CorpusError
from serve_app.reward_model.conversation import Conversation, Message
from serve_app.reward_model.errors import ConversationError


@dataclass(frozen=True, slots=True)
class SystemPrompt:
    """A system message for every row (`text`), or the one that a `column` holds; `replaces` one that is there."""

    text: str | None = None
    column: str | None = None
    replaces: bool = False

    @classmethod
    def of(cls, text: str | None, column: str | None, *, replaces: bool) -> SystemPrompt:
        """From the command line, where `@FILE` names a file that holds the text.

        Raises:
            CorpusError: both are given, the text is empty, or the file cannot be read.
        """
        if text is not None and column is not None:
            raise CorpusError("--system-prompt excludes --system-prompt-column")
        if replaces and text is None and column is None:
            raise CorpusError("--replace-system-prompt needs --system-prompt or --system-prompt-column")
        if text is not None and text.startswith("@"):
            try:
                text = Path(text[1:]).expanduser().read_text(encoding="utf-8").strip()
            except (OSError, UnicodeDecodeError) as error:
                raise CorpusError(f"--system-prompt {text}: {error}") from error
        if text is not None and not text:
            raise CorpusError("--system-prompt is empty; leave it out for none")
        return cls(text, column, replaces)

    def before(self, conversation: Conversation, cell: Any) -> Conversation:
        """The conversation with its system message in front; `cell` is the row's value of the column.

        Raises:
            ConversationError: it has one already and none is to be replaced, or the cell is no text.
        """
        text = self.text if self.column is None else cell
        if text is None:
            return conversation
        if isinstance(text, ConversationError):
            raise about("system prompt", text)
        if not isinstance(text, str):
            raise ConversationError(f"the system prompt is {type(text).__name__}, not a string")
        messages = conversation.messages
        if messages[0].role == "system":
            if not self.replaces:
                raise ConversationError("there is a system message already; --replace-system-prompt replaces it")
            messages = messages[1:]
        return Conversation.parse(Conversation((Message("system", text), *messages), conversation.reference))


NO_SYSTEM_PROMPT = SystemPrompt()


@dataclass(frozen=True, slots=True)
class ConversationColumns:
    """Either `messages`, or `prompt` and `response`, by column name; and `reference`, where one is named."""

    messages: str | None = None
    prompt: str | None = None
    response: str | None = None
    reference: str | None = None

    @property
    def identity(self) -> dict[str, str | None]:
        """For a run's identity; without a reference it is that of the runs before there were any."""
        fields = asdict(self)
        return {name: column for name, column in fields.items() if name != "reference" or column is not None}

    @property
    def is_named(self) -> bool:
        """Whether any column is named that says where conversations are."""
        return bool(self.messages or self.prompt or self.response)

    def check(self, schema: pa.Schema) -> None:
        """Refuse a schema that lacks one of the columns, or has it in a type that cannot be read.

        Raises:
            CorpusError: the text lists the columns and the flags.
        """
        if self.reference is not None:
            check_column(schema, self.reference, "reference", text_or_messages=True)
        if self.messages is not None:
            check_column(schema, self.messages, "messages", text_or_messages=True)
            return
        check_column(schema, str(self.prompt), "prompt", text_or_messages=True)
        if self.response is not None:
            check_column(schema, self.response, "response", text_or_messages=False)


def check_column(schema: pa.Schema, name: str, role: str, *, text_or_messages: bool) -> None:
    """Refuse a column that is not there once, or holds neither text nor, where those are allowed, messages.

    Raises:
        CorpusError: the text lists the columns; `role` names the flag.
    """
    if schema.names.count(name) > 1:
        raise CorpusError(f"there are {schema.names.count(name)} columns {name!r}.\n{describe(schema)}")
    if name not in schema.names:
        raise CorpusError(f"there is no column {name!r} for --{role}-column.\n{describe(schema)}")
    kind = schema.field(name).type
    if not (is_text(kind) or (text_or_messages and (is_messages(kind) or is_sharegpt(kind)))):
        wanted = (
            "a list of {role, content} or {from, value}, or a JSON string of one" if role == "messages" else "a string"
        )
        wanted = (
            "a string or a list of {role, content}" if role in ("prompt", "reference", "chosen", "rejected") else wanted
        )
        raise CorpusError(f"column {name!r} is {kind}; --{role}-column takes {wanted}.\n{describe(schema)}")


def is_text(kind: pa.DataType) -> bool:
    """Whether a column of this type holds strings."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if isinstance(kind, pa.BaseExtensionType):  # such as arrow.json
        kind = kind.storage_type
    kinds = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_null)
    return any(is_kind(kind) for is_kind in kinds)  # a column of nulls alone has the type null: each row is an error


def is_messages(kind: pa.DataType) -> bool:
    """Whether a column of this type holds lists of {role, content}."""
    return {"role", "content"} <= _text_fields(kind)


def is_sharegpt(kind: pa.DataType) -> bool:
    """Whether a column of this type holds lists of {from, value}, as ShareGPT's do."""
    return {"from", "value"} <= _text_fields(kind)


def is_list(kind: pa.DataType) -> bool:
    """Whether a column of this type holds lists, in any of the layouts that Arrow has."""
    kinds = (
        pa.types.is_list,
        pa.types.is_large_list,
        pa.types.is_fixed_size_list,
        pa.types.is_list_view,
        pa.types.is_large_list_view,
    )
    return any(is_kind(kind) for is_kind in kinds)


def _text_fields(kind: pa.DataType) -> set[str]:
    """The names of the strings that a column of lists of structs holds; none for another column."""
    if not is_list(kind) or not pa.types.is_struct(kind.value_type):
        return set()
    return {field.name for field in kind.value_type if is_text(field.type)}


def describe(schema: pa.Schema) -> str:
    """One line that lists the columns and their types, for errors."""
    return "Columns found: " + ", ".join(f"{field.name} ({field.type})" for field in schema)


def conversations(
    table: pa.Table, columns: ConversationColumns, system_prompt: SystemPrompt = NO_SYSTEM_PROMPT
) -> list[Conversation | ConversationError]:
    """The conversation of each row, in order, or the reason why the row has none."""
    sources: Iterator[Any]
    if columns.messages is not None:
        sources = (messages_of(cell) for cell in cells(table.column(columns.messages)))
    else:
        pairs = zip(cells(table.column(str(columns.prompt))), cells(table.column(str(columns.response))), strict=True)
        sources = (_joined(prompt, response) for prompt, response in pairs)
    prompts = cells_or_none(table, system_prompt.column)
    rows = zip(line_errors(table), sources, prompts, cells_or_none(table, columns.reference), strict=True)
    return [
        broken or conversation_of(source, system_prompt, cell, reference) for broken, source, cell, reference in rows
    ]


def prompts(
    table: pa.Table, columns: ConversationColumns, system_prompt: SystemPrompt = NO_SYSTEM_PROMPT
) -> list[Conversation | ConversationError]:
    """The messages of each row's prompt, from its column of messages or of prompts, or why the row has none."""
    if columns.messages is not None:
        sources = [messages_of(cell) for cell in cells(table.column(columns.messages))]
    else:
        sources = [prompt_turns(cell) for cell in cells(table.column(str(columns.prompt)))]
    references = cells_or_none(table, columns.reference)
    rows = zip(line_errors(table), sources, cells_or_none(table, system_prompt.column), references, strict=True)
    return [
        broken or _answerable(conversation_of(source, system_prompt, cell, reference))
        for broken, source, cell, reference in rows
    ]


def _answerable(prompt: Conversation | ConversationError) -> Conversation | ConversationError:
    if isinstance(prompt, Conversation) and prompt.response.role == "assistant":
        return ConversationError("the prompt ends in an assistant's turn, so there is nothing to answer")
    return prompt


def parse_turns(source: list[Any] | ConversationError, reference: Any = None) -> Conversation | ConversationError:
    """The conversation of messages as a cell has them, with its reference, or the reason why it is none."""
    if isinstance(source, ConversationError):
        return source
    if isinstance(reference, ConversationError):
        return about("reference", reference)
    if isinstance(reference, list):
        reference = [message_of(message) for message in reference]
    try:
        return Conversation.parse({"messages": source, "reference": reference})
    except ConversationError as error:
        return error


def conversation_of(
    source: list[Any] | ConversationError, system_prompt: SystemPrompt, cell: Any, reference: Any
) -> Conversation | ConversationError:
    """The conversation of messages as a cell has them, with its reference and its system message; or why it is none."""
    conversation = parse_turns(source, reference)
    try:
        return system_prompt.before(conversation, cell) if isinstance(conversation, Conversation) else conversation
    except ConversationError as error:
        return error


def _joined(prompt: Any, response: Any) -> list[Any] | ConversationError:
    turns = prompt_turns(prompt)
    if isinstance(turns, ConversationError):
        return turns
    if isinstance(response, ConversationError):
        return about("response", response)
    if response is None:
        return ConversationError("the response is null")
    if isinstance(prompt, str) and is_transcript(prompt) and isinstance(response, str):
        response = response.strip()  # a turn of a transcript has space around it
    return [*turns, {"role": "assistant", "content": response}]
