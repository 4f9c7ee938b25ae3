"""CSV and TSV: a header, then the rows. Values in quotes may have line ends in them, and quotes that are doubled.

These files have no types: a column is whole numbers, or decimal ones, where every value of it is written as such (`7`
is, `007` is not); else it is text, as it stands. An empty cell is null, and empty text where it stands in quotes.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.csv as pc

from jobs.corpus.formats import (
    BLOCK_BYTES,
    LINE_ERROR,
    FileContent,
    RowGroup,
    has_line_errors,
    in_threads,
    with_line_errors,
)

DELIMITERS = {"csv": ",", "tsv": "\t"}
MAX_ROW_BYTES = 256 << 20
BOM = b"\xef\xbb\xbf"
# Numbers that keep their meaning when they are written again: no leading zeros, no plus, no spaces.
INTEGER = r"^-?(0|[1-9][0-9]{0,17})$"
NUMBER = r"^-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?$"


def record_blocks(stream: pa.NativeFile) -> Iterator[bytes]:
    """The content of a stream in blocks that end where a row does: at a line end with all quotes before it closed.

    Raises:
        ArrowInvalid: a quote is never closed.
    """
    begun = b""
    while content := stream.read(BLOCK_BYTES):
        begun += content
        if end := _row_end(begun):
            yield begun[:end]
            begun = begun[end:]
        elif len(begun) > MAX_ROW_BYTES:
            raise pa.ArrowInvalid(f"a row is longer than {MAX_ROW_BYTES >> 20} MiB: a quote is not closed")
    if begun:
        yield begun


def _row_end(content: bytes) -> int:
    """Where the last row ends of a content that begins with a row; 0 where none does."""
    end, quotes = len(content), content.count(b'"')
    while (newline := content.rfind(b"\n", 0, end)) >= 0:
        quotes -= content.count(b'"', newline, end)
        if not quotes % 2:
            return newline + 1
        end = newline
    return 0


def scan_records(stream: pa.NativeFile, *, delimiter: str, name: str) -> FileContent:
    """The header, the types of the columns, and the blocks that the rows stand in: the whole stream is read.

    Raises:
        CorpusError: some rows cannot be read, and there is no room for the column that says so.
        ArrowInvalid: there is no header, or it has a name twice.
    """
    blocks = record_blocks(stream)
    first = next(blocks, b"")
    header, size = _header(first, delimiter)
    kinds, groups, all_fit = [pa.null()] * len(header), [], True
    offset, row = size, 1

    def found(block: bytes) -> pa.Schema:
        records = _records(block, header, delimiter)
        marks = {"rows": str(records.num_rows), "bad": str(len(records.bad))}
        own = [_kind(records.table.column(place)) for place in range(len(header))]
        return pa.schema(list(zip(header, own, strict=True)), metadata=marks)

    def rest() -> Iterator[bytes]:
        yield from [first[size:]] if first[size:] else []
        yield from blocks

    for block, schema in in_threads(found, rest()):
        kinds = [_wider(before, now) for before, now in zip(kinds, schema.types, strict=True)]
        rows = int(schema.metadata[b"rows"])
        all_fit &= schema.metadata[b"bad"] == b"0"
        groups.append(RowGroup(rows, len(block), offset, row))
        offset, row = offset + len(block), row + rows
    schema = pa.schema(list(zip(header, kinds, strict=True)))
    return FileContent(schema if all_fit else with_line_errors(schema, name=name), tuple(groups))


def parse_records(block: bytes, schema: pa.Schema, *, delimiter: str, row: int) -> pa.Table:
    """The rows of a block in the columns of a schema, the first one being that number of the file without its header.

    Raises:
        ArrowInvalid: a row cannot be read, and the schema has no column that says so.
    """
    own = schema.remove(schema.names.index(LINE_ERROR)) if has_line_errors(schema) else schema
    records = _records(block, own.names, delimiter)
    table = pa.Table.from_arrays(
        [
            pa.nulls(len(records.table)) if pa.types.is_null(field.type) else column.cast(field.type)
            for field, column in zip(own, records.table.columns, strict=True)
        ],
        schema=own,
    )
    reasons = {
        place: f"row {row + place} has {cells} cells, the header {len(own)}" for place, cells in records.bad.items()
    }
    if own is schema:
        if reasons:
            raise pa.ArrowInvalid(next(iter(reasons.values())))
        return table
    blank = pa.Table.from_arrays([pa.nulls(1, kind) for kind in own.types], schema=own)
    pieces, done = [table.slice(0, 0)], 0
    for number, place in enumerate(reasons):  # rows of the table before this one: all but the bad ones
        pieces += [table.slice(done, place - number - done), blank]
        done = place - number
    whole = pa.concat_tables([*pieces, table.slice(done)])
    told = pa.array([reasons.get(place) for place in range(records.num_rows)], pa.string())
    return whole.append_column(schema.field(LINE_ERROR), told)


@dataclass(frozen=True, slots=True)
class _Records:
    """The rows of a block that can be read, as text, and the others: the place in the block, and how many cells."""

    table: pa.Table
    bad: dict[int, int]

    @property
    def num_rows(self) -> int:
        return len(self.table) + len(self.bad)


def _records(block: bytes, header: Sequence[str], delimiter: str) -> _Records:
    bad: dict[int, int] = {}

    def note(row: pc.InvalidRow) -> str:
        bad[row.number - 1] = row.actual_columns
        return "skip"

    table = pc.read_csv(
        io.BytesIO(block),
        pc.ReadOptions(use_threads=False, block_size=len(block) + 1, column_names=list(header)),
        pc.ParseOptions(delimiter=delimiter, newlines_in_values=True, invalid_row_handler=note),
        pc.ConvertOptions(
            check_utf8=False,  # a cell that is not is the error of its row
            column_types=dict.fromkeys(header, pa.string()),
            strings_can_be_null=True,
            quoted_strings_can_be_null=False,
            null_values=[""],
        ),
    )
    return _Records(table, dict(sorted(bad.items())))


def _header(block: bytes, delimiter: str) -> tuple[list[str], int]:
    """The names of the columns, and how many bytes they take."""
    start = len(BOM) if block.startswith(BOM) else 0
    end = block.find(b"\n", start) + 1 or len(block)
    while block.count(b'"', start, end) % 2 and end < len(block):
        end = block.find(b"\n", end) + 1 or len(block)
    line = block[start:end]
    if not line.strip():
        raise pa.ArrowInvalid("there is no header")
    names = pc.read_csv(
        io.BytesIO(line.rstrip(b"\r\n") + b"\n"), parse_options=pc.ParseOptions(delimiter=delimiter)
    ).column_names
    if len(set(names)) < len(names):
        raise pa.ArrowInvalid(f"its header has a name twice: {', '.join(names)}")
    return names, end


def _kind(column: pa.ChunkedArray) -> pa.DataType:
    """The type of a column of text, by what is written in it."""
    import pyarrow.compute as compute  # takes as long as all else here together

    if column.null_count == len(column):
        return pa.null()
    for pattern, kind in ((INTEGER, pa.int64()), (NUMBER, pa.float64())):
        if compute.all(compute.match_substring_regex(column.cast(pa.binary()), pattern)).as_py():
            return kind
    return pa.string()


def _wider(one: pa.DataType, other: pa.DataType) -> pa.DataType:
    order = [pa.null(), pa.int64(), pa.float64(), pa.string()]
    return max(one, other, key=order.index)
