"""Preference pairs of rows: two conversations each, chosen and rejected, behind the prompt that they share."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

import pyarrow as pa

from jobs.corpus.conversations import (
    NO_SYSTEM_PROMPT,
    SystemPrompt,
    check_column,
    conversation_of,
    parse_turns,
)
from jobs.corpus.turns import (
    about,
    cells,
    cells_or_none,
    is_transcript,
    line_errors,
    message_of,
    prompt_turns,
    transcript_turns,
)
from serve_app.reward_model.conversation import Conversation, Message
from serve_app.reward_model.errors import ConversationError

Sides: TypeAlias = tuple[Conversation | ConversationError, Conversation | ConversationError]
"""The chosen and the rejected conversation of a row, or why there is none."""


@dataclass(frozen=True, slots=True)
class PreferenceColumns:
    """Columns of the two sides of a pair, by name; of the prompt and the reference, where there is one.

    A side is a list of messages, a JSON string of one, a transcript as HH-RLHF has them, or the text of a response.
    A text needs a prompt. Messages may have it in them or not.
    """

    chosen: str
    rejected: str
    prompt: str | None = None
    reference: str | None = None

    @property
    def identity(self) -> dict[str, str | None]:
        """For a run's identity: which columns are read, and that they are read as pairs."""
        return asdict(self)

    def check(self, schema: pa.Schema) -> None:
        """Refuse a schema that lacks one of the columns, or has it in a type that cannot be read.

        Raises:
            CorpusError: the text lists the columns and the flags.
        """
        for role in ("chosen", "rejected", "prompt", "reference"):
            if (name := getattr(self, role)) is not None:
                check_column(schema, name, role, text_or_messages=True)


def preference_pairs(
    table: pa.Table, columns: PreferenceColumns, system_prompt: SystemPrompt = NO_SYSTEM_PROMPT
) -> list[Sides]:
    """Both conversations of each row, in order, or the reason why the row has none."""
    rows = zip(
        line_errors(table),
        cells(table.column(columns.chosen)),
        cells(table.column(columns.rejected)),
        cells_or_none(table, columns.prompt),
        cells_or_none(table, columns.reference),
        cells_or_none(table, system_prompt.column),
        strict=True,
    )
    return [
        (broken, broken) if broken else _sides(chosen, rejected, prompt, reference, system_prompt, cell)
        for broken, chosen, rejected, prompt, reference, cell in rows
    ]


def _sides(chosen: Any, rejected: Any, prompt: Any, reference: Any, system_prompt: SystemPrompt, cell: Any) -> Sides:
    found = shared_prompt(prompt)
    if isinstance(found, ConversationError):
        return found, found

    def side(value: Any) -> Conversation | ConversationError:
        turns = completed(value, found)
        source = turns if isinstance(turns, ConversationError) else list(turns)
        return conversation_of(source, system_prompt, cell, reference)

    return side(chosen), side(rejected)


@dataclass(frozen=True, slots=True)
class SharedPrompt:
    """Messages of a prompt, none where the row has no prompt. `is_text` is a user's text, which may stand later on in
    a conversation; a side of a transcript is text with space around it."""

    messages: tuple[Message, ...] = ()
    is_text: bool = False
    is_transcript: bool = False


def shared_prompt(cell: Any) -> SharedPrompt | ConversationError:
    """The prompt of a row, a text, messages or the beginning of a transcript, or why it is none."""
    if cell is None or cell == []:
        return SharedPrompt()
    transcript = isinstance(cell, str) and is_transcript(cell)
    parsed = parse_turns(prompt_turns(cell))
    if isinstance(parsed, ConversationError):
        return parsed if isinstance(cell, ConversationError) else about("prompt", parsed)
    return SharedPrompt(parsed.messages, isinstance(cell, str) and not transcript, transcript)


def completed(cell: Any, prompt: SharedPrompt) -> tuple[Message, ...] | ConversationError:
    """The messages of one response with the prompt in front, which they may have in them; or why there are none."""
    if isinstance(cell, ConversationError):
        return cell
    if cell is None:
        return ConversationError("it is null")
    turns = _turns(cell)
    if isinstance(turns, str):
        if not prompt.messages:
            return ConversationError(
                "it is a text, not messages or a transcript, and the row has no prompt; name it with --prompt-column"
            )
        return (*prompt.messages, Message("assistant", turns.strip() if prompt.is_transcript else turns))
    parsed = parse_turns(turns)
    if isinstance(parsed, ConversationError):
        return parsed
    return _with_prompt(parsed.messages, prompt)


def _turns(cell: Any) -> list[Any] | str:
    """Messages of a side, or its text where it has none."""
    if not isinstance(cell, str):
        return [message_of(message) for message in cell]
    if is_transcript(cell):
        return transcript_turns(cell)
    if cell.lstrip().startswith("["):
        try:
            parsed = json.loads(cell)
        except (ValueError, RecursionError):
            return cell
        turns = [message_of(message) for message in parsed]
        if turns and all(isinstance(turn, dict) and {"role", "content"} <= turn.keys() for turn in turns):
            return turns
    return cell


def _with_prompt(turns: tuple[Message, ...], prompt: SharedPrompt) -> tuple[Message, ...] | ConversationError:
    """A conversation that has the prompt in it as it is, turns that answer the prompt behind it."""
    own, wanted = prompt.messages, len(prompt.messages)
    users = [turn.content.strip() for turn in turns[:-1] if turn.role == "user"]
    if own and len(turns) > wanted and turns[:wanted] == own:
        return turns
    if own and prompt.is_text and own[0].content.strip() in users:
        return turns
    if own and turns[0].role == "assistant":
        return (*own, *turns)
    if not own and users:
        return turns
    if not own:
        return ConversationError("no user's turn comes before the response, and the row has no prompt")
    return ConversationError(
        "it begins with a user's or a system's turn but does not contain the prompt; name --chosen-column and "
        "--rejected-column without --prompt-column to leave the prompt unread"
    )
