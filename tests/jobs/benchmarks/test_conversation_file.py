"""The file of conversations: an answer a row, made once, whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.benchmarks.conversation_file import ConversationFile
from jobs.benchmarks.dataset import Dataset
from jobs.corpus.files import Corpus
from jobs.corpus.storage import OutputFolder
from jobs.errors import CorpusError, OutputError
from tests.conftest import chat
from tests.jobs.conftest import write

PAIR = {"prompt": "hi", "chosen": "yes", "rejected": "no", "subset": "s"}
TIES: dict[str, Any] = {"prompt": "hi", "chosen": ["a"], "rejected": ["b"], "num_correct": 1, "subset": "Ties"}


def make(tmp_path: Path) -> int:
    corpus = Corpus.open(str(tmp_path / "in"))
    return ConversationFile(OutputFolder(str(tmp_path / "out"))).make(corpus, Dataset.of(corpus))


def made(tmp_path: Path) -> Path:
    return tmp_path / "out" / "conversations" / "conversations.parquet"


def test_every_answer_is_a_row_over_all_files_in_order(tmp_path: Path) -> None:
    write(tmp_path / "in" / "a.parquet", [PAIR, PAIR | {"rejected": None}])
    write(tmp_path / "in" / "b.parquet", [PAIR | {"prompt": f"{number}"} for number in range(600)], row_group_size=70)
    assert make(tmp_path) == 1204
    rows = pq.read_table(made(tmp_path)).to_pylist()
    assert [(row["row"], row["answer"]) for row in rows] == [(row, answer) for row in range(602) for answer in (0, 1)]
    assert rows[2]["messages"] == chat("hi", "yes")
    assert (rows[3]["messages"], rows[3]["problem"]) == (None, "rejected answer: it is null")
    assert [rows[-1][name] for name in ("messages", "num_correct", "subset", "id")] == [chat("599", "no"), 1, "s", None]


def test_the_file_is_made_once_and_refused_for_another_input(tmp_path: Path) -> None:
    write(tmp_path / "in" / "a.parquet", [PAIR])
    make(tmp_path)
    before = made(tmp_path).stat().st_mtime_ns
    assert make(tmp_path) == 2
    assert made(tmp_path).stat().st_mtime_ns == before
    write(tmp_path / "in" / "b.parquet", [PAIR])
    with pytest.raises(OutputError, match="made from another input"):
        make(tmp_path)
    made(tmp_path).write_bytes(b"no parquet")
    with pytest.raises(OutputError, match="cannot be read"):
        make(tmp_path)


def test_a_row_of_ties_has_an_id_of_its_own(tmp_path: Path) -> None:
    write(tmp_path / "in" / "a.parquet", [TIES | {"id": "ref:1"}, TIES | {"id": "tied:1"}, TIES | {"id": "ref:01"}])
    with pytest.raises(CorpusError, match="rows 0 and 2 of subset Ties have the same id 'ref:01'"):
        make(tmp_path)
    assert not made(tmp_path).exists()
    write(tmp_path / "in" / "a.parquet", [TIES | {"id": "ref:1"}, TIES | {"id": "one"}])
    with pytest.raises(CorpusError, match="row 1: a row of subset Ties has the id 'one'"):
        make(tmp_path)


def test_files_of_two_kinds_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "in" / "a.parquet", [PAIR])
    write(tmp_path / "in" / "b.parquet", [TIES | {"id": "ref:1"}])
    with pytest.raises(CorpusError, match=r"a\.parquet has the columns .* of RewardBench, .*b\.parquet has"):
        make(tmp_path)


def test_text_that_is_not_utf8_is_its_rows_problem(tmp_path: Path) -> None:
    rows = [PAIR | {"prompt": "fine"}, PAIR, PAIR]
    table = pa.Table.from_pylist(rows)
    for name, texts in (("chosen", [b"a", b"caf\xe9", b"b"]), ("subset", [b"s", b"s", b"\xff"])):
        latin = pa.Array.from_buffers(pa.string(), 3, pa.array(texts, pa.binary()).buffers())
        table = table.set_column(table.column_names.index(name), name, latin)
    (tmp_path / "in").mkdir()
    pq.write_table(table, tmp_path / "in" / "a.parquet")
    make(tmp_path)
    found = pq.read_table(made(tmp_path)).to_pylist()
    assert [(row["row"], row["num_correct"], row["subset"]) for row in found] == [
        (0, 1, "s"), (0, 1, "s"), (1, 0, "s"), (2, 0, "(none)")
    ]  # fmt: skip
    assert [row["problem"] and row["problem"][:39] for row in found] == [
        None, None, "chosen: the text is not valid UTF-8 (by", "subset: the text is not valid UTF-8 (by"
    ]  # fmt: skip
