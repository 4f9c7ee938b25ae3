"""Lists of conversations as JSON requests of bounded size. What is no JSON is found here, before it is sent."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from serve_app.client.errors import InvalidRequestError, RewardClientError

__all__ = ["Batch", "BatchLimits", "Messages", "Truncation", "cut", "encode", "encode_messages", "json_object"]

Messages: TypeAlias = Sequence[Mapping[str, Any]]
"""Messages of one conversation, each `{"role": str, "content": str}`; the last one is the response that is scored."""
Truncation: TypeAlias = Literal["error", "right", "left"]


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """The most one request holds; a conversation over `num_bytes` of JSON goes alone."""

    num_conversations: int
    num_bytes: int

    def hold(self, num_conversations: int, num_bytes: int) -> bool:
        return num_conversations <= self.num_conversations and num_bytes <= self.num_bytes


@dataclass(slots=True)
class Batch:
    """Conversations `start`, `start + 1`, ... of a list, each as JSON."""

    start: int
    conversations: list[bytes] = field(default_factory=list)
    num_bytes: int = 0

    def __len__(self) -> int:
        return len(self.conversations)

    def add(self, conversations: list[bytes]) -> None:
        self.conversations += conversations
        self.num_bytes += _size(conversations)

    def globalise(self, error: RewardClientError) -> None:
        """Make `conversations[3]` in an error of this batch name the conversation's place in the whole list."""
        here = re.match(r"conversations\[(\d+)\]", error.param or "")
        if here is None or error.param is None:
            return
        there = f"conversations[{self.start + int(here[1])}]"
        error.param = there + error.param[here.end() :]
        error.message = error.message.replace(here[0], there)


def cut(conversations: Sequence[Messages], limits: BatchLimits) -> Iterator[Batch]:
    """Cut a list into batches, in order; neighbours that differ in the last message alone share one, if it holds them.

    A batch is encoded when it is asked for, so that a long list is never in memory twice.

    Raises:
        InvalidRequestError: a conversation is no list of messages or has no JSON form.
    """
    batch = Batch(start=0)
    for group in _groups(conversations, limits):
        if batch and not limits.hold(len(batch) + len(group), batch.num_bytes + _size(group)):
            yield batch
            batch = Batch(start=batch.start + len(batch))
        batch.add(group)
    if batch:
        yield batch


def _groups(conversations: Sequence[Messages], limits: BatchLimits) -> Iterator[list[bytes]]:
    """Runs of conversations with one prompt, each within `limits` unless it is a single conversation."""
    group: list[bytes] = []
    size = 0
    for index, conversation in enumerate(conversations):
        encoded = encode_messages(conversation, f"conversations[{index}]")
        size += _size([encoded])
        same_prompt = index > 0 and conversation[:-1] == conversations[index - 1][:-1]
        if group and not (same_prompt and limits.hold(len(group) + 1, size)):
            yield group
            group, size = [], _size([encoded])
        group.append(encoded)
    if group:
        yield group


def _size(encoded: list[bytes]) -> int:
    return sum(len(item) + 1 for item in encoded)  # a comma each


def encode_messages(messages: Messages, param: str) -> bytes:
    """Messages as JSON; whether each has a role and a content is the server's to judge.

    Raises:
        InvalidRequestError: it is no list of objects, or holds what JSON cannot say; `param` names it.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes):
        raise InvalidRequestError(
            f"a list of messages, each with 'role' and 'content', is needed, not {type(messages).__name__}", param=param
        )
    return encode(list(messages), param)


def encode(value: object, param: str) -> bytes:
    """`value` as JSON in UTF-8.

    Raises:
        InvalidRequestError: JSON cannot say it: another type, NaN, a lone surrogate; `param` names it.
    """
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequestError(f"{param} has no JSON form: {error}", param=param) from error


def json_object(fields: Mapping[str, object], **encoded: bytes | list[bytes]) -> bytes:
    """A JSON object of `fields` that are not None and of members that are JSON already."""
    members = [(name, encode(value, name)) for name, value in fields.items() if value is not None]
    for name, value in encoded.items():
        members.append((name, value if isinstance(value, bytes) else b"[" + b",".join(value) + b"]"))
    return b"{" + b",".join(f'"{name}":'.encode() + value for name, value in members) + b"}"
