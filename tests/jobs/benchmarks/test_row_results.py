"""Rows gathered from scored answers: each answer once, in input order, or a refusal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.benchmarks import rewardbench2
from jobs.benchmarks.outcome import AnsweredRow
from jobs.benchmarks.table import read_rows, table_of
from jobs.corpus.files import Corpus
from jobs.errors import OutputError

SCHEMA = pa.schema(
    {"row": pa.int64(), "answer": pa.int32(), "num_correct": pa.int32(), "score": pa.float32()}
    | {name: pa.string() for name in ("subset", "id", "messages", "problem", "error")}
)


def answer(row: int, place: int, score: float | None, **more: Any) -> dict[str, Any]:
    line = {"row": row, "answer": place, "num_correct": 1, "subset": "Math", "id": f"{row}", "problem": None}
    return line | {"score": score, "error": None, "messages": "not read"} | more


SCORED = [
    answer(1, 0, 4.0), answer(0, 0, 1.0), answer(0, 1, 2.0), answer(1, 1, None, error="too long"),
    answer(2, 0, None, num_correct=0, problem="chosen is null", error="no messages"),
]  # fmt: skip


def rows_of(tmp_path: Path, answers: list[dict[str, Any]], *, num_rows: int = 3) -> list[AnsweredRow]:
    (tmp_path / "scores").mkdir()
    for name, part in (("a", answers[:3]), ("b", answers[3:])):
        pq.write_table(pa.Table.from_pylist(part, SCHEMA), tmp_path / "scores" / f"part-{name}.parquet")
    return read_rows(Corpus.open(str(tmp_path / "scores")), num_rows=num_rows, num_answers=5)


def test_rows_are_gathered_in_input_order_with_their_reasons(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, SCORED)
    assert rows == [
        AnsweredRow(0, "0", "Math", 1, (1.0, 2.0)),
        AnsweredRow(1, "1", "Math", 1, (4.0, None), "too long"),
        AnsweredRow(2, "2", "Math", 0, (), "chosen is null"),
    ]
    table = table_of(rows, rewardbench2.accuracy)
    assert table["gap"].to_pylist() == [-1.0, None, None]
    assert table["accuracy"].to_pylist() == [0.0, 0.0, 0.0]
    assert table["scores"].to_pylist() == [[1.0, 2.0], [4.0, None], []]


@pytest.mark.parametrize(
    ("answers", "told"),
    [
        (SCORED[:4], "scores of 4 answers in 2 rows"),
        ([*SCORED[:4], answer(3, 0, 1.0)], "scores of 5 answers in 3 rows"),
        ([*SCORED[:3], answer(1, 2, 1.0), SCORED[4]], "answer of row 1 more than once, or not at all"),
        ([*SCORED[:3], answer(1, 0, 1.0), SCORED[4]], "answer of row 1 more than once, or not at all"),
    ],
)
def test_an_answer_that_is_lost_or_doubled_is_refused(tmp_path: Path, answers: list[dict[str, Any]], told: str) -> None:
    with pytest.raises(OutputError, match=told):
        rows_of(tmp_path, answers)
