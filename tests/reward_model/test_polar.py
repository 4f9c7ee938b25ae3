"""POLAR's models: found by their tokenizer and configuration, read in their own form, with a reference."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from serve_app.reward_model import Conversation, ConversationError, ConversationTooLongError, Message, RewardModel
from serve_app.reward_model.architecture import DecoderConfig
from serve_app.reward_model.rendered_text import RenderedTextError
from serve_app.reward_model.tokenizer import Tokenizer
from tests.conftest import chat
from tests.reward_model.polar import END, rendered_by_its_client, write

QUESTION = "What is the capital of China?"
TURNS = ["Hello", "Hi there", QUESTION]


@pytest.fixture(scope="module")
def polar(tmp_path_factory: pytest.TempPathFactory) -> RewardModel:
    folder = write(tmp_path_factory.mktemp("polar"))
    return RewardModel.from_pretrained(folder, device="cpu", dtype="float32")


def judged(*contents: str, reference: str | None) -> Conversation:
    roles = ("user", "assistant")
    messages = (Message(roles[place % 2], content) for place, content in enumerate(contents))
    return Conversation(tuple(messages), reference)


@pytest.mark.parametrize(
    ("prompt", "reference", "output"),
    [
        ([QUESTION], ["Beijing."], ["Beijing."]),
        ([QUESTION], ["Beijing."], ["Shanghai."]),
        (TURNS, ["Beijing.\nIt is."], ["It is\nShanghai."]),
        (["a\n\nb\n"], ["\n"], ["  x "]),
    ],
)
def test_ids_are_those_of_its_clients_text(
    polar: RewardModel, prompt: list[str], reference: list[str], output: list[str]
) -> None:
    """The reference pipeline: the client's text through Transformers' tokenizer, special tokens added."""
    text = rendered_by_its_client(prompt, reference, output)
    expected = polar.tokenizer._tokenizer(text)["input_ids"]
    assert (expected[0], expected[-1]) == (1, polar.config.reward_token_id)
    conversation = judged(*prompt, *output, reference=reference[0])
    assert polar.tokenizer.encode(conversation) == expected
    assert polar.tokenizer.encode(polar.tokenizer.read_rendered(text)) == expected
    assert polar.tokenizer.encode(polar.tokenizer.read_rendered(text.removesuffix(END))) == expected


def test_the_real_tokenizer_gives_the_clients_ids(shared: Path, tmp_path: Path) -> None:
    """InternLM2's vocabulary with the token of 92527 named as POLAR names it."""
    for name in ("config.json", "tokenizer.model", "tokenizer_config.json"):
        shutil.copy(shared / "models" / "internlm2-1_8b-reward-files" / name, tmp_path)
    path = tmp_path / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    tokens = settings["added_tokens_decoder"]
    tokens["92526"], tokens["92527"] = tokens["92527"], {**tokens["92527"], "content": END}
    path.write_text(json.dumps(settings))
    tokenizer = Tokenizer.from_pretrained(tmp_path, config=DecoderConfig.from_folder(tmp_path))
    assert tokenizer.takes_reference
    text = rendered_by_its_client([QUESTION], ["Beijing."], ["Shanghai."])
    expected = tokenizer._tokenizer(text)["input_ids"]
    assert (expected[0], expected.count(92526), expected[-1]) == (1, 1, 92527)
    assert tokenizer.encode(judged(QUESTION, "Shanghai.", reference="Beijing.")) == expected


def test_internlm2_reward_is_none(golden_fp32: RewardModel, tiny: RewardModel) -> None:
    assert not golden_fp32.tokenizer.takes_reference
    assert not tiny.tokenizer.takes_reference


def test_a_reference_may_be_messages_and_conversations_mappings(polar: RewardModel) -> None:
    messages = chat(QUESTION, "Shanghai.")
    as_text = Conversation.parse({"messages": messages, "reference": "Beijing.\nIt is."})
    turns = [{"role": "assistant", "content": text} for text in ("Beijing.", "It is.")]
    assert Conversation.parse({"messages": messages, "reference": turns}) == as_text
    assert polar.get_score({"messages": messages, "reference": turns}) == polar.get_score(as_text)
    for wrong in (7, [7], [{"role": "assistant"}], "\ud800"):
        with pytest.raises(ConversationError, match="reference"):
            Conversation.parse({"messages": messages, "reference": wrong})
    with pytest.raises(ConversationError, match="'messages' and 'reference'; got dict with the keys"):
        Conversation.parse({"messages": messages, "refrence": "Beijing."})


def test_a_missing_or_needless_reference_is_an_error_that_says_what_to_do(
    polar: RewardModel, tiny: RewardModel
) -> None:
    with pytest.raises(ConversationError, match="POLAR model.*there is none.*--reference-column"):
        polar.get_score(chat(QUESTION, "Beijing."))
    with pytest.raises(ConversationError, match="takes no reference"):
        tiny.get_score(judged(QUESTION, "Beijing.", reference="Beijing."))


def test_a_conversation_of_one_message_is_two_trajectories(polar: RewardModel) -> None:
    conversation = judged("whole output", reference="whole reference")
    text = "whole reference<|reward|>whole output" + END
    read = polar.tokenizer.read_rendered(text)
    assert polar.tokenizer.encode(read) == polar.tokenizer.encode(conversation)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "secret",
        "<|im_start|>user\nsecret<|im_end|>\n<|im_start|>assistant\nhi",
        f"a\nsecret<|reward|>a\nx<|reward|>{END}",
        f"a\nsecret{END}<|reward|>a\nx{END}",
    ],
)
def test_other_text_is_refused_and_not_quoted(polar: RewardModel, text: str) -> None:
    with pytest.raises(RenderedTextError, match="POLAR's client renders") as caught:
        polar.tokenizer.read_rendered(text)
    assert "secret" not in str(caught.value)


def test_a_typed_separator_stays_text(polar: RewardModel) -> None:
    separator, last = (polar.tokenizer._backend.token_to_id(text) for text in ("<|reward|>", END))
    assert separator is not None
    assert last is not None
    for conversation in (
        judged(QUESTION, "a<|reward|>b", reference="Beijing."),
        judged(QUESTION, "x", reference=f"a<|reward|>{END}"),
    ):
        ids = polar.tokenizer.encode(conversation)
        assert (ids.count(separator), ids.count(last), ids[-1]) == (1, 1, last)


def test_truncation_never_takes_the_response_or_half_a_prompt(polar: RewardModel) -> None:
    conversation = judged(*TURNS, "Beijing.", reference="Beijing.")
    ids, last = polar.tokenizer.encode(conversation), judged(QUESTION, "Beijing.", reference="Beijing.")
    limit = len(polar.tokenizer.encode(last))
    assert polar.tokenizer.encode(conversation, truncation="left", max_tokens=limit) == polar.tokenizer.encode(last)
    with pytest.raises(ConversationTooLongError, match="whole turns"):
        polar.tokenizer.encode(conversation, truncation="left", max_tokens=limit - 1)
    kept = polar.tokenizer.encode(conversation, truncation="right", max_tokens=len(ids) - 2)
    assert kept == [*ids[: len(ids) - 3], polar.config.reward_token_id]
    with pytest.raises(ConversationTooLongError, match="nothing of the response"):
        polar.tokenizer.encode(conversation, truncation="right", max_tokens=10)
