"""Conversations that can be scored but look wrong: scored with a warning, refused where that is asked for."""

from __future__ import annotations

import pickle

import pytest

from serve_app.reward_model import Conversation, ConversationError, MalformedConversationError, RewardModel
from serve_app.reward_model.conversation import WARNING_KINDS, warnings_of
from tests.conftest import chat

ASKED = {"role": "user", "content": "hi"}


def kinds(*messages: dict[str, str]) -> list[str]:
    return [warning.partition(":")[0] for warning in warnings_of(Conversation.parse(list(messages)))]


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        (chat("hi", "yes"), []),
        ([{"role": "system", "content": ""}, ASKED, {"role": "tool", "content": ""}, *chat("a", "b")], []),
        ([{"role": "usr", "content": "hi"}, {"role": "assistant", "content": "yes"}], ["unknown_role"]),
        ([ASKED, {"role": "gpt", "content": "yes"}], ["unknown_role"]),
        ([ASKED], ["last_not_assistant"]),
        (chat("hi", " \n"), ["empty_response"]),
        (chat("hi", "4<|im_end|>\n<|im_start|>user\nthanks"), ["turn_markup"]),
        (chat("[INST] hi [/INST]", "yes, in <s>bold</s>"), ["turn_markup"]),
        (chat("hi", "yes, in <s>bold</s> or <end>"), []),
        ([{"role": "human", "content": "<|eot_id|>"}, {"role": "human", "content": ""}], list(WARNING_KINDS)),
    ],
)
def test_each_kind_is_told(messages: list[dict[str, str]], expected: list[str]) -> None:
    assert kinds(*messages) == expected


def test_markup_is_told_once_with_its_place() -> None:
    conversation = Conversation.parse(chat("hi", "<|im_start|>assistant\n4<|im_end|>"))
    assert warnings_of(conversation) == ("turn_markup: message 1 spells '<|im_end|>', which is read as plain text",)


@pytest.mark.parametrize(
    ("role", "usual"), [("human", "user"), ("usr", "user"), ("gpt", "assistant"), ("Assistant", "assistant")]
)
def test_the_usual_name_of_a_role_is_offered(role: str, usual: str) -> None:
    (warning, *_) = warnings_of(Conversation.parse([{"role": role, "content": "secret"}, *chat("a", "b")]))
    assert f"message 0 has the role '{role}' (did you mean '{usual}'?)" in warning
    assert "secret" not in warning


def test_keys_of_sharegpt_are_offered_by_name() -> None:
    with pytest.raises(ConversationError, match="rename 'from' to 'role' and 'value' to 'content'"):
        Conversation.parse([{"from": "human", "value": "hi"}])


def test_scores_carry_warnings_and_keep_their_bits(tiny: RewardModel) -> None:
    good, odd = chat("hi", "yes"), [ASKED]
    first, second = tiny.score([good, odd])
    assert first.warnings == ()
    assert [warning.partition(":")[0] for warning in second.warnings] == ["last_not_assistant"]
    assert second.value == tiny.score_token_ids([tiny.tokenizer.encode(odd)])[0]


def test_strict_makes_them_errors_and_leaves_the_neighbours(tiny: RewardModel) -> None:
    first, second = tiny.outcomes([chat("hi", "yes"), [ASKED]], strict=True)
    assert first == tiny.score([chat("hi", "yes")])[0]
    assert isinstance(second, MalformedConversationError)
    assert "last_not_assistant" in str(pickle.loads(pickle.dumps(second)))
    with pytest.raises(MalformedConversationError, match="item 1: last_not_assistant"):
        tiny.score([chat("hi", "yes"), [ASKED]], strict=True)
