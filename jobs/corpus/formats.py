"""Formats of files by their names, and what is found in a file before its rows are read: groups of rows and a schema.

Parquet tells both in its footer. JSONL and CSV tell nothing, so that the whole file is read once (`lines.py`,
`delimited.py`); an Arrow stream likewise (`record_batches.py`).
"""

from __future__ import annotations

import base64
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, TypeAlias, TypeVar

import pyarrow as pa

from jobs.errors import CorpusError

Format: TypeAlias = Literal["parquet", "arrow", "jsonl", "csv", "tsv"]
SUFFIXES: dict[str, Format] = {
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
TEXT_FORMATS = ("jsonl", "csv", "tsv")
BLOCK_BYTES = 16 << 20
"""Bytes of text that are parsed at once."""
SCAN_THREADS = 4
COMPRESSED_BYTES = 4 << 20
"""Bytes of a compressed text that are read at once; Arrow asks for 64 KiB at a time, each a request on a store."""
TEXTS_AT_ONCE = 2
"""Texts that are read at once when a job is planned, each by so many threads, which hold a block each."""

LINE_ERROR = "line_error"
"""The column that says which lines of a text cannot be read, and why. It is there only where there are any."""
LINE_ERROR_FIELD = pa.field(LINE_ERROR, pa.string(), metadata={"rayward": LINE_ERROR})

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class RowGroup:
    """Rows that stand together in a file: a row group, a record batch, or a block of lines.

    `num_bytes` are uncompressed; `offset` and `line` (from 1) are where a block of text begins.
    """

    num_rows: int
    num_bytes: int
    offset: int = 0
    line: int = 1


@dataclass(frozen=True, slots=True)
class FileContent:
    """The rows of a file in groups, and its schema."""

    schema: pa.Schema
    groups: tuple[RowGroup, ...]


def format_of(name: str) -> Format | None:
    """The format of a file that is named so, None where its name does not tell."""
    stem, suffix = os.path.splitext(name.lower())
    if suffix not in COMPRESSIONS:
        return SUFFIXES.get(suffix)
    found = SUFFIXES.get(os.path.splitext(stem)[1])
    return found if found in TEXT_FORMATS else None


def named_format(name: str) -> Format:
    """The format of a file that was named by the user: `.json` is lines too, and what tells nothing is Parquet. In a
    folder `.json` is no data, since settings are written so."""
    stem, suffix = os.path.splitext(name.lower())
    is_json = os.path.splitext(stem)[1] == ".json" if suffix in COMPRESSIONS else suffix == ".json"
    return format_of(name) or ("jsonl" if is_json else "parquet")


def compression_of(name: str) -> str | None:
    """The compression that a text file of this name has."""
    return COMPRESSIONS.get(os.path.splitext(name.lower())[1])


def text_stream(source: pa.NativeFile, name: str) -> pa.NativeFile:
    """The text in a file: decompressed where its name says that it is compressed."""
    compression = compression_of(name)
    if compression is None:
        return source
    return pa.CompressedInputStream(pa.BufferedInputStream(source, COMPRESSED_BYTES), compression)


def packed(schema: pa.Schema) -> str:
    """A schema as text, to travel with a unit."""
    return base64.b64encode(schema.serialize().to_pybytes()).decode()


def unpacked(text: str) -> pa.Schema:
    """The schema that `packed` made a text of."""
    return pa.ipc.read_schema(pa.BufferReader(base64.b64decode(text)))


def in_threads(function: Callable[[T], pa.Schema], items: Iterator[T]) -> Iterator[tuple[T, pa.Schema]]:
    """Each item and what the function makes of it, in order; a few are under way at once, the others not read yet."""
    pending: list[tuple[T, Future[pa.Schema]]] = []
    with ThreadPoolExecutor(SCAN_THREADS) as pool:
        for item in items:
            pending.append((item, pool.submit(function, item)))
            if len(pending) > SCAN_THREADS:
                first, made = pending.pop(0)
                yield first, made.result()
        for first, made in pending:
            yield first, made.result()


def one_group(groups: tuple[RowGroup, ...]) -> tuple[RowGroup, ...]:
    """The groups of a file that can only be read from its start, as one: its units are read by one task."""
    if len(groups) < 2:
        return groups
    rows, size = sum(group.num_rows for group in groups), sum(group.num_bytes for group in groups)
    return (RowGroup(rows, size, groups[0].offset, groups[0].line),)


def merged(schema: pa.Schema, other: pa.Schema) -> tuple[pa.Schema, bool]:
    """Both schemas as one, and whether a column has types in them that are not to be joined: then the first stays."""
    try:
        return pa.unify_schemas([schema, other], promote_options="permissive"), True
    except (pa.ArrowTypeError, pa.ArrowInvalid):
        fits = True
        for field in other:
            try:
                schema = pa.unify_schemas([schema, pa.schema([field])], promote_options="permissive")
            except (pa.ArrowTypeError, pa.ArrowInvalid):
                fits = False
        return schema, fits


def with_line_errors(schema: pa.Schema, *, name: str) -> pa.Schema:
    """The schema of a text in which some lines cannot be read.

    Raises:
        CorpusError: it has a column of that name.
    """
    if LINE_ERROR in schema.names:
        raise CorpusError(f"{name} has lines that cannot be read, and a column {LINE_ERROR!r} of its own; rename it")
    return schema.append(LINE_ERROR_FIELD)


def has_line_errors(schema: pa.Schema) -> bool:
    """Whether the schema is that of a text with lines that cannot be read."""
    if LINE_ERROR not in schema.names:
        return False
    return (schema.field(LINE_ERROR).metadata or {}).get(b"rayward") == LINE_ERROR.encode()
