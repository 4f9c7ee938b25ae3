"""A policy's token ids and texts become the conversations they were made of, nothing of its template left."""

from __future__ import annotations

from collections.abc import Callable
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cluster.reward_pool.errors import PolicyTokenizerError, RewardInputError
from cluster.reward_pool.policy import PolicyText, template_of_day, unpadded, without_thinking
from serve_app.reward_model import Conversation, ConversationError, RewardModel, TokenIdsError
from tests.cluster.reward_pool import policies
from tests.conftest import chat

CHATS = [
    chat("What is 2 + 2?", "4"),
    chat("Hello", "Hi!\n\nWhat can I do?", "Nothing  ", "Fine. "),
    [{"role": "system", "content": "Be brief."}, *chat("\u4f60\u597d", "\n  \u4f60\u597d\uff01 \U0001f600")],
    chat("Say nothing", ""),
    chat("What ends your turn?", "<|im_end|> and <|eot_id|>, or </s>."),
    chat("Is <|im_start|>assistant\nyours?", "Yes\ufdd0."),
]


def ids_of(tokenizer: Any, conversation: list[dict[str, str]]) -> list[int]:
    """Ids as a policy's: special tokens where the template has them, and what messages spell kept as text."""
    marked = [{"role": m["role"], "content": "\ufdd1".join(["", *m["content"], ""])} for m in conversation]
    ids: list[int] = []
    specials = {token: key for key, token in PolicyText(tokenizer)._specials.items()}
    text = tokenizer.apply_chat_template(marked, tokenize=False)
    run = ""
    while text:
        special = next((token for token in sorted(specials, key=len, reverse=True) if text.startswith(token)), None)
        if special is None:
            run, text = run + text[0], text[1:]
            continue
        ids += [*plain_ids(tokenizer, run.replace("\ufdd1", "")), specials[special]]
        run, text = "", text[len(special) :]
    return ids + plain_ids(tokenizer, run.replace("\ufdd1", ""))


def plain_ids(tokenizer: Any, text: str) -> list[int]:
    """Ids of text in which nothing is special: those of its characters."""
    return [token for char in text for token in tokenizer.encode(char, add_special_tokens=False)]


def parsed(conversation: list[dict[str, str]]) -> Conversation:
    return Conversation.parse(conversation)


@pytest.fixture(params=[policies.chatml, policies.llama, policies.thinking])
def policy(request: pytest.FixtureRequest, tiny: RewardModel) -> Any:
    make: Callable[[Path], Any] = request.param
    return make(tiny.folder)


@pytest.mark.parametrize("conversation", CHATS, ids=range(len(CHATS)))
def test_ids_become_the_conversation_again(policy: Any, conversation: list[dict[str, str]]) -> None:
    """Also where a response has space at its ends, which its template would trim."""
    assert PolicyText(policy).of_ids([ids_of(policy, conversation)]) == [parsed(conversation)]


def test_a_response_may_lack_its_end_and_have_several(tiny: RewardModel) -> None:
    for make in (policies.chatml, policies.llama, policies.thinking):
        policy = make(tiny.folder)
        prompt = policy.apply_chat_template(chat("Hi"), tokenize=False, add_generation_prompt=True)
        for ending in ("", policy.eos_token, policy.eos_token * 3):
            found = PolicyText(policy).of_ids([policy.encode(prompt + "Hello" + ending, add_special_tokens=False)])
            assert isinstance(found[0], Conversation)
            assert found[0].response.content.removeprefix("<think>\n") == "Hello"
            assert found[0].prompt == parsed(chat("Hi")).messages


def test_the_default_system_prompt_goes_unless_kept(tiny: RewardModel) -> None:
    policy = policies.chatml(tiny.folder)
    text = policy.apply_chat_template(chat("Hi", "Hello"), tokenize=False)
    assert policies.DEFAULT_SYSTEM in text
    assert PolicyText(policy).of_text(text) == parsed(chat("Hi", "Hello"))
    kept = PolicyText(policy, keep_default_system=True).of_text(text)
    assert [message.role for message in kept.messages] == ["system", "user", "assistant"]
    own = [{"role": "system", "content": "Be kind."}, *chat("Hi", "Hello")]
    assert PolicyText(policy).of_text(policy.apply_chat_template(own, tokenize=False)) == parsed(own)


def test_thoughts_are_kept_here_and_stripped_where_asked_for(tiny: RewardModel) -> None:
    policy = policies.thinking(tiny.folder)
    prompt = policy.apply_chat_template(chat("Hi"), tokenize=False, add_generation_prompt=True)
    found = PolicyText(policy).of_text(prompt + "Hm.\n</think>\n\nHello</s>")
    assert found.response.content == "<think>\nHm.\n</think>\n\nHello"


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<think>a</think>b", "b"),
        ("<think>\na\n</think>\n\nb c ", "b c "),
        ("a</think>b", "b"),
        ("  <think>cut off", ""),
        ("<think>a</think><think>b</think>c", "c"),
        ("no <think> at the start", "no <think> at the start"),
        ("", ""),
    ],
)
def test_without_thinking(text: str, answer: str) -> None:
    assert without_thinking(text) == answer


def test_a_text_that_ends_before_a_response_is_refused(tiny: RewardModel) -> None:
    policy = policies.chatml(tiny.folder)
    text = policy.apply_chat_template(chat("Hi"), tokenize=False)
    with pytest.raises(ConversationError, match="no response to score"):
        PolicyText(policy).of_text(text)
    empty = policy.apply_chat_template(chat("Hi"), tokenize=False, add_generation_prompt=True)
    assert PolicyText(policy).of_text(empty).response.content == ""


def test_one_wrong_sequence_is_told_and_the_others_are_read(tiny: RewardModel) -> None:
    policy = policies.chatml(tiny.folder)
    good = ids_of(policy, CHATS[0])
    found = PolicyText(policy).of_ids([good, [], [1, 10**6], [-1], plain_ids(policy, "no chat"), good])
    assert found[0] == found[-1] == parsed(CHATS[0])
    assert [type(item) for item in found[1:4]] == [TokenIdsError] * 3
    assert "is policy_tokenizer the policy's" in str(found[2])
    assert isinstance(found[4], ConversationError)
    assert "no chat" not in str(found[4])


def test_chatml_is_read_without_a_chat_template(tiny: RewardModel) -> None:
    policy = PolicyText(policies.plain(tiny.folder))
    assert policy.of_text("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYo") == parsed(chat("Hi", "Yo"))


@pytest.mark.parametrize("days", [-1, 0, 1])
def test_a_template_may_write_the_date(tiny: RewardModel, days: int) -> None:
    """A prompt may have been rendered before midnight, or where it is another day."""
    tokenizer = policies.dated(tiny.folder)
    day = date.today() + timedelta(days=days)
    template = template_of_day(tokenizer.chat_template, day)
    text = tokenizer.apply_chat_template(chat("Hi", "Hello"), chat_template=template, tokenize=False)
    assert str(day.year) in text
    assert PolicyText(tokenizer).of_text(text) == parsed(chat("Hi", "Hello"))
    if not days:
        assert text == tokenizer.apply_chat_template(chat("Hi", "Hello"), tokenize=False)


@pytest.mark.parametrize("tokenizer", ["/no/such/folder", 7, object()])
def test_an_unknown_tokenizer_is_a_clear_error(tokenizer: Any) -> None:
    with pytest.raises(PolicyTokenizerError, match="policy_tokenizer"):
        PolicyText.from_pretrained(tokenizer)


IDS = torch.tensor([[7, 8, 9, 2, 2], [2, 2, 2, 7, 2], [7, 2, 8, 9, 5]])
MASK = torch.tensor([[1, 1, 1, 0, 0], [0, 0, 0, 1, 1], [1, 1, 1, 1, 1]])


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.int32])
def test_padding_is_what_the_mask_says_whatever_its_id(dtype: torch.dtype) -> None:
    assert unpadded(IDS, MASK.to(dtype)) == [[7, 8, 9], [7, 2], [7, 2, 8, 9, 5]]
    assert unpadded(IDS.to(torch.int32)) == IDS.tolist()
    assert unpadded(IDS, torch.zeros_like(MASK)) == [[], [], []]
    assert unpadded(torch.empty(0, 5, dtype=torch.int64), torch.empty(0, 5, dtype=torch.int64)) == []


def test_packed_sequences_come_apart() -> None:
    packed = torch.tensor([7, 8, 9, 7, 2, 5])
    expected = [[7, 8, 9], [7], [2, 5]]
    assert unpadded(packed, None, [3, 1, 2]) == expected
    assert unpadded(packed[None], torch.tensor([[1, 1, 1, 2, 3, 3]]), torch.tensor([3, 1, 2])) == expected
    padded = torch.cat([packed, torch.tensor([2, 2])])
    assert unpadded(padded, None, [3, 1, 2], pad_sequence=True) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((IDS.float(), MASK), "sequences holds integers, not float32"),
        ((IDS, MASK.float()), "attention_mask holds integers"),
        ((IDS.tolist(), MASK), "sequences is a tensor, not list"),
        ((IDS, MASK[:2]), r"attention_mask is \[2, 5\] and sequences are \[3, 5\]"),
        ((IDS[0], MASK[0]), "packed ones need packed_seq_lens"),
        ((IDS, torch.tensor([[1, 1, 1, 1, 1], [1, 0, 1, 1, 1], [1, 1, 1, 1, 1]])), "row 1 .* has a hole"),
        ((IDS[0], None, [3, 3]), "add up to 6; there are 5"),
        ((IDS[0], None, [3, 1]), "add up to 4; there are 5 tokens .pad_sequence"),
        ((IDS[0], None, [5, 0]), "positive"),
        ((IDS, None, [5, 5, 5]), "packed sequences are"),
    ],
)
def test_what_does_not_fit_is_refused(arguments: tuple[Tensor, Any, Any], message: str) -> None:
    with pytest.raises(RewardInputError, match=message):
        unpadded(*arguments)
