"""Units of a corpus as tables: each file is read in one pass, however many units it is cut into."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import groupby
from typing import Protocol

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from jobs.corpus.delimited import DELIMITERS, parse_records, record_blocks
from jobs.corpus.files import Unit, file_fingerprint
from jobs.corpus.formats import compression_of, text_stream, unpacked
from jobs.corpus.lines import line_blocks, parse_lines
from jobs.corpus.record_batches import batches_from
from jobs.corpus.storage import files_at_once, opened, told
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
            own = list(group)
            if own[0].parts:
                yield from ((unit, self._read_parts(unit)) for unit in own)
            else:
                yield from self._read_file(own)

    def _read_parts(self, unit: Unit) -> pa.Table | CorpusError:
        """The rows of the files that share a unit, several of which are read at once."""
        with ThreadPoolExecutor(files_at_once(self._filesystem)) as pool:
            tables = [table for ((_, table),) in pool.map(lambda part: list(self._read_file([part])), unit.files)]
        errors = [table for table in tables if isinstance(table, CorpusError)]
        return errors[0] if errors else pa.concat_tables(tables)

    def _read_file(self, units: list[Unit]) -> Iterator[tuple[Unit, pa.Table | CorpusError]]:
        path = units[0].path
        done = 0
        try:
            with opened(self._filesystem, path, partial(self._check_unchanged, units[0])) as source:
                rows = _rows_of(source, units[0])
                while done < len(units):
                    run = _contiguous(units[done:])
                    for unit, table in zip(run, _tables(rows, run, self._own_columns(run[0])), strict=True):
                        yield unit, self._with_partitions(table, unit)
                        done += 1
        except CorpusError as error:
            yield from ((unit, error) for unit in units[done:])
        except (pa.ArrowException, OSError) as error:
            reason = f"{told(self._filesystem, path)} cannot be read from row {units[done].first_row} on: {error}"
            yield from ((unit, CorpusError(reason)) for unit in units[done:])

    def _own_columns(self, unit: Unit) -> list[str] | None:
        """The columns that are in the file itself."""
        partitions = {name for name, _, _ in unit.partitions}
        return None if self._columns is None else [name for name in self._columns if name not in partitions]

    def _with_partitions(self, table: pa.Table, unit: Unit) -> pa.Table:
        """The table with the columns that the file's folders stand for."""
        if not unit.partitions:
            return table
        for name, value, kind in unit.partitions:
            field = pa.field(name, pa.type_for_alias(kind))
            table = table.append_column(field, pa.repeat(pa.scalar(value, field.type), table.num_rows))
        return table if self._columns is None else table.select(self._columns)

    def _check_unchanged(self, unit: Unit, info: fs.FileInfo) -> None:
        where = told(self._filesystem, unit.path)
        if info.type == fs.FileType.NotFound:
            raise CorpusError(f"{where} was deleted while the job was running; restore it and restart")
        if file_fingerprint(self._filesystem, info) != unit.fingerprint:
            raise CorpusError(f"{where} changed while the job was running; start again with a new --output")


class _Rows(Protocol):
    """The rows of an open file."""

    schema: pa.Schema

    def batches(
        self, unit: Unit, columns: Sequence[str], max_rows: int
    ) -> tuple[int, Iterator[pa.RecordBatch | pa.Table]]:
        """The rows from the group on in which a unit begins, and how many stand in it before the unit."""
        ...


def _rows_of(source: pa.NativeFile, unit: Unit) -> _Rows:
    if unit.format == "parquet":
        return _ParquetRows(source)
    return _ArrowRows(source) if unit.format == "arrow" else _TextRows(source, unit)


class _ParquetRows:
    """The rows of a Parquet file, whose footer is read once."""

    def __init__(self, source: pa.NativeFile) -> None:
        self._file = pq.ParquetFile(source, buffer_size=READ_BUFFER_BYTES)
        if unit := _int96_unit(self._file, source):
            self._file = pq.ParquetFile(
                source,
                metadata=self._file.metadata,
                buffer_size=READ_BUFFER_BYTES,
                coerce_int96_timestamp_unit=unit,
            )
        self.schema = self._file.schema_arrow

    def batches(self, unit: Unit, columns: Sequence[str], max_rows: int) -> tuple[int, Iterator[pa.RecordBatch]]:
        group, skip = _row_group_at(self._file.metadata, unit.first_row)
        return skip, _batches(self._file, group, max_rows, columns)


class _ArrowRows:
    """The rows of an Arrow file or stream."""

    def __init__(self, source: pa.NativeFile) -> None:
        self._source = source
        self.schema = batches_from(source, 0)[0]

    def batches(self, unit: Unit, columns: Sequence[str], max_rows: int) -> tuple[int, Iterator[pa.RecordBatch]]:
        self._source.seek(0)
        _, skip, found = batches_from(self._source, unit.first_row)
        return skip, (batch.select(columns) for batch in found)


class _TextRows:
    """The rows of a text, from the byte on that a unit says; a compressed one is read from its start."""

    def __init__(self, source: pa.NativeFile, unit: Unit) -> None:
        self._source = source
        self.schema = unpacked(unit.schema)

    def batches(self, unit: Unit, columns: Sequence[str], max_rows: int) -> tuple[int, Iterator[pa.Table]]:
        return unit.skip, (table.select(columns) for table in self._tables(unit))

    def _tables(self, unit: Unit) -> Iterator[pa.Table]:
        first = 0 if compression_of(unit.name) else unit.offset
        # A stream of its own: one that is decompressed closes what it reads of when it is done.
        stream = text_stream(self._source.get_stream(first, self._source.size() - first), unit.name)
        stream.read(unit.offset - first)  # the header
        yield from self._parsed(stream, unit)

    def _parsed(self, stream: pa.NativeFile, unit: Unit) -> Iterator[pa.Table]:
        line = unit.line
        if unit.format == "jsonl":
            for block in line_blocks(stream):
                yield parse_lines(block, self.schema, line=line)
                line += block.count(b"\n")
        else:
            for block in record_blocks(stream):
                table = parse_records(block, self.schema, delimiter=DELIMITERS[unit.format], row=line)
                yield table
                line += len(table)


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


def _tables(rows: _Rows, run: list[Unit], columns: Sequence[str] | None) -> Iterator[pa.Table]:
    batch_rows = min(MAX_BATCH_ROWS, max(1, *(unit.num_rows for unit in run)))
    pending = pa.Table.from_batches([], schema=rows.schema)  # `empty_table` knows no lists of extension types
    if columns is not None:
        pending = pending.select(columns)
    skip, batches = rows.batches(run[0], pending.column_names, batch_rows)
    for unit in run:
        while pending.num_rows < unit.num_rows + skip:
            batch = next(batches, None)
            if batch is None:
                raise pa.ArrowInvalid("the file has fewer rows than were counted in it")
            more = batch if isinstance(batch, pa.Table) else pa.Table.from_batches([batch], schema=pending.schema)
            pending = pa.concat_tables([pending, more])
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
