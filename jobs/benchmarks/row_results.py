"""The rows of a benchmark with the scores of their answers: gathered from the scoring stage, and written as Parquet."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.benchmarks.outcome import AnsweredRow
from jobs.corpus import Corpus
from jobs.errors import OutputError

__all__ = ["read_rows", "table_of"]

COLUMNS = ["row", "answer", "num_correct", "subset", "id", "problem", "score", "error"]
SCHEMA = pa.schema(
    {
        "row": pa.int64(),
        "id": pa.string(),
        "subset": pa.string(),
        "num_correct": pa.int32(),
        "scores": pa.list_(pa.float32()),
        "gap": pa.float32(),
        "accuracy": pa.float64(),
        "error": pa.string(),
    }
)


def read_rows(scored: Corpus, *, num_rows: int, num_answers: int) -> list[AnsweredRow]:
    """The rows of the dataset, in input order, from the output of the scoring stage.

    Raises:
        OutputError: the output has not each of `num_answers` answers of `num_rows` rows once, or cannot be read.
    """
    try:
        tables = [_read(scored, file.path) for file in scored.files]
    except (pa.ArrowException, OSError) as error:
        raise OutputError(f"the scores cannot be read: {error}") from error
    answers = pa.concat_tables(tables).sort_by([("row", "ascending"), ("answer", "ascending")]).to_pylist()
    rows = [_row(row, list(group)) for row, group in groupby(answers, key=lambda answer: int(answer["row"]))]
    if len(answers) != num_answers or [row.row for row in rows] != list(range(num_rows)):
        raise OutputError(
            f"there are scores of {len(answers)} answers in {len(rows)} rows, but the dataset has {num_answers} in "
            f"{num_rows}; choose another --output"
        )
    return rows


def _read(scored: Corpus, path: str) -> pa.Table:
    with scored.filesystem.open_input_file(path) as source:
        return pq.read_table(source, columns=COLUMNS)


def _row(row: int, answers: list[dict[str, Any]]) -> AnsweredRow:
    if [answer["answer"] for answer in answers] != list(range(len(answers))):
        raise OutputError(f"the scores have an answer of row {row} more than once, or not at all")
    first = answers[0]
    errors = [reason for answer in answers if (reason := answer["problem"] or answer["error"])]
    return AnsweredRow(
        row=row,
        id=first["id"],
        subset=first["subset"],
        num_correct=first["num_correct"],
        scores=tuple(answer["score"] for answer in answers) if first["num_correct"] else (),
        error="; ".join(errors) or None,
    )


def table_of(rows: Iterable[AnsweredRow], accuracy: Callable[[AnsweredRow], float]) -> pa.Table:
    """One line a row, in input order: its scores in the order chosen, rejected, and what they come to.

    `gap` is the worst right score minus the best wrong one, `accuracy` what the row counts; `error` says why a score
    is missing.
    """
    return pa.Table.from_pylist(list(_lines(rows, accuracy)), SCHEMA)


def _lines(rows: Iterable[AnsweredRow], accuracy: Callable[[AnsweredRow], float]) -> Iterator[dict[str, Any]]:
    for row in rows:
        yield {
            "row": row.row,
            "id": row.id,
            "subset": row.subset,
            "num_correct": row.num_correct,
            "scores": row.scores,
            "gap": row.gap,
            "accuracy": accuracy(row),
            "error": row.error,
        }
