"""Conversation columns are found or asked for by name, and a bad row has a reason of its own."""

from __future__ import annotations

import datetime as dt
import json
from typing import Any

import pyarrow as pa
import pytest

from jobs.corpus.conversations import ConversationColumns, SystemPrompt, conversations, prompts
from jobs.corpus.readings import conversation_reading
from jobs.errors import CorpusError
from serve_app.reward_model import Conversation, ConversationError

TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
CONVERSATION = Conversation.parse(TURNS)


def table(**columns: Any) -> pa.Table:
    return pa.table(columns)


@pytest.mark.parametrize(
    "data",
    [
        table(messages=[TURNS]),
        table(messages=[json.dumps(TURNS)]),
        table(messages=pa.array([json.dumps(TURNS)]).dictionary_encode()),
        table(messages=pa.array([json.dumps(TURNS)], pa.large_string())),
        table(prompt=["hi"], response=["yes"]),
        table(prompt=[TURNS[:1]], response=["yes"]),
        table(messages=pa.array([TURNS], pa.list_view(pa.struct({"role": pa.string(), "content": pa.string()})))),
        table(id=[1], messages=[[turn | {"name": None} for turn in TURNS]]),
    ],
    ids=["structs", "json", "dictionary", "large", "prompt text", "prompt messages", "list view", "null fields"],
)
def test_every_layout_makes_the_same_conversation(data: pa.Table) -> None:
    assert conversations(data, conversation_reading(data.schema)) == [CONVERSATION]


def test_columns_of_other_names_are_chosen_by_flag() -> None:
    data = table(chat=[TURNS], question=["hi"], answer=["yes"], messages=[1], response=[3])
    for chosen in (
        ConversationColumns(messages="chat"),
        ConversationColumns(prompt="question", response="answer"),
    ):
        assert conversations(data, conversation_reading(data.schema, chosen)) == [CONVERSATION]


@pytest.mark.parametrize(
    ("data", "chosen", "reason"),
    [
        (table(text=["x"]), None, r"neither a 'messages' column.*--messages-column.*text \(string\)"),
        (table(messages=[TURNS], prompt=["x"], response=["y"]), None, "can be read in 2 ways"),
        (table(messages=[1.5]), None, r"column 'messages' is double; --messages-column takes a list"),
        (table(messages=[["x"]]), None, "column 'messages' is list"),
        (table(prompt=["x"], response=[TURNS]), None, "column 'response' is list.*--response-column takes a string"),
        (table(messages=[[{"role": "user", "content": ["x"]}]]), None, "column 'messages' is list"),
        (table(a=["x"]), ConversationColumns(messages="b"), "there is no column 'b' for --messages-column"),
        (table(a=["x"]), ConversationColumns(prompt="a"), "there is no column 'response'"),
        (table(a=["x"]), ConversationColumns(messages="a", prompt="a"), "excludes"),
    ],
)
def test_a_schema_that_is_unclear_is_refused_with_the_flags_to_use(
    data: pa.Table, chosen: ConversationColumns | None, reason: str
) -> None:
    with pytest.raises(CorpusError, match=f"(?s){reason}"):
        conversation_reading(data.schema, chosen)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (table(messages=pa.array([None], pa.list_(pa.struct({"role": pa.string(), "content": pa.string()})))), "null"),
        (table(messages=["not json"]), "not JSON"),
        (table(messages=['{"role": "user"}']), "not a list"),
        (table(messages=["[" * 100_000]), "not JSON"),
        (table(messages=["[]"]), "empty"),
        (table(messages=['[{"role": "user", "content": "x", "extra": 1}]']), "unknown keys"),
        (table(messages=['[{"role": "user", "content": "\\ud800"}]']), "not valid Unicode"),
        (table(messages=[[{"role": "user", "content": None}]]), "content is NoneType"),
        (table(prompt=pa.array([None], pa.string()), response=["y"]), "prompt is null"),
        (table(prompt=["x"], response=pa.array([None], pa.string())), "response is null"),
    ],
)
def test_a_bad_row_has_its_reason_and_leaves_the_others(data: pa.Table, reason: str) -> None:
    if "messages" in data.column_names and pa.types.is_string(data.schema.field("messages").type):
        data = pa.concat_tables([data, table(messages=[json.dumps(TURNS)])])
    first, *others = conversations(data, conversation_reading(data.schema))
    assert isinstance(first, ConversationError)
    assert reason in str(first)
    assert all(other == CONVERSATION for other in others)


@pytest.mark.parametrize(
    "cells",
    [["Beijing.\nIt is."], [[{"role": "assistant", "content": text} for text in ("Beijing.", "It is.")]]],
    ids=["text", "messages"],
)
def test_a_reference_column_is_read_where_it_is_named(cells: list[Any]) -> None:
    data = table(messages=[TURNS], prompt=["hi"], response=["yes"], answer=cells)
    for chosen in (
        ConversationColumns(messages="messages", reference="answer"),
        ConversationColumns(prompt="prompt", reference="answer"),
    ):
        columns = conversation_reading(data.schema, chosen)
        assert conversations(data, columns) == [Conversation(CONVERSATION.messages, "Beijing.\nIt is.")]
        system = SystemPrompt(text="Be brief.")
        (with_system,) = conversations(data, columns, system)
        assert isinstance(with_system, Conversation)
        assert with_system.reference == "Beijing.\nIt is."
        asked = prompts(data, ConversationColumns(prompt="prompt", reference="answer"))
        assert asked == [Conversation(CONVERSATION.messages[:1], "Beijing.\nIt is.")]


def test_a_row_without_a_reference_has_none() -> None:
    data = table(messages=[TURNS, TURNS], answer=["x", None])
    columns = conversation_reading(data.schema, ConversationColumns(reference="answer"))
    assert conversations(data, columns) == [Conversation(CONVERSATION.messages, "x"), CONVERSATION]


def test_a_reference_column_that_is_wrong_is_named() -> None:
    with pytest.raises(CorpusError, match="no column 'answer' for --reference-column"):
        conversation_reading(table(messages=[TURNS]).schema, ConversationColumns(reference="answer"))
    with pytest.raises(CorpusError, match="--reference-column takes a string or a list of"):
        conversation_reading(table(messages=[TURNS], n=[1]).schema, ConversationColumns(reference="n"))


def test_without_a_reference_a_runs_identity_is_the_one_of_old() -> None:
    assert ConversationColumns(messages="m").identity == {"messages": "m", "prompt": None, "response": None}
    assert ConversationColumns(messages="m", reference="r").identity["reference"] == "r"


SHAREGPT = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]


@pytest.mark.parametrize(
    "data",
    [
        table(conversations=[SHAREGPT]),
        table(conversations=[json.dumps(SHAREGPT)]),
        table(conversations=[[turn | {"weight": None} for turn in SHAREGPT]]),
        table(conversations=[TURNS]),
        table(conversations=[[turn | {"role": None, "content": None} for turn in SHAREGPT]]),
    ],
    ids=["structs", "json", "null fields", "roles", "both layouts"],
)
def test_sharegpts_layout_is_a_conversation_as_any(data: pa.Table) -> None:
    assert conversations(data, conversation_reading(data.schema)) == [CONVERSATION]


def test_sharegpts_speakers_are_named_as_ours_and_unknown_ones_stay() -> None:
    turns = [{"from": name, "value": "x"} for name in ("system", "Human", "gpt", "function_call")]
    (row,) = conversations(table(messages=[turns]), ConversationColumns(messages="messages"))
    assert isinstance(row, Conversation)
    assert [message.role for message in row.messages] == ["system", "user", "assistant", "function_call"]
    (bad,) = conversations(table(messages=[[{"from": None, "value": "x"}]]), ConversationColumns(messages="messages"))
    assert "role is NoneType" in str(bad)


def test_a_transcript_is_a_conversation() -> None:
    texts = table(messages=["\n\nHuman: hi \n\nAssistant: yes"])
    assert conversations(texts, ConversationColumns(messages="messages")) == [CONVERSATION]


def invalid(*texts: bytes) -> pa.Array:
    """Strings that are not valid UTF-8, as other tools write them."""
    return pa.Array.from_buffers(pa.string(), len(texts), pa.array(texts, pa.binary()).buffers())


LATIN = invalid(b"hi", b"caf\xe9")


def in_messages(contents: pa.Array) -> pa.Array:
    """A list of one message for each content."""
    roles = pa.array(["user"] * len(contents))
    return pa.ListArray.from_arrays(
        list(range(len(contents) + 1)), pa.StructArray.from_arrays([roles, contents], ["role", "content"])
    )


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (table(messages=in_messages(LATIN)), "messages: the text is not valid UTF-8 (byte 3"),
        (table(messages=invalid(json.dumps(TURNS[:1]).encode(), b"\xff")), "messages: the text is not valid UTF-8"),
        (table(prompt=LATIN, response=["a", "b"]), "prompt: the text is not valid UTF-8"),
        (table(prompt=LATIN.dictionary_encode(), response=["a", "b"]), "prompt: the text is not valid UTF-8"),
        (table(prompt=["hi", "ho"], response=LATIN), "response: the text is not valid UTF-8"),
        (table(prompt=[TURNS[:1], [None]], response=["a", "b"]), "message 0 is NoneType"),
        (table(prompt=[TURNS[:1], [{"role": None, "content": "x"}]], response=["a", "b"]), "role is NoneType"),
        (table(messages=[TURNS, [None]]), "message 0 is NoneType"),
        (table(messages=[TURNS, []]), "empty"),
        (table(messages=[json.dumps(TURNS), "{}"]), "not a list"),
        (table(messages=[json.dumps(TURNS), "3"]), "not a list"),
        (table(messages=[json.dumps(TURNS), "[1]"]), "message 0 is int"),
        (table(messages=[json.dumps(TURNS), '[{"role": 1, "content": "x"}]']), "role is int"),
        (table(messages=[json.dumps(TURNS), "9" * 5000]), "not JSON"),
        (
            table(messages=[[*TURNS, {"at": dt.datetime(1, 1, 1)}][:2], [TURNS[0] | {"at": dt.datetime(1, 1, 1)}]]),
            "unknown keys ['at']",
        ),
    ],
)
def test_a_cell_that_cannot_be_read_is_that_rows_error(data: pa.Table, reason: str) -> None:
    good, bad = conversations(data, conversation_reading(data.schema))
    assert isinstance(good, Conversation)
    assert isinstance(bad, ConversationError)
    assert reason in str(bad)


def test_references_and_system_prompts_that_cannot_be_read_are_that_rows_error() -> None:
    data = table(messages=[TURNS, TURNS], extra=LATIN)
    named = ConversationColumns(messages="messages", reference="extra")
    for rows in (
        conversations(data, named),
        conversations(data, ConversationColumns(messages="messages"), SystemPrompt(column="extra")),
        prompts(table(messages=[TURNS[:1]] * 2, extra=LATIN), named),
    ):
        good, bad = rows
        assert isinstance(good, Conversation)
        assert "not valid UTF-8" in str(bad)
