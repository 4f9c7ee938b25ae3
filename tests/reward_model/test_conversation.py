"""Conversations are checked at the boundary, and the error says which message is wrong."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from serve_app.reward_model import Conversation, ConversationError, Message


def test_dicts_and_messages_make_the_same_conversation() -> None:
    from_dicts = Conversation.parse([{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}])
    from_messages = Conversation.parse([Message("user", "hi"), Message("assistant", "yes")])
    assert from_dicts == from_messages
    assert Conversation.parse(from_dicts) == from_dicts
    list_of_pandas: Any = np.array([{"role": "user", "content": "hi"}])
    assert Conversation.parse(list_of_pandas).messages == from_dicts.prompt
    assert from_dicts.prompt == (Message("user", "hi"),)
    assert from_dicts.response == Message("assistant", "yes")


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ([], "empty"),
        ("hello", "list of messages"),
        (None, "NoneType"),
        ({"role": "user", "content": "x"}, "dict"),
        (["hello"], "message 0 is str"),
        ([{"role": "user", "content": "x"}, {"role": "user"}], r"message 1 lacks \['content'\]"),
        ([{"role": "user", "content": None}], "message 0: content is NoneType"),
        ([{"role": 3, "content": "x"}], "message 0: role is int"),
        ([{"role": "user", "content": ["x"]}], "message 0: content is list"),
        ([{"role": "user", "content": "x", "name": "Bob"}], r"message 0 has unknown keys \['name'\]"),
        ([{"role": "user", "content": "half a \ud83d pair"}], "message 0: content is not valid Unicode"),
        ([Message("user", 5)], "message 0: content is int"),  # type: ignore[arg-type]
        (Conversation((Message("user", None),)), "message 0: content is NoneType"),  # type: ignore[arg-type]
        (Conversation(()), "empty"),
    ],
)
def test_a_malformed_conversation_is_refused_by_name(source: Any, reason: str) -> None:
    with pytest.raises(ConversationError, match=reason):
        Conversation.parse(source)
