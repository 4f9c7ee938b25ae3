"""Cells of a table as the turns of a conversation, in every layout that is known; a cell that is none has its reason.

Next stop: `conversations.py` and `preferences.py`, which join them.
"""

from __future__ import annotations

import json
import re
from typing import Any

import pyarrow as pa

from jobs.corpus.formats import LINE_ERROR, has_line_errors
from serve_app.reward_model.conversation import USUAL_KEYS, USUAL_NAMES
from serve_app.reward_model.errors import ConversationError

# A turn of Anthropic's HH-RLHF begins so: https://huggingface.co/datasets/Anthropic/hh-rlhf
_SPEAKER = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


def cells(column: pa.ChunkedArray) -> list[Any]:
    """The values of a column; a `ConversationError` in place of each that cannot be had, such as invalid UTF-8."""
    try:
        values: list[Any] = column.to_pylist()
    except Exception:  # one value is enough for that, and Arrow raises errors of many types
        return [_cell(scalar) for scalar in column]
    return values


def _cell(scalar: pa.Scalar) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:
        return ConversationError(f"the text is not valid UTF-8 (byte {error.start}: {error.reason})")
    except Exception as error:  # a value of any type may stand in a field of a message
        return ConversationError(f"the value cannot be read: {error}")


def cells_or_none(table: pa.Table, name: str | None) -> list[Any]:
    """The values of a column; where none is named, None for each row."""
    return [None] * table.num_rows if name is None else cells(table.column(name))


def line_errors(table: pa.Table) -> list[ConversationError | None]:
    """Why the line of each row cannot be read, in the order of rows; None where it can."""
    if not has_line_errors(table.schema):
        return [None] * table.num_rows
    told = table.column(LINE_ERROR).to_pylist()
    return [None if reason is None else ConversationError(reason) for reason in told]


def messages_of(cell: Any, *, name: str = "messages") -> list[Any] | ConversationError:
    """The messages of a cell: a list of them, a JSON string of one, or a transcript. `name` is for errors."""
    if isinstance(cell, ConversationError):
        return about(name, cell)
    if cell is None:
        return ConversationError(f"the {name} are null")
    if not isinstance(cell, str):
        return [message_of(message) for message in cell]
    if is_transcript(cell):
        return transcript_turns(cell)
    try:
        parsed = json.loads(cell)
    except (ValueError, RecursionError) as error:
        return ConversationError(f"the {name} are not JSON: {error}")
    if not isinstance(parsed, list):
        return ConversationError(f"the JSON is not a list of {name}")
    return [message_of(message) for message in parsed]


def prompt_turns(cell: Any) -> list[Any] | ConversationError:
    """The messages of a prompt, which is a user's text, the beginning of a transcript, or a list of messages."""
    if isinstance(cell, ConversationError):
        return about("prompt", cell)
    if cell is None:
        return ConversationError("the prompt is null")
    if not isinstance(cell, str):
        return [message_of(turn) for turn in cell]
    if not is_transcript(cell):
        return [{"role": "user", "content": cell}]
    turns = transcript_turns(cell)
    return turns[:-1] if turns[-1] == {"role": "assistant", "content": ""} else turns  # where the response goes


def about(name: str, error: ConversationError) -> ConversationError:
    """The error of a cell with the name of what was to be in it."""
    return ConversationError(f"{name}: {error}")


def message_of(message: Any) -> Any:
    """A message with ShareGPT's keys and names as ours, without the nulls that stand for fields it does not have."""
    if not isinstance(message, dict):
        return message
    own = {key for key, value in message.items() if value is not None}
    if not own & set(USUAL_KEYS) or own & set(USUAL_KEYS.values()):
        return without_nulls(message)
    renamed = {"role": None, "content": None} | {USUAL_KEYS.get(key, key): message[key] for key in own}
    role = renamed["role"]
    return without_nulls(renamed | {"role": USUAL_NAMES.get(role.lower(), role) if isinstance(role, str) else role})


def without_nulls(message: Any) -> Any:
    """A Parquet struct has every field in every row; one that is null was not there."""
    if not isinstance(message, dict):
        return message
    return {key: value for key, value in message.items() if value is not None or key in ("role", "content")}


def is_transcript(text: str) -> bool:
    """Whether a text begins as the transcripts of HH-RLHF do."""
    return text.lstrip().startswith("Human:") and text.startswith("\n\n")


def transcript_turns(text: str) -> list[Any]:
    """The turns of a transcript: a blank line, `Human:` or `Assistant:`, and what is said, without space around it."""
    _, *parts = _SPEAKER.split(text)
    speakers, said = parts[::2], parts[1::2]
    return [
        {"role": _ROLES[speaker], "content": content.strip()} for speaker, content in zip(speakers, said, strict=True)
    ]
