"""Every published layout of several responses to one prompt makes the same conversations."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest

from jobs.corpus.candidates import CandidateColumns, candidate_rows
from jobs.corpus.conversations import ConversationColumns, SystemPrompt, conversations
from jobs.corpus.readings import ReadingChoice, conversation_reading, reading_of
from jobs.errors import CorpusError
from serve_app.reward_model import Conversation, ConversationError, Message
from tests.conftest import chat

NOTHING = ReadingChoice(ConversationColumns())
TWO = [Conversation.parse(chat("hi", "yes")), Conversation.parse(chat("hi", "no"))]
ULTRAFEEDBACK: dict[str, Any] = {
    "source": "evol",
    "instruction": "hi",
    "models": ["a", "b"],
    "completions": [{"model": "a", "overall_score": 4.0, "response": "yes"}, {"model": "b", "response": "no"}],
}
NECTAR: dict[str, Any] = {
    "prompt": "\n\nHuman: hi\n\nAssistant: ",
    "answers": [{"answer": "yes", "model": "a", "rank": 1.0}, {"answer": "no", "model": "b", "rank": 2.0}],
}


def rows_of(data: pa.Table, choice: ReadingChoice = NOTHING) -> list[Any]:
    columns = reading_of(data.schema, choice)
    assert isinstance(columns, CandidateColumns)
    return candidate_rows(data, columns)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "hi", "responses": ["yes", "no"]},
        {"prompt": chat("hi"), "responses": ["yes", "no"]},
        {"prompt": "hi", "responses": [chat("hi", "yes"), chat("hi", "no")]},
        {"prompt": "hi", "responses": [chat("hi", "yes")[1:], chat("hi", "no")[1:]]},
        {"prompt": "hi", "responses": [chat("hi", "yes")[1], chat("hi", "no")[1]]},
        {"responses": [chat("hi", "yes"), chat("hi", "no")]},
        ULTRAFEEDBACK,
        NECTAR,
    ],
    ids=["texts", "messages prompt", "whole", "turns", "one message", "no prompt", "ultrafeedback", "nectar"],
)
def test_every_layout_makes_the_same_conversations(row: dict[str, Any]) -> None:
    assert rows_of(pa.Table.from_pylist([row])) == [TWO]


def test_rows_and_candidates_that_cannot_be_read_have_their_reasons() -> None:
    data = pa.table(
        {
            "prompt": ["hi", None, "hi", "hi"],
            "responses": pa.array([["yes", None, "no"], ["yes"], [], None], pa.list_(pa.string())),
        }
    )
    (first, without, empty, null) = rows_of(data)
    assert [first[0], first[2]] == TWO
    assert str(first[1]) == "it is null"
    assert "the row has no prompt" in str(without[0])
    assert (str(empty), str(null)) == ("the list of responses is empty", "the responses are null")
    broken = pa.array([b"\xff"], pa.binary()).cast(pa.string(), safe=False).view(pa.string())
    lists = pa.ListArray.from_arrays(pa.array([0, 1], pa.int32()), broken)
    (found,) = rows_of(pa.table({"prompt": ["hi"], "responses": lists}))
    assert isinstance(found, ConversationError)
    assert "responses: " in str(found)


def test_all_candidates_have_the_system_message_and_the_reference() -> None:
    data = pa.table({"prompt": ["hi"], "responses": [["yes", "no"]], "answer": ["sure"]})
    (found,) = candidate_rows(
        data, CandidateColumns("responses", "prompt", reference="answer"), SystemPrompt(text="Judge.")
    )
    expected = [Conversation((Message("system", "Judge."), *one.messages), "sure") for one in TWO]
    assert found == expected


@pytest.mark.parametrize(
    ("row", "num_readings"),
    [
        ({"prompt": "hi", "response": "a", "responses": ["a"]}, 2),
        ({"prompt": "hi", "responses": ["a"], "completions": ["b"]}, 2),
        ({"prompt": "hi", "instruction": "ho", "responses": ["a"]}, 2),
        ({"prompt": "hi", "chosen": "a", "rejected": "b", "messages": chat("hi", "a"), "responses": ["a"]}, 3),
    ],
)
def test_candidates_beside_another_reading_are_refused(row: dict[str, Any], num_readings: int) -> None:
    schema = pa.Table.from_pylist([row]).schema
    with pytest.raises(CorpusError, match=f"can be read in {num_readings} ways"):
        reading_of(schema, NOTHING)


def test_candidates_are_chosen_by_flag() -> None:
    schema = pa.Table.from_pylist([{"prompt": "hi", "response": "a", "responses": ["a"], "drafts": ["b"]}]).schema
    prompt = ConversationColumns(prompt="prompt")
    expected = CandidateColumns("responses", "prompt")
    assert reading_of(schema, ReadingChoice(ConversationColumns(), reads="candidates")) == expected
    named = CandidateColumns("drafts", "prompt")
    assert reading_of(schema, ReadingChoice(prompt, responses="drafts")) == named
    assert reading_of(schema, ReadingChoice(ConversationColumns(), responses="drafts")) == named
    assert reading_of(schema, ReadingChoice(ConversationColumns(), reads="conversations")) == ConversationColumns(
        prompt="prompt", response="response"
    )
    with pytest.raises(CorpusError, match="'response' is string; --responses-column takes a list of strings"):
        reading_of(schema, ReadingChoice(ConversationColumns(), responses="response"))
    with pytest.raises(CorpusError, match="no column 'others' for --responses-column"):
        reading_of(schema, ReadingChoice(ConversationColumns(), responses="others"))


def test_candidates_are_no_conversations_for_a_job_that_reads_those() -> None:
    schema = pa.Table.from_pylist([{"prompt": "hi", "responses": ["a"]}]).schema
    with pytest.raises(CorpusError, match=r"several responses a row, in 'responses'.*jobs\.rank makes a row of each"):
        conversation_reading(schema)


def test_one_response_a_row_is_read_as_before() -> None:
    data = pa.Table.from_pylist([{"prompt": "hi", "response": "yes", "responses": "no list"}])
    columns = reading_of(data.schema, NOTHING)
    assert isinstance(columns, ConversationColumns)
    assert conversations(data, columns) == TWO[:1]
