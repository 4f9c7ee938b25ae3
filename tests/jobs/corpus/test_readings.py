"""Rows that could be read in two ways are refused, with the flags that choose and an example of each reading."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jobs.corpus.conversations import ConversationColumns
from jobs.corpus.files import Corpus
from jobs.corpus.preferences import PreferenceColumns
from jobs.corpus.readings import (
    ReadingChoice,
    conversation_columns,
    prompt_columns_of,
    reading_of,
    same_reading,
)
from jobs.errors import CorpusError
from tests.conftest import chat
from tests.jobs.conftest import write

GOOD, BAD = chat("Why is the sea salt?", "Rivers carry salt into it."), chat("Why is the sea salt?", "It just is.")
ULTRAFEEDBACK: dict[str, Any] = {
    "prompt": "Why is the sea salt?", "prompt_id": "0", "chosen": GOOD, "rejected": BAD, "messages": GOOD
}  # fmt: skip
SHAREGPT = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]
NO_COLUMNS = ConversationColumns()
NONE = ReadingChoice(NO_COLUMNS)
SIDES_ALONE = PreferenceColumns("chosen", "rejected")


def corpus(folder: Path, *rows: dict[str, Any]) -> Corpus:
    write(folder / "a.parquet", list(rows))
    return Corpus.open(str(folder))


def refusal(found: Corpus, choice: ReadingChoice = NONE) -> str:
    with pytest.raises(CorpusError) as caught:
        same_reading(found, lambda schema: reading_of(schema, choice), reads_all=True)
    return str(caught.value)


def test_ultrafeedbacks_form_is_refused_with_both_readings(tmp_path: Path) -> None:
    found = corpus(tmp_path, ULTRAFEEDBACK)
    told = refusal(found)
    assert "a.parquet: its rows can be read in 2 ways; say which:" in told
    assert "- conversations in 'messages': --messages-column messages. The first row:\n    user: Why is" in told
    assert "- pairs in 'chosen' and 'rejected' after 'prompt': --reads pairs. The first row:" in told
    assert "    chosen | assistant: Rivers carry salt into it.\n    rejected | user: Why" in told
    assert told.splitlines()[-1].startswith("Columns found: prompt (string)")
    with pytest.raises(CorpusError, match=r"(?s)in 2 ways.*--messages-column messages.*jobs\.score reads them"):
        conversation_columns(found, ConversationColumns())


@pytest.mark.parametrize(
    ("row", "flags"),
    [
        ({"messages": GOOD, "prompt": "a", "response": "b"}, ["messages", "prompt --response-column response"]),
        ({"messages": GOOD, "conversations": SHAREGPT}, ["messages", "conversations"]),
        ({"conversations": SHAREGPT, "prompt": "a", "response": "b"}, ["conversations", "prompt --response-column"]),
        ({"chosen": "a", "rejected": "b", "prompt": "a", "response": "b"}, ["prompt", "--reads pairs"]),
    ],
)
def test_two_kinds_of_columns_are_refused(tmp_path: Path, row: dict[str, Any], flags: list[str]) -> None:
    told = refusal(corpus(tmp_path, row))
    for flag in flags:
        assert (flag if flag.startswith("--") else f"-column {flag}") in told


def test_an_example_is_short_and_an_unreadable_one_says_why(tmp_path: Path) -> None:
    long = [{"role": "user", "content": f"turn {number} " + "word " * 500} for number in range(9)]
    rows: list[dict[str, Any]] = [
        {"messages": long, "conversations": None},
        {"messages": None, "conversations": SHAREGPT},
    ]
    told = refusal(corpus(tmp_path, *rows))
    assert "(5 more messages)" in told
    assert "(no conversation: the messages are null)" in told
    assert max(map(len, told.splitlines()[:-1])) < 200


@pytest.mark.parametrize(
    ("row", "choice", "reading"),
    [
        (ULTRAFEEDBACK, ReadingChoice(NO_COLUMNS, reads="pairs"), PreferenceColumns("chosen", "rejected", "prompt")),
        (ULTRAFEEDBACK, ReadingChoice(NO_COLUMNS, reads="conversations"), ConversationColumns("messages")),
        (ULTRAFEEDBACK, ReadingChoice(ConversationColumns("messages")), ConversationColumns("messages")),
        (ULTRAFEEDBACK, ReadingChoice(NO_COLUMNS, SIDES_ALONE), SIDES_ALONE),
        ({"chosen": "a", "rejected": "b"}, NONE, PreferenceColumns("chosen", "rejected")),
        ({"messages": GOOD, "chosen": True, "rejected": False}, NONE, ConversationColumns("messages")),
        ({"messages": GOOD, "prompt": "a"}, NONE, ConversationColumns("messages")),
        ({"conversations": SHAREGPT}, NONE, ConversationColumns("conversations")),
        ({"messages": 3, "prompt": "a", "response": "b"}, NONE, ConversationColumns(None, "prompt", "response")),
    ],
)  # fmt: skip
def test_a_reading_is_chosen_by_flag_or_is_the_only_one(
    tmp_path: Path, row: dict[str, Any], choice: ReadingChoice, reading: object
) -> None:
    (schema,) = corpus(tmp_path, row).schemas
    assert reading_of(schema, choice) == reading


def test_prompts_in_two_columns_are_refused_with_both(tmp_path: Path) -> None:
    found = corpus(tmp_path, {"prompt": "Who?", "messages": chat("Why?")})
    with pytest.raises(
        CorpusError, match=r"(?s)--messages-column messages.*user: Why\?.*--prompt-column prompt.*user: Who\?"
    ):
        prompt_columns_of(found, ConversationColumns(), added=[])


def test_a_pair_is_no_conversation_for_a_job_that_reads_those(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"the input has pairs.*--messages-column chosen"):
        conversation_columns(corpus(tmp_path, {"chosen": GOOD, "rejected": BAD}), ConversationColumns())
