"""A system message in front of each row's conversation, from the command line or a column."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from jobs.corpus.conversations import ConversationColumns, SystemPrompt, conversations
from jobs.errors import CorpusError
from serve_app.reward_model.conversation import Conversation
from serve_app.reward_model.errors import ConversationError
from tests.conftest import chat

PLAIN = chat("hi", "hello")
WITH_SYSTEM = [{"role": "system", "content": "old"}, *PLAIN]


def read(rows: list[dict[str, Any]], prompt: SystemPrompt) -> list[Conversation | ConversationError]:
    return conversations(pa.Table.from_pylist(rows), ConversationColumns(messages="messages"), prompt)


def system_of(conversation: Conversation | ConversationError) -> str | None:
    assert isinstance(conversation, Conversation)
    first = conversation.messages[0]
    assert [message.content for message in conversation.messages[-2:]] == ["hi", "hello"]
    return first.content if first.role == "system" else None


def test_one_text_goes_in_front_of_every_row() -> None:
    found = read(2 * [{"messages": PLAIN}], SystemPrompt.of("Judge code.", None, replaces=False))
    assert [system_of(row) for row in found] == ["Judge code."] * 2


def test_a_file_is_read_and_stripped(tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("\nRate the poem \u8bd7.\n", encoding="utf-8")
    prompt = SystemPrompt.of(f"@{tmp_path}/prompt.txt", None, replaces=False)
    assert prompt.text == "Rate the poem \u8bd7."


def test_a_column_has_a_text_for_each_row_or_none() -> None:
    rows: list[dict[str, Any]] = [{"messages": PLAIN, "domain": "math"}, {"messages": PLAIN, "domain": None}]
    found = read(rows, SystemPrompt.of(None, "domain", replaces=False))
    assert [system_of(row) for row in found] == ["math", None]


def test_a_system_message_that_is_there_is_an_error_of_its_row_alone() -> None:
    rows: list[dict[str, Any]] = [{"messages": WITH_SYSTEM}, {"messages": PLAIN}]
    first, second = read(rows, SystemPrompt.of("new", None, replaces=False))
    assert isinstance(first, ConversationError)
    assert "--replace-system-prompt" in str(first)
    assert system_of(second) == "new"


def test_a_system_message_is_replaced_on_request() -> None:
    (found,) = read([{"messages": WITH_SYSTEM}], SystemPrompt.of("new", None, replaces=True))
    assert system_of(found) == "new"
    assert isinstance(found, Conversation)
    assert len(found.messages) == 3


@pytest.mark.parametrize(
    ("text", "column", "replaces", "told"),
    [
        ("a", "b", False, "--system-prompt excludes --system-prompt-column"),
        (None, None, True, "--replace-system-prompt needs"),
        ("", None, False, "is empty"),
        ("@/no/such/file", None, False, "/no/such/file"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    text: str | None, column: str | None, replaces: bool, told: str
) -> None:
    with pytest.raises(CorpusError, match=told):
        SystemPrompt.of(text, column, replaces=replaces)
