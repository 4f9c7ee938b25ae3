"""Conversations: what callers hand in, checked once at the boundary. Next stop: `tokenizer.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from serve_app.reward_model.errors import ConversationError
from serve_app.reward_model.turn_formats import TURN_MARKUP

KNOWN_ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function"})
USUAL_NAMES = {
    "human": "user",
    "usr": "user",
    "prompter": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "chatbot": "assistant",
    "chatgpt": "assistant",
    "ai": "assistant",
    "model": "assistant",
    "sys": "system",
}
"""What other data sets call the roles."""
USUAL_KEYS = {"from": "role", "value": "content"}
"""What ShareGPT's layout calls the keys of a message."""
WARNING_KINDS = ("unknown_role", "last_not_assistant", "empty_response", "turn_markup")


@dataclass(frozen=True, slots=True)
class Message:
    """One turn: who speaks (`role`) and what is said (`content`)."""

    role: str
    content: str


ConversationLike: TypeAlias = "Conversation | Sequence[Message | Mapping[str, Any]] | Mapping[str, Any]"
"""A `Conversation`, or a list of `Message` or of `{"role": str, "content": str}`, or a mapping with such `messages` and
a `reference`.
"""


@dataclass(frozen=True, slots=True)
class Conversation:
    """One or more messages; the last one is the response that is scored, the others are its prompt.

    `reference` is an answer to compare the response with, which POLAR's models need and others refuse.
    """

    messages: tuple[Message, ...]
    reference: str | None = None

    @property
    def prompt(self) -> tuple[Message, ...]:
        return self.messages[:-1]

    @property
    def response(self) -> Message:
        return self.messages[-1]

    def turns(self) -> list[Conversation]:
        """The conversation as it was after each message of the assistant, in order; the reference stays.

        Raises:
            ConversationError: no message is the assistant's.
        """
        ends = [place for place, message in enumerate(self.messages, 1) if message.role == "assistant"]
        if not ends:
            roles = ", ".join(_role_named(role) for role in dict.fromkeys(message.role for message in self.messages))
            raise ConversationError(f"no message has the role 'assistant', so there is no turn to score; found {roles}")
        return [Conversation(self.messages[:end], self.reference) for end in ends]

    @classmethod
    def parse(cls, source: ConversationLike) -> Conversation:
        """Check `source` and make it a conversation.

        A reference is text, or a list of messages whose contents are joined by newlines, as POLAR's client joins them.

        Raises:
            ConversationError: it is empty, or a message has an unknown or missing key, or a role or content
                that is not a string of valid Unicode. The text names the message by its 0-based index.
        """
        messages: Any = source
        reference: Any = None
        if isinstance(source, Conversation):
            messages, reference = source.messages, source.reference
        elif isinstance(source, Mapping):
            messages, reference = _messages_of(source), source.get("reference")
        if isinstance(messages, np.ndarray):  # as pandas gives a column of messages
            messages = messages.tolist()
        if not isinstance(messages, Sequence) or isinstance(messages, str | bytes):
            raise ConversationError(
                f"a conversation is a list of messages, each with 'role' and 'content'; got {type(messages).__name__}"
            )
        if not messages:
            raise ConversationError("the conversation is empty; it needs at least one message")
        parsed = tuple(_parse_message(message, index) for index, message in enumerate(messages))
        return cls(parsed, _reference(reference))


def warnings_of(conversation: Conversation) -> tuple[str, ...]:
    """What looks wrong in a conversation that can be scored all the same, most likely a slip in the data.

    Each begins with its kind, one of `WARNING_KINDS`, and a colon: a role that no chat template is known to have, a
    last message that is not the assistant's, an empty response, a message that spells what chat templates write around
    turns, as in a text that was rendered before. Contents are never quoted.
    """
    found = []
    odd = next((place for place, each in enumerate(conversation.messages) if each.role not in KNOWN_ROLES), None)
    last = conversation.messages[-1]
    if odd is not None:
        found.append(f"unknown_role: message {odd} has the role {_role_named(conversation.messages[odd].role)}")
    if last.role != "assistant" and USUAL_NAMES.get(last.role.lower()) != "assistant":
        found.append(f"last_not_assistant: the last message, which is scored, has the role {_role_named(last.role)}")
    if not last.content.strip():
        found.append("empty_response: the last message, which is scored, is empty")
    found += [
        f"turn_markup: message {place} spells {mark!r}, which is read as plain text"
        for place, message in enumerate(conversation.messages)
        for mark in TURN_MARKUP
        if mark in message.content
    ][:1]
    return tuple(found)


def _role_named(role: str) -> str:
    usual = USUAL_NAMES.get(role.lower()) or (role.lower() if role.lower() in KNOWN_ROLES else None)
    shown = repr(role[:40])
    return f"{shown} (did you mean {usual!r}?)" if usual and usual != role else shown


def _messages_of(source: Mapping[str, Any]) -> Any:
    unknown = sorted(str(key) for key in source if key not in ("messages", "reference"))
    if unknown or "messages" not in source:
        raise ConversationError(
            f"a conversation is a list of messages, or an object with 'messages' and 'reference'; got "
            f"{type(source).__name__} with the keys {sorted(map(str, source))}"
        )
    return source["messages"]


def _reference(value: Any) -> str | None:
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        try:
            value = "\n".join(_parse_message(message, index).content for index, message in enumerate(value))
        except ConversationError as error:
            raise ConversationError(f"reference: {error}") from None
    if value is not None and not isinstance(value, str):
        raise ConversationError(f"the reference is {type(value).__name__}, neither a string nor a list of messages")
    return None if value is None else _valid(value, "the reference")


def _parse_message(source: Message | Mapping[str, Any], index: int) -> Message:
    if isinstance(source, Message):
        role, content = source.role, source.content
    elif isinstance(source, Mapping):
        unknown = sorted(str(key) for key in source if key not in ("role", "content"))
        if unknown:
            renamed = [f"{key!r} to {USUAL_KEYS[key]!r}" for key in unknown if key in USUAL_KEYS]
            hint = f"; rename {' and '.join(renamed)}" if renamed else ""
            raise ConversationError(
                f"message {index} has unknown keys {unknown}; only 'role' and 'content' are read{hint}"
            )
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
    return _valid(value, f"message {index}: {key}")


def _valid(value: str, what: str) -> str:
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ConversationError(f"{what} is not valid Unicode ({error.reason})") from None
    return value
