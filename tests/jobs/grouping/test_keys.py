"""Rows of one prompt, or of one value, have one key; others have another."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest

from jobs.corpus.conversations import ConversationColumns
from jobs.grouping.keys import GroupKeys
from tests.conftest import chat


def keys(values: list[Any], kind: pa.DataType | None = None) -> list[tuple[int, ...]]:
    table = pa.table({"group": pa.array(values, kind)})
    return [tuple(key) for key in GroupKeys("group", None).of(table).tolist()]


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (["a", "b", "a", None], pa.string()),
        (["a", "b", "a", None], pa.dictionary(pa.int32(), pa.string())),
        ([1, 2, 1, None], pa.int16()),
        ([0.5, 1.5, 0.5, None], pa.float64()),
        ([True, False, True, None], pa.bool_()),
        ([b"\xff", b"a", b"\xff", None], pa.binary()),
        ([["a"], ["b"], ["a"], None], pa.list_(pa.string())),
        ([{"x": 1}, {"x": 2}, {"x": 1}, None], pa.struct([("x", pa.int64())])),
    ],
)
def test_equal_values_of_any_type_have_one_key_and_null_has_none(values: list[Any], kind: pa.DataType) -> None:
    first, second, again, null = keys(values, kind)
    assert first == again
    assert first != second
    assert null == (0, 0)
    assert (0, 0) not in (first, second)


def test_integers_of_two_widths_have_one_key() -> None:
    assert keys([7], pa.int8()) == keys([7], pa.int64())


def test_no_rows_have_no_keys() -> None:
    assert keys([], pa.string()) == []
    empty = pa.table({"messages": pa.array([], pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())])))})
    assert GroupKeys(None, ConversationColumns(messages="messages")).of(empty).shape == (0, 2)


def test_a_prompt_that_cannot_be_read_has_no_key() -> None:
    by_prompt = GroupKeys(None, ConversationColumns(prompt="prompt", response="response"))
    bad: list[Any] = [[None], [{"role": "user", "content": None}], None, chat("hi")]
    assert [any(key) for key in by_prompt.of(pa.table({"prompt": bad})).tolist()] == [False, False, False, True]
    raw = pa.array([b"a", b"caf\xe9", b"a"], pa.binary())
    latin = pa.Array.from_buffers(pa.string(), 3, raw.buffers())
    for key in (by_prompt, GroupKeys("prompt", None)):
        first, bad_key, again = key.of(pa.table({"prompt": latin})).tolist()
        assert first == again != bad_key == [0, 0]


def test_a_prompt_is_the_same_as_text_or_as_messages() -> None:
    by_prompt = GroupKeys(None, ConversationColumns(prompt="prompt", response="response"))
    by_messages = GroupKeys(None, ConversationColumns(messages="messages"))
    texts = pa.table({"prompt": ["hi", "ho", None]})
    turns = pa.table({"messages": [chat("hi", "a"), chat("ho", "b"), chat("hi", "c"), None]})
    lists = pa.table({"prompt": [chat("hi"), chat("ho")]})
    hi, ho, null = by_prompt.of(texts).tolist()
    assert by_messages.of(turns).tolist() == [hi, ho, hi, [0, 0]]
    assert by_prompt.of(lists).tolist() == [hi, ho]
    assert null == [0, 0]
