"""Corpora in the columns and types that they are published with, in our own words: each is read into the right rows.

The columns are those of the dataset cards on the Hub: HuggingFaceH4/ultrafeedback_binarized, openbmb/UltraFeedback,
Anthropic/hh-rlhf, Skywork/Skywork-Reward-Preference-80K-v0.2, nvidia/HelpSteer2, berkeley-nest/Nectar,
lmsys/lmsys-chat-1m, and ShareGPT's `conversations`.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.corpus.conversations import ConversationColumns, SystemPrompt
from jobs.corpus.files import Corpus
from jobs.corpus.reader import UnitReader
from jobs.corpus.readings import ReadingChoice, ReadingName, columns_of
from jobs.errors import CorpusError
from jobs.scoring.preview import row_conversations
from serve_app.reward_model.conversation import Conversation

MESSAGES = pa.list_(pa.struct([("content", pa.string()), ("role", pa.string())]))
TEXT = pa.string()
ANNOTATION = pa.struct([("Rating", TEXT), ("Rationale", TEXT)])
COMPLETION = pa.struct(
    [
        ("annotations", pa.struct([("helpfulness", ANNOTATION), ("honesty", ANNOTATION)])),
        ("critique", TEXT),
        ("custom_system_prompt", TEXT),
        ("fine-grained_score", pa.float64()),
        ("model", TEXT),
        ("overall_score", pa.float64()),
        ("principle", TEXT),
        ("response", TEXT),
    ]
)
ASK, GOOD, BAD = "Why is the sky blue?", "Air scatters blue light most.", "It reflects the sea."
MORE, THEN = "And at dusk?", "The path is longer, so red is left."


def said(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(texts)]


def table(columns: dict[str, pa.DataType], row: dict[str, Any]) -> pa.Table:
    return pa.Table.from_pylist([row], pa.schema(list(columns.items())))


PAIR = [said(ASK, GOOD), said(ASK, BAD)]
FORMS: dict[str, tuple[pa.Table, ReadingName | None, list[list[dict[str, str]]]]] = {
    "ultrafeedback_binarized": (
        table(
            {
                "prompt": TEXT,
                "prompt_id": TEXT,
                "chosen": MESSAGES,
                "rejected": MESSAGES,
                "messages": MESSAGES,
                "score_chosen": pa.float64(),
                "score_rejected": pa.float64(),
            },
            {"prompt": ASK, "chosen": PAIR[0], "rejected": PAIR[1], "messages": PAIR[0], "score_chosen": 8.5},
        ),
        "pairs",
        PAIR,
    ),
    "UltraFeedback": (
        table(
            {
                "source": TEXT,
                "instruction": TEXT,
                "models": pa.list_(TEXT),
                "completions": pa.list_(COMPLETION),
                "correct_answers": pa.list_(TEXT),
                "incorrect_answers": pa.list_(TEXT),
            },
            {
                "instruction": ASK,
                "models": ["one", "two"],
                "completions": [{"response": GOOD, "model": "one"}, {"response": BAD, "model": "two"}],
                "correct_answers": ["None"],
            },
        ),
        None,
        PAIR,
    ),
    "Skywork-Reward-Preference": (
        table(
            {"chosen": MESSAGES, "rejected": MESSAGES, "source": TEXT},
            {"chosen": PAIR[0], "rejected": PAIR[1], "source": "magpie"},
        ),
        None,
        PAIR,
    ),
    "HelpSteer2": (
        table(
            {"prompt": TEXT, "response": TEXT, "helpfulness": pa.int64(), "verbosity": pa.int64()},
            {"prompt": ASK, "response": GOOD, "helpfulness": 4, "verbosity": 1},
        ),
        None,
        PAIR[:1],
    ),
    "Nectar": (
        table(
            {
                "prompt": TEXT,
                "answers": pa.list_(pa.struct([("answer", TEXT), ("model", TEXT), ("rank", pa.float64())])),
                "turns": pa.int64(),
                "num_responses": pa.int64(),
                "source": pa.list_(TEXT),
                "good_natured": pa.bool_(),
            },
            {
                "prompt": f"\n\nHuman: {ASK}\n\nAssistant: {GOOD}\n\nHuman: {MORE}\n\nAssistant: ",
                "answers": [
                    {"answer": THEN, "model": "one", "rank": 1.0},
                    {"answer": BAD, "model": "two", "rank": 2.0},
                ],
                "turns": 2,
            },
        ),
        None,
        [said(ASK, GOOD, MORE, THEN), said(ASK, GOOD, MORE, BAD)],
    ),
    "lmsys-chat-1m": (
        table(
            {
                "conversation_id": TEXT,
                "model": TEXT,
                "conversation": MESSAGES,
                "turn": pa.int64(),
                "language": TEXT,
                "openai_moderation": pa.list_(pa.struct([("flagged", pa.bool_())])),
                "redacted": pa.bool_(),
            },
            {"conversation_id": "1", "conversation": said(ASK, GOOD, MORE, THEN), "turn": 2},
        ),
        None,
        [said(ASK, GOOD, MORE, THEN)],
    ),
}


def read(folder: Path, reads: ReadingName | None) -> list[list[dict[str, str]]]:
    """The messages of every conversation of the corpus."""
    corpus = Corpus.open(str(folder))
    reading = columns_of(corpus, ReadingChoice(ConversationColumns(), reads=reads))
    found = []
    for _, rows in UnitReader(corpus.filesystem).read(corpus.units(10)):
        assert isinstance(rows, pa.Table)
        for row in row_conversations(rows, reading, SystemPrompt()):
            for one in row.values():
                assert isinstance(one, Conversation), one
                found.append([{"role": message.role, "content": message.content} for message in one.messages])
    return found


@pytest.mark.parametrize("name", FORMS)
def test_a_published_form_is_read_as_what_it_is(tmp_path: Path, name: str) -> None:
    rows, reads, expected = FORMS[name]
    pq.write_table(rows, tmp_path / "train-00000-of-00001.parquet")
    if reads is not None:
        with pytest.raises(CorpusError, match=f"--reads {reads}"):
            read(tmp_path, None)
    assert read(tmp_path, reads) == expected


def test_hh_rlhf_is_read_as_pairs_of_transcripts(tmp_path: Path) -> None:
    start = f"\n\nHuman: {ASK}\n\nAssistant: {GOOD}\n\nHuman: {MORE}\n\nAssistant:"
    line = json.dumps({"chosen": f"{start} {THEN}", "rejected": f"{start} {BAD}"})
    with gzip.open(tmp_path / "train.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write(line + "\n")
    assert read(tmp_path, None) == [said(ASK, GOOD, MORE, THEN), said(ASK, GOOD, MORE, BAD)]


def test_sharegpt_is_read_as_conversations(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": ASK}, {"from": "gpt", "value": GOOD}]
    (tmp_path / "sharegpt.jsonl").write_text(json.dumps({"id": "abc_0", "conversations": turns}) + "\n")
    assert read(tmp_path, None) == [said(ASK, GOOD)]


def test_sharegpt_as_one_array_is_told_how_to_become_lines(tmp_path: Path) -> None:
    file = tmp_path / "sharegpt.json"
    turns = [{"from": "human", "value": ASK}, {"from": "gpt", "value": GOOD}]
    rows = [{"id": "abc_0", "conversations": turns}] * 2
    for text in (json.dumps(rows), json.dumps(rows, indent=2)):
        file.write_text(text)
        with pytest.raises(CorpusError, match=r"`jq -c '\.\[\]' .*sharegpt.json` makes lines of an array"):
            read(file, None)
    file.write_text("\n".join(map(json.dumps, rows)))
    assert read(file, None) == [said(ASK, GOOD)] * 2
    with pytest.raises(CorpusError, match="no Parquet files"):
        read(tmp_path, None)


def test_a_prompt_that_begins_a_transcript_is_its_turns(tmp_path: Path) -> None:
    prompt = f"\n\nHuman: {ASK}\n\nAssistant: {GOOD}\n\nHuman: {MORE}\n\nAssistant:"
    pq.write_table(pa.table({"prompt": [prompt], "response": [f" {THEN}"]}), tmp_path / "a.parquet")
    assert read(tmp_path, None) == [said(ASK, GOOD, MORE, THEN)]


def test_an_instruction_is_a_prompt_where_nothing_adds_to_it(tmp_path: Path) -> None:
    columns = {"instruction": [ASK], "response": [GOOD]}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    assert read(tmp_path, None) == [said(ASK, GOOD)]
    for part in ("input", "context", "history", "system"):  # Alpaca's, Dolly's, LLaMA-Factory's
        pq.write_table(pa.table(columns | {part: ["Think of dusk."]}), tmp_path / "a.parquet")
        with pytest.raises(CorpusError, match="name yours with --messages-column, or with --prompt-column"):
            read(tmp_path, None)
    pq.write_table(pa.table(columns | {"prompt": [MORE]}), tmp_path / "a.parquet")
    with pytest.raises(CorpusError, match="can be read in 2 ways"):
        read(tmp_path, None)
