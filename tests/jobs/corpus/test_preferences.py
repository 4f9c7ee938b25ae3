"""Every published layout of a preference pair makes the same two conversations."""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa
import pytest

from jobs.corpus.conversations import ConversationColumns, SystemPrompt
from jobs.corpus.preferences import PreferenceColumns, preference_pairs
from jobs.corpus.readings import ReadingChoice, reading_of
from jobs.errors import CorpusError
from serve_app.reward_model import Conversation, ConversationError, Message
from tests.conftest import chat

NOTHING = ReadingChoice(ConversationColumns())
YES, NO = chat("hi", "yes"), chat("hi", "no")
PAIR = (Conversation.parse(YES), Conversation.parse(NO))
PROMPT = chat("hi")
HUMAN = "\n\nHuman: hi"
TURN = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))


def pairs_of(data: pa.Table) -> list[Any]:
    columns = reading_of(data.schema, NOTHING)
    assert isinstance(columns, PreferenceColumns)
    return preference_pairs(data, columns)


@pytest.mark.parametrize(
    "row",
    [
        {"chosen": YES, "rejected": NO},
        {"chosen": json.dumps(YES), "rejected": json.dumps(NO)},
        {"prompt": "hi", "chosen": YES, "rejected": NO},
        {"prompt": PROMPT, "chosen": YES, "rejected": NO},
        {"prompt": "hi", "chosen": YES[1:], "rejected": NO[1:]},
        {"prompt": PROMPT, "chosen": YES[1:], "rejected": NO[1:]},
        {"prompt": "hi", "chosen": "yes", "rejected": "no"},
        {"prompt": PROMPT, "chosen": "yes", "rejected": "no"},
        {"chosen": f"{HUMAN}\n\nAssistant: yes", "rejected": f"{HUMAN} \n\nAssistant: no\n"},
        {"prompt": f"{HUMAN}\n\nAssistant:", "chosen": " yes", "rejected": " no"},
        {"prompt": HUMAN, "chosen": f"{HUMAN}\n\nAssistant: yes", "rejected": "no"},
        {"prompt": None, "chosen": YES, "rejected": NO},
    ],
    ids=[
        "messages", "json", "ultrafeedback", "prompt in both", "text and turns", "trl", "texts", "messages and texts",
        "hh-rlhf", "hh split", "hh prompt and whole", "null prompt",
    ],
)  # fmt: skip
def test_every_layout_makes_the_same_pair(row: dict[str, Any]) -> None:
    assert pairs_of(pa.Table.from_pylist([row])) == [PAIR]


def test_turns_of_a_transcript_keep_their_order_and_their_text() -> None:
    text = "\n\nHuman: a\n\nb: Human: c\n\nAssistant: [1]\n\nHuman: d\n\nAssistant:"
    ((chosen, rejected),) = pairs_of(pa.table({"chosen": [text], "rejected": [text]}))
    assert isinstance(chosen, Conversation)
    told = [("user", "a\n\nb: Human: c"), ("assistant", "[1]"), ("user", "d"), ("assistant", "")]
    assert [(message.role, message.content) for message in chosen.messages] == told
    assert rejected == chosen


def test_a_prompt_after_a_system_message_and_a_response_that_looks_like_a_list() -> None:
    system = {"role": "system", "content": "Be brief."}
    ((chosen, _),) = pairs_of(pa.table({"prompt": [" hi"], "chosen": [[system, *YES]], "rejected": [[system, *NO]]}))
    assert chosen == Conversation.parse([system, *YES])
    ((chosen, _),) = pairs_of(pa.table({"prompt": ["hi"], "chosen": ['[{"a": 1}]'], "rejected": ["[no"]}))
    assert chosen == Conversation((Message("user", "hi"), Message("assistant", '[{"a": 1}]')))


@pytest.mark.parametrize(
    ("row", "reasons"),
    [
        ({"prompt": "hi", "chosen": None, "rejected": "no"}, ["it is null", None]),
        ({"prompt": None, "chosen": "yes", "rejected": "no"}, ["the row has no prompt", "the row has no prompt"]),
        ({"chosen": "yes", "rejected": "no"}, ["not messages or a transcript", "not messages or a transcript"]),
        ({"chosen": YES[1:], "rejected": NO}, ["no user's turn comes before", None]),
        ({"prompt": None, "chosen": YES[1:], "rejected": NO}, ["no user's turn comes before", None]),
        ({"prompt": "ho", "chosen": YES, "rejected": NO[1:]}, ["does not contain the prompt", None]),
        ({"prompt": [None], "chosen": YES, "rejected": NO}, ["prompt: message 0 is NoneType"] * 2),
        ({"chosen": [None, *YES], "rejected": NO}, ["message 0 is NoneType", None]),
        ({"chosen": [], "rejected": NO}, ["empty", None]),
    ],
)
def test_a_side_that_cannot_be_read_has_its_reason(row: dict[str, Any], reasons: list[str | None]) -> None:
    kinds = {name: pa.array([cell]).type for name, cell in row.items()}
    fields = [(name, TURN if isinstance(row[name], list) else pa.string()) for name in kinds]
    (sides,) = pairs_of(pa.Table.from_pylist([row], pa.schema(fields)))
    for side, reason in zip(sides, reasons, strict=True):
        assert isinstance(side, ConversationError) is (reason is not None)
        assert reason is None or reason in str(side)


def test_both_sides_have_the_system_message_and_the_reference() -> None:
    data = pa.table({"chosen": [YES], "rejected": [NO], "answer": ["sure"]})
    columns = PreferenceColumns("chosen", "rejected", reference="answer")
    for side, own in zip(preference_pairs(data, columns, SystemPrompt(text="Judge."))[0], PAIR, strict=True):
        assert side == Conversation((Message("system", "Judge."), *own.messages), "sure")


def test_columns_that_are_named_are_read_without_a_prompt() -> None:
    data = pa.table({"prompt": ["other"], "good": [YES], "rejected": [NO]})
    choice = ReadingChoice(ConversationColumns(), PreferenceColumns("good", "rejected"))
    columns = reading_of(data.schema, choice)
    assert columns == PreferenceColumns("good", "rejected")
    with pytest.raises(CorpusError, match="no column 'chosen' for --chosen-column"):
        reading_of(data.schema, ReadingChoice(ConversationColumns(), reads="pairs"))
