"""Conversation columns are found or asked for by name, and a bad row has a reason of its own."""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa
import pytest

from jobs.corpus.conversations import ConversationColumns, SystemPrompt, conversations, prompts
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
    assert conversations(data, ConversationColumns.detect(data.schema)) == [CONVERSATION]


def test_columns_of_other_names_are_chosen_by_flag() -> None:
    data = table(chat=[TURNS], question=["hi"], answer=["yes"], messages=[1], response=[3])
    for chosen in (
        ConversationColumns(messages="chat"),
        ConversationColumns(prompt="question", response="answer"),
    ):
        assert conversations(data, ConversationColumns.detect(data.schema, chosen)) == [CONVERSATION]


@pytest.mark.parametrize(
    ("data", "chosen", "reason"),
    [
        (table(text=["x"]), None, r"neither a 'messages' column.*--messages-column.*text \(string\)"),
        (table(messages=[TURNS], prompt=["x"], response=["y"]), None, "has both 'messages' and 'prompt'"),
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
        ConversationColumns.detect(data.schema, chosen)


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
    first, *others = conversations(data, ConversationColumns.detect(data.schema))
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
        columns = ConversationColumns.detect(data.schema, chosen)
        assert conversations(data, columns) == [Conversation(CONVERSATION.messages, "Beijing.\nIt is.")]
        system = SystemPrompt(text="Be brief.")
        (with_system,) = conversations(data, columns, system)
        assert isinstance(with_system, Conversation)
        assert with_system.reference == "Beijing.\nIt is."
        asked = prompts(data, ConversationColumns(prompt="prompt", reference="answer"))
        assert asked == [Conversation(CONVERSATION.messages[:1], "Beijing.\nIt is.")]


def test_a_row_without_a_reference_has_none() -> None:
    data = table(messages=[TURNS, TURNS], answer=["x", None])
    columns = ConversationColumns.detect(data.schema, ConversationColumns(reference="answer"))
    assert conversations(data, columns) == [Conversation(CONVERSATION.messages, "x"), CONVERSATION]


def test_a_reference_column_that_is_wrong_is_named() -> None:
    with pytest.raises(CorpusError, match="no column 'answer' for --reference-column"):
        ConversationColumns.detect(table(messages=[TURNS]).schema, ConversationColumns(reference="answer"))
    with pytest.raises(CorpusError, match="--reference-column takes a string or a list of"):
        ConversationColumns.detect(table(messages=[TURNS], n=[1]).schema, ConversationColumns(reference="n"))


def test_without_a_reference_a_runs_identity_is_the_one_of_old() -> None:
    assert ConversationColumns(messages="m").identity == {"messages": "m", "prompt": None, "response": None}
    assert ConversationColumns(messages="m", reference="r").identity["reference"] == "r"


def test_a_column_in_sharegpts_layout_is_told_what_to_rename() -> None:
    data = table(conversations=[[{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]])
    with pytest.raises(CorpusError, match="rename 'from' to 'role' and 'value' to 'content'"):
        ConversationColumns.detect(data.schema, ConversationColumns(messages="conversations"))
