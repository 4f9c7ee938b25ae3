"""A benchmark's conversations as one Parquet file, an answer a row, which the scoring stage scores like any corpus.

The file is made once. A restart finds it whole under its name, made from the same input, and goes on with it: were it
written anew, the unit files that are scored would belong to a file that is gone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from jobs.benchmarks.dataset import Answer, Dataset
from jobs.benchmarks.rewardbench2 import TIES
from jobs.corpus.files import Corpus
from jobs.corpus.reader import UnitReader
from jobs.corpus.storage import OutputFolder
from jobs.corpus.turns import cells
from jobs.errors import CorpusError, OutputError

ROWS_AT_ONCE = 256
SOURCE_KEY = b"rayward.benchmark"
CONVERSATIONS_SCHEMA = pa.schema(
    {
        "row": pa.int64(),
        "answer": pa.int32(),
        "num_correct": pa.int32(),
        "subset": pa.string(),
        "id": pa.string(),
        "messages": pa.list_(pa.struct({"role": pa.string(), "content": pa.string()})),
        "system_prompt": pa.string(),
        "problem": pa.string(),
    }
)
"""`row` and `answer` are 0-based, in input order; `messages` is null where `problem` says why."""


class ConversationFile:
    """`conversations/conversations.parquet` in the folder of a run."""

    NAME = "conversations/conversations.parquet"

    def __init__(self, folder: OutputFolder) -> None:
        self._folder = folder
        self._path = folder.path(self.NAME)

    def make(self, corpus: Corpus, dataset: Dataset) -> int:
        """Write the conversations of all rows, unless the file is there already; the number of answers in it.

        Raises:
            CorpusError: the input cannot be read, or a row has an id that tells nothing.
            OutputError: the file is there and comes from another input, or cannot be written.
        """
        source = _source(corpus, dataset)
        if (footer := self._footer()) is None:
            self._write(corpus, dataset, source)
            footer = self._footer()
        elif (footer.metadata or {}).get(SOURCE_KEY) != source:
            raise OutputError(
                f"{self._path} was made from another input, or from this one before it changed; choose another "
                "--output, or restore the input"
            )
        assert footer is not None
        return int(footer.num_rows)

    def _footer(self) -> pq.FileMetaData | None:
        filesystem = self._folder.filesystem
        try:
            if filesystem.get_file_info(self._path).type == fs.FileType.NotFound:
                return None
            with filesystem.open_input_file(self._path) as file:
                return pq.read_metadata(file)
        except (pa.ArrowException, OSError) as error:
            raise OutputError(f"{self._path} cannot be read: {error}; choose another --output") from error

    def _write(self, corpus: Corpus, dataset: Dataset, source: bytes) -> None:
        schema = CONVERSATIONS_SCHEMA.with_metadata({SOURCE_KEY: source})
        with self._folder.create(self.NAME) as stream, pq.ParquetWriter(stream, schema) as writer:
            for table in _tables(corpus, dataset):
                writer.write_table(table.cast(schema))


def _source(corpus: Corpus, dataset: Dataset) -> bytes:
    files = [[file.path, file.fingerprint, file.num_rows] for file in corpus.files]
    layout = {"benchmark": dataset.benchmark.value, "columns": sorted(dataset.names)}
    return json.dumps(layout | {"system_prompt": dataset.system_prompt_column, "files": files}).encode()


def _tables(corpus: Corpus, dataset: Dataset) -> Iterator[pa.Table]:
    row, ties = 0, TiesRows(dataset)
    reader = UnitReader(corpus.filesystem, columns=sorted(dataset.names))
    for _, table in reader.read(corpus.units(ROWS_AT_ONCE)):
        if isinstance(table, CorpusError):
            raise table
        columns = [cells(column) for column in table.columns]
        rows = [dict(zip(table.column_names, values, strict=True)) for values in zip(*columns, strict=True)]
        for place, own in enumerate(rows, start=row):
            ties.add(place, own)
        lines = [line for place, own in enumerate(rows, start=row) for line in _lines(place, own, dataset)]
        row += len(rows)
        yield pa.Table.from_pylist(lines, CONVERSATIONS_SCHEMA)


class TiesRows:
    """The rows of subset Ties that have been met: each `ref:N` and `tied:N` may stand there once."""

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset
        self._met: dict[tuple[str, int], int] = {}

    def add(self, row: int, cells: dict[str, Any]) -> None:
        """Raises CorpusError where the id tells nothing, or is another row's."""
        try:
            number = self._dataset.ties_number(cells)
        except CorpusError as error:
            raise CorpusError(f"row {row}: {error}") from None
        if number is not None and (first := self._met.setdefault(number, row)) != row:
            raise CorpusError(f"rows {first} and {row} of subset {TIES} have the same id {self._dataset.id(cells)!r}")


def _lines(row: int, cells: dict[str, Any], dataset: Dataset) -> Iterator[dict[str, Any]]:
    subset, row_id = dataset.subset(cells), dataset.id(cells)
    for place, answer in enumerate(dataset.answers(cells)):
        yield {
            "row": row,
            "answer": place,
            "num_correct": answer.num_correct,
            "subset": subset,
            "id": row_id,
            "messages": _messages(answer),
            "system_prompt": dataset.system_prompt(cells),
            "problem": answer.problem,
        }


def _messages(answer: Answer) -> list[dict[str, str]] | None:
    if answer.conversation is None:
        return None
    return [{"role": message.role, "content": message.content} for message in answer.conversation.messages]
