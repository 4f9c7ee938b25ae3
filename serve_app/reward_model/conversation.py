"""Conversations: what callers hand in, checked once at the boundary. Next stop: `tokenizer.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from serve_app.reward_model.errors import ConversationError

__all__ = ["Conversation", "ConversationLike", "Message"]


@dataclass(frozen=True, slots=True)
class Message:
    """One turn: who speaks (`role`) and what is said (`content`)."""

    role: str
    content: str


ConversationLike: TypeAlias = "Conversation | Sequence[Message | Mapping[str, Any]]"
"""A `Conversation`, or a list of `Message` or of `{"role": str, "content": str}`."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """One or more messages; the last one is the response that is scored, the others are its prompt."""

    messages: tuple[Message, ...]

    @property
    def prompt(self) -> tuple[Message, ...]:
        return self.messages[:-1]

    @property
    def response(self) -> Message:
        return self.messages[-1]

    @classmethod
    def parse(cls, source: ConversationLike) -> Conversation:
        """Check `source` and make it a conversation.

        Raises:
            ConversationError: it is empty, or a message has an unknown or missing key, or a role or content
                that is not a string of valid Unicode. The text names the message by its 0-based index.
        """
        if isinstance(source, Conversation):
            source = source.messages
        if isinstance(source, np.ndarray):  # as pandas gives a column of messages
            source = source.tolist()
        if not isinstance(source, Sequence) or isinstance(source, str | bytes):
            raise ConversationError(
                f"a conversation is a list of messages, each with 'role' and 'content'; got {type(source).__name__}"
            )
        if not source:
            raise ConversationError("the conversation is empty; it needs at least one message")
        return cls(tuple(_parse_message(message, index) for index, message in enumerate(source)))


def _parse_message(source: Message | Mapping[str, Any], index: int) -> Message:
    if isinstance(source, Message):
        role, content = source.role, source.content
    elif isinstance(source, Mapping):
        unknown = sorted(str(key) for key in source if key not in ("role", "content"))
        if unknown:
            raise ConversationError(f"message {index} has unknown keys {unknown}; only 'role' and 'content' are read")
        missing = [key for key in ("role", "content") if key not in source]
        if missing:
            raise ConversationError(f"message {index} lacks {missing}")
        role, content = source["role"], source["content"]
    else:
        raise ConversationError(f"message {index} is {type(source).__name__}, not an object with 'role' and 'content'")
    return Message(role=_text(role, "role", index), content=_text(content, "content", index))


def _text(value: object, key: str, index: int) -> str:
    if not isinstance(value, str):
        raise ConversationError(f"message {index}: {key} is {type(value).__name__}, not a string")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ConversationError(f"message {index}: {key} is not valid Unicode ({error.reason})") from None
    return value
