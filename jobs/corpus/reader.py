"""Units of a corpus as tables: each file is read in one pass, however many units it is cut into."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import groupby

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from jobs.corpus.files import Unit, file_fingerprint
from jobs.corpus.storage import told
from jobs.errors import CorpusError

MAX_BATCH_ROWS = 4096
READ_BUFFER_BYTES = 1 << 20


def read_tasks(units: Sequence[Unit], max_tasks: int) -> list[list[Unit]]:
    """Split units, in order, into at most about `max_tasks` lists for a `UnitReader` each, none inside a row group."""
    size = max(1, math.ceil(len(units) / max_tasks))
    tasks: list[list[Unit]] = []
    for unit in units:
        if tasks and (len(tasks[-1]) < size or _follows(tasks[-1][-1], unit)):
            tasks[-1].append(unit)
        else:
            tasks.append([unit])
    return tasks


def _follows(before: Unit, unit: Unit) -> bool:
    """Whether `unit` goes on in the row group where `before` ends."""
    return unit.splits_group and unit.path == before.path and unit.first_row == before.first_row + before.num_rows


class UnitReader:
    """Reads units as tables, all `columns` or some; units of one file in row order are one pass over it."""

    def __init__(self, filesystem: fs.FileSystem, *, columns: Sequence[str] | None = None) -> None:
        self._filesystem = filesystem
        self._columns = columns

    def read(self, units: Sequence[Unit]) -> Iterator[tuple[Unit, pa.Table | CorpusError]]:
        """Each unit with its table, in the order given, or with the reason why it cannot be read."""
        for _, group in groupby(units, key=lambda unit: unit.path):
            yield from self._read_file(list(group))

    def _read_file(self, units: list[Unit]) -> Iterator[tuple[Unit, pa.Table | CorpusError]]:
        path = units[0].path
        done = 0
        try:
            self._check_unchanged(units[0])
            with self._filesystem.open_input_file(path) as source:
                file = _opened(source)
                while done < len(units):
                    run = _contiguous(units[done:])
                    for unit, table in zip(run, _tables(file, run, self._columns), strict=True):
                        yield unit, table
                        done += 1
        except CorpusError as error:
            yield from ((unit, error) for unit in units[done:])
        except (pa.ArrowException, OSError) as error:
            reason = f"{told(self._filesystem, path)} cannot be read from row {units[done].first_row} on: {error}"
            yield from ((unit, CorpusError(reason)) for unit in units[done:])

    def _check_unchanged(self, unit: Unit) -> None:
        info = self._filesystem.get_file_info(unit.path)
        where = told(self._filesystem, unit.path)
        if info.type == fs.FileType.NotFound:
            raise CorpusError(f"{where} was deleted while the job was running; restore it and restart")
        if file_fingerprint(self._filesystem, info) != unit.fingerprint:
            raise CorpusError(f"{where} changed while the job was running; start again with a new --output")


def _opened(source: pa.NativeFile) -> pq.ParquetFile:
    """The file with its footer read once."""
    whole = pq.ParquetFile(source)
    return pq.ParquetFile(
        source,
        metadata=whole.metadata,
        buffer_size=READ_BUFFER_BYTES,
        coerce_int96_timestamp_unit=_int96_unit(whole, source),
    )


def _int96_unit(whole: pq.ParquetFile, source: pa.NativeFile) -> str | None:
    """The unit that the old INT96 timestamps of a file are read in, which Parquet does not tell; None where there are
    none. It is us, which holds every date, or ns where a value needs it: the columns are read once more to see that.

    Raises:
        CorpusError: one value of the file needs ns, and another is outside the years 1677 to 2262, all that ns holds.
    """
    leaves = [whole.schema.column(index) for index in range(len(whole.schema))]
    columns = [leaf.path for leaf in leaves if leaf.physical_type == "INT96"]
    if not columns:
        return None
    micros = pq.ParquetFile(source, metadata=whole.metadata, coerce_int96_timestamp_unit="us")
    outside = fine = False
    for group in range(whole.num_row_groups):
        read = micros.read_row_group(group, columns=columns)
        nanos = whole.read_row_group(group, columns=columns)
        try:
            fine |= not read.cast(nanos.schema).equals(nanos)
        except pa.ArrowInvalid:
            outside = True
    if fine and outside:
        raise CorpusError(
            f"the INT96 timestamps in {', '.join(columns)} hold both nanoseconds and dates that nanoseconds cannot "
            "reach; write the file with another type of timestamps"
        )
    return "ns" if fine else "us"


def _contiguous(units: Sequence[Unit]) -> list[Unit]:
    """The leading units in which each starts where the one before it ends."""
    run = [units[0]]
    for unit in units[1:]:
        if unit.first_row != run[-1].first_row + run[-1].num_rows:
            break
        run.append(unit)
    return run


def _tables(file: pq.ParquetFile, run: list[Unit], columns: Sequence[str] | None) -> Iterator[pa.Table]:
    first_group, skip = _row_group_at(file.metadata, run[0].first_row)
    batch_rows = min(MAX_BATCH_ROWS, max(1, *(unit.num_rows for unit in run)))
    pending = pa.Table.from_batches([], schema=file.schema_arrow)  # `empty_table` knows no lists of extension types
    if columns is not None:
        pending = pending.select(columns)
    batches = _batches(file, first_group, batch_rows, pending.column_names)
    for unit in run:
        while pending.num_rows < unit.num_rows + skip:
            batch = next(batches, None)
            if batch is None:
                raise pa.ArrowInvalid("the file has fewer rows than its footer says")
            pending = pa.concat_tables([pending, pa.Table.from_batches([batch], schema=pending.schema)])
        yield pending.slice(skip, unit.num_rows)
        pending, skip = pending.slice(skip + unit.num_rows), 0


def _batches(
    file: pq.ParquetFile, first_group: int, batch_rows: int, columns: Sequence[str]
) -> Iterator[pa.RecordBatch]:
    """The rows from a row group on. Group by group: Arrow cannot join nested dictionaries of two groups in a batch."""
    for group in range(first_group, file.num_row_groups):
        for batch in file.iter_batches(batch_size=batch_rows, row_groups=[group], columns=columns):
            yield batch.select(columns)  # a name with a dot in it also chose the field of a struct


def _row_group_at(metadata: pq.FileMetaData, row: int) -> tuple[int, int]:
    """The row group that holds `row`, and how many of its rows stand before it."""
    for index in range(metadata.num_row_groups):
        rows = metadata.row_group(index).num_rows
        if row < rows:
            return index, row
        row -= rows
    return metadata.num_row_groups, 0
