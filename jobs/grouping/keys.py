"""Keys of rows that belong together: a 128-bit key of each row's prompt, or of a column's value."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from jobs.corpus.conversations import ConversationColumns, conversations, parse_turns
from jobs.corpus.turns import cells, prompt_turns
from serve_app.reward_model.conversation import Conversation, Message
from serve_app.reward_model.errors import ConversationError


@dataclass(frozen=True, slots=True)
class GroupKeys:
    """Groups rows by the value of `column`, or by the prompt of the conversation that `conversation` reads."""

    column: str | None
    conversation: ConversationColumns | None

    @property
    def columns(self) -> list[str]:
        """The columns that keys are made of."""
        if self.column is not None:
            return [self.column]
        assert self.conversation is not None
        if self.conversation.messages is not None:
            return [self.conversation.messages]
        return [str(self.conversation.prompt)]

    def of(self, table: pa.Table) -> NDArray[np.uint64]:
        """The key of each row: [rows, 2], zeros where the column is null, cannot be read or holds no prompt.

        Keys are BLAKE2b digests of 128 bits: among a billion groups two share one with a probability of 1e-21.
        """
        if self.column is not None:
            return _keys_of_values(table.column(self.column))
        assert self.conversation is not None
        if self.conversation.messages is None:
            return _keys_of_values(table.column(str(self.conversation.prompt)), as_prompt=True)
        return _joined([_prompt_key(row) for row in conversations(table, self.conversation)])


def _keys_of_values(column: pa.ChunkedArray, *, as_prompt: bool = False) -> NDArray[np.uint64]:
    """Equal values are hashed once, where Arrow can tell that they are equal."""
    try:
        encoded = column.combine_chunks().dictionary_encode()
    except (pa.ArrowNotImplementedError, pa.ArrowInvalid):  # nested values
        return _joined([_value_key(value, as_prompt=as_prompt) for value in cells(column)])
    known = [_value_key(value, as_prompt=as_prompt) for value in cells(pa.chunked_array([encoded.dictionary]))]
    places = encoded.indices.fill_null(len(known)).to_numpy(zero_copy_only=False)
    keys: NDArray[np.uint64] = _joined([*known, _EMPTY])[places]
    return keys


# The key of a row without a group. No digest is taken for it.
_EMPTY = bytes(16)


def _joined(keys: list[bytes]) -> NDArray[np.uint64]:
    return np.frombuffer(b"".join(keys), np.uint64).reshape(-1, 2)


def _value_key(value: Any, *, as_prompt: bool) -> bytes:
    if value is None or isinstance(value, ConversationError):
        return _EMPTY
    if not as_prompt:
        return _digest(value)
    turns = prompt_turns(value)
    if not turns:  # a response may stand alone, as it may in `messages`
        return _digest([])
    parsed = parse_turns(turns)
    return _messages_key(parsed.messages) if isinstance(parsed, Conversation) else _EMPTY


def _prompt_key(row: Conversation | Exception) -> bytes:
    if not isinstance(row, Conversation):
        return _EMPTY
    return _messages_key(row.prompt)


def _messages_key(messages: Sequence[Message]) -> bytes:
    return _digest([[message.role, message.content] for message in messages])


def _digest(value: Any) -> bytes:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).digest()
