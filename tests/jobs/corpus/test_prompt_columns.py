"""Prompts are found in their column, and what is no prompt has its reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from jobs.corpus.conversations import ConversationColumns, prompts
from jobs.corpus.files import Corpus
from jobs.corpus.readings import prompt_columns_of
from jobs.errors import CorpusError
from serve_app.reward_model.conversation import Conversation, Message
from tests.conftest import chat
from tests.jobs.conftest import write


def found(folder: Path, rows: list[dict[str, Any]], **chosen: str) -> ConversationColumns:
    write(folder / "a.parquet", rows)
    return prompt_columns_of(Corpus.open(str(folder)), ConversationColumns(**chosen), added=["response", "score"])


@pytest.mark.parametrize(
    ("row", "chosen", "columns"),
    [
        ({"prompt": "Hi", "id": 1}, {}, ConversationColumns(prompt="prompt")),
        ({"prompt": chat("Hi")}, {}, ConversationColumns(prompt="prompt")),
        ({"messages": chat("Hi")}, {}, ConversationColumns(messages="messages")),
        ({"messages": "[]", "prompt": "Hi"}, {"prompt": "prompt"}, ConversationColumns(prompt="prompt")),
        ({"frage": "Hi", "prompt": 1}, {"prompt": "frage"}, ConversationColumns(prompt="frage")),
    ],
)
def test_the_column_is_found_or_named(
    tmp_path: Path, row: dict[str, Any], chosen: dict[str, str], columns: ConversationColumns
) -> None:
    assert found(tmp_path, [row], **chosen) == columns


@pytest.mark.parametrize(
    ("row", "chosen", "reason"),
    [
        ({"text": "Hi"}, {}, r"neither a 'prompt' column nor 'messages'.*\nColumns found: text \(string\)"),
        ({"prompt": "Hi", "messages": chat("Hi")}, {}, "can be read in 2 ways; say which"),
        ({"prompt": 3}, {}, "column 'prompt' is int64; --prompt-column takes a string or a list"),
        ({"prompt": "Hi"}, {"prompt": "a", "messages": "b"}, "--messages-column excludes --prompt-column"),
        ({"prompt": "Hi", "response": "Yes"}, {}, r"already has the columns \['response'\].*--output-prefix"),
    ],
)
def test_columns_that_do_not_fit_are_refused(
    tmp_path: Path, row: dict[str, Any], chosen: dict[str, str], reason: str
) -> None:
    with pytest.raises(CorpusError, match=rf"(?s)a\.parquet.*{reason}"):
        found(tmp_path, [row], **chosen)


def test_files_that_differ_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "b.parquet", [{"messages": chat("Hi")}])
    with pytest.raises(
        CorpusError, match=r"a\.parquet has prompts in 'prompt', .*b\.parquet has conversations in 'messages'"
    ):
        found(tmp_path, [{"prompt": "Hi"}])


def test_prompts_are_read_and_what_is_none_has_its_reason() -> None:
    question = Message("user", "Hi")
    strings = pa.table({"prompt": ["Hi", None, ""]})
    first, null, empty = prompts(strings, ConversationColumns(prompt="prompt"))
    assert first == Conversation((question,))
    assert str(null) == "the prompt is null"
    assert empty == Conversation((Message("user", ""),))
    lists = pa.table({"messages": [chat("Hi"), chat("Hi", "Yes"), [], None]})
    asked, answered, nothing, null = prompts(lists, ConversationColumns(messages="messages"))
    assert asked == Conversation((question,))
    assert str(answered) == "the prompt ends in an assistant's turn, so there is nothing to answer"
    assert "empty" in str(nothing)
    assert str(null) == "the messages are null"
    texts = pa.table({"prompt": ['[{"role": "user", "content": "Hi"}]']})
    assert prompts(texts, ConversationColumns(messages="prompt")) == [Conversation((question,))]
    assert prompts(texts, ConversationColumns(prompt="prompt")) != [Conversation((question,))]
