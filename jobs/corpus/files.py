"""Inputs: which files there are, and how they are cut into units. Of Parquet the footers are read, never the data; text
formats have none, and are read once.

A unit is a range of rows of one file. It ends at the end of a group (a row group, a record batch, a block of lines)
where it can, and inside one where groups are large: `reader.py` streams a file's units one after the other, so that
cutting costs no second read. Files that are smaller than a unit may share one.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from itertools import accumulate
from threading import BoundedSemaphore
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds
from pyarrow import fs

from jobs.corpus.delimited import DELIMITERS, scan_records
from jobs.corpus.formats import (
    TEXT_FORMATS,
    TEXTS_AT_ONCE,
    FileContent,
    Format,
    RowGroup,
    compression_of,
    named_format,
    one_group,
    packed,
    text_stream,
    unpacked,
)
from jobs.corpus.hub import pinned_commit
from jobs.corpus.lines import scan_lines
from jobs.corpus.record_batches import scan_batches
from jobs.corpus.sources import FoundFile, Source, found_files, partition_fields
from jobs.corpus.storage import best_whole, files_at_once, told, whole_if_small
from jobs.errors import CorpusError

TITLES: dict[Format, str] = {"parquet": "Parquet", "arrow": "Arrow", "jsonl": "JSONL", "csv": "CSV", "tsv": "TSV"}
MAX_UNIT_BYTES = 64 << 20
MIN_UNIT_ROWS, MAX_UNIT_ROWS, TARGET_UNITS = 256, 16384, 4096


Partition = tuple[str, str | int | None, str]
"""A column that a folder of a file stands for: its name, the value and the type."""


@dataclass(frozen=True, slots=True)
class Unit:
    """Rows `first_row` to `first_row + num_rows - 1` of a file; it is scored, committed and resumed as a whole.

    `splits_group` tells that it begins inside a group, which is best read together with the unit before it. Text has no
    footer that a reader could look up, so that its units say where to read: the byte `offset` and the `line` at which
    the unit's first group begins, how many rows to `skip` in it, and the file's schema, as `formats.packed` has it.
    `partitions` are columns with one value that every row gets. A unit of several files has them as `parts`, each a
    unit of its own, in row order; it has the path and name of the first, and the schema of all.
    """

    path: str
    name: str
    fingerprint: str
    first_row: int
    num_rows: int
    splits_group: bool = False
    format: Format = "parquet"
    offset: int = 0
    line: int = 1
    skip: int = 0
    schema: str = ""
    partitions: tuple[Partition, ...] = ()
    parts: tuple[Unit, ...] = ()

    @property
    def id(self) -> str:
        """A name that sorts by row within a file and changes when the file or the range does."""
        identity = f"{self.name}\n{self.fingerprint}\n{self.first_row}\n{self.num_rows}"
        digest = hashlib.sha256(identity.encode()).hexdigest()[:16]
        stem = re.sub(r"[^A-Za-z0-9.-]", "-", self.name.removesuffix(".parquet").replace("/", "--"))[-80:]
        return f"{stem}-{self.first_row:012d}-{digest}"

    @property
    def files(self) -> tuple[Unit, ...]:
        """The unit of each file in it: itself, or its parts with the schema that they share."""
        return tuple(replace(part, schema=self.schema) for part in self.parts) or (self,)

    @classmethod
    def joined(cls, units: Sequence[Unit]) -> Unit:
        """The unit of whole files of one schema; of one file it is that file's own."""
        first = units[0]
        if len(units) == 1:
            return first
        listed = "\n".join(unit.id for unit in units)
        return replace(
            first,
            fingerprint=hashlib.sha256(listed.encode()).hexdigest()[:16],
            num_rows=sum(unit.num_rows for unit in units),
            partitions=(),
            parts=tuple(replace(unit, schema="") for unit in units),
        )

    def place(self, row: int) -> tuple[str, int]:
        """The name of the file that a row of the unit is from, and the row's number there."""
        for part in self.parts:
            if row < part.num_rows:
                return part.place(row)
            row -= part.num_rows
        return self.name, self.first_row + row

    def text(self) -> str:
        """The unit as text, to travel: `Unit.of` reads it."""
        return json.dumps(asdict(self))

    @classmethod
    def of(cls, text: str) -> Unit:
        """The unit that `text` made a text of."""
        return cls._of_fields(json.loads(text))

    @classmethod
    def _of_fields(cls, fields: Mapping[str, Any]) -> Unit:
        partitions = tuple((name, value, kind) for name, value, kind in fields["partitions"])
        parts = tuple(cls._of_fields(part) for part in fields["parts"])
        return cls(**{**fields, "partitions": partitions, "parts": parts})


@dataclass(frozen=True, slots=True)
class InputFile:
    """An input file: its `path` on the filesystem, its `name` below the input, and the groups that its rows stand in.

    `fingerprint` changes when the file does; `schema` is packed, and there for text alone.
    """

    path: str
    name: str
    fingerprint: str
    groups: tuple[RowGroup, ...]
    format: Format = "parquet"
    schema: str = ""
    partitions: tuple[Partition, ...] = ()

    @property
    def num_rows(self) -> int:
        return sum(group.num_rows for group in self.groups)

    @property
    def num_bytes(self) -> int:
        """Bytes of the data, uncompressed."""
        return sum(group.num_bytes for group in self.groups)

    def unit(self, first_row: int, num_rows: int) -> Unit:
        """The unit of so many rows from one on."""
        return _unit(self, first_row, num_rows, _starts(self))


@dataclass(frozen=True, slots=True)
class Plan:
    """An input as it was planned, which a run's output folder keeps: the fingerprint of each file by its path and what
    was found in it, so that it need not be looked for again, and the files that share a unit, by name.

    `shared` has every file, those that are alone too; None says that files do not share units, as in the folders of
    earlier versions.
    """

    contents: Mapping[str, tuple[str, FileContent]]
    shared: tuple[tuple[str, ...], ...] | None = ()
    commits: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, corpus: Corpus, units: Iterable[Unit], *, shares: bool) -> Plan:
        """The plan of a corpus that was cut into these units."""
        known = {
            file.path: (file.fingerprint, FileContent(schema, file.groups))
            for file, schema in zip(corpus.files, corpus.own_schemas, strict=True)
        }
        names = dict.fromkeys(tuple(part.name for part in unit.files) for unit in units)
        return cls(known, tuple(names) if shares else None, corpus.commits)

    def text(self) -> str:
        """The plan as text: `Plan.read` reads it."""
        schemas: dict[str, int] = {}
        files = {
            path: [fingerprint, schemas.setdefault(packed(content.schema), len(schemas)), *_numbers(content.groups)]
            for path, (fingerprint, content) in self.contents.items()
        }
        return json.dumps(
            {"files": files, "schemas": list(schemas), "shared": self.shared, "commits": dict(self.commits)}
        )

    @classmethod
    def read(cls, text: str | bytes) -> Plan:
        """The plan that `text` made a text of.

        Raises:
            ValueError: it is none.
        """
        try:
            fields = json.loads(text)
            schemas = [unpacked(schema) for schema in fields["schemas"]]
            contents = {
                path: (fingerprint, FileContent(schemas[place], tuple(RowGroup(*group) for group in groups)))
                for path, (fingerprint, place, *groups) in fields["files"].items()
            }
            shared, commits = fields["shared"], dict(fields["commits"])
        except (KeyError, TypeError, IndexError, pa.ArrowException) as error:
            raise ValueError(f"it is no plan: {error}") from error
        return cls(contents, None if shared is None else tuple(tuple(names) for names in shared), commits)


NO_PLAN = Plan({})


def _numbers(groups: Sequence[RowGroup]) -> list[list[int]]:
    return [[group.num_rows, group.num_bytes, group.offset, group.line] for group in groups]


@dataclass(frozen=True, slots=True)
class Corpus:
    """The files of an input, in name order, and their schemas in the same order: their own, and with the columns that
    their folders stand for. `commits` are those of datasets on the Hub."""

    filesystem: fs.FileSystem
    files: tuple[InputFile, ...]
    own_schemas: tuple[pa.Schema, ...]
    partitions: tuple[pa.Field, ...] = ()
    commits: Mapping[str, str] = field(default_factory=dict)

    @property
    def schemas(self) -> tuple[pa.Schema, ...]:
        """The schemas of the tables that are read of the files."""
        return tuple(_extended(*both) for both in zip(self.own_schemas, self.files, strict=True))

    @property
    def num_rows(self) -> int:
        return sum(file.num_rows for file in self.files)

    @property
    def num_bytes(self) -> int:
        """Bytes of the data, uncompressed."""
        return sum(file.num_bytes for file in self.files)

    @property
    def fingerprint(self) -> str:
        """A digest that changes when any file does, or when one comes or goes."""
        listed = "\n".join(f"{file.name} {file.fingerprint}" for file in self.files)
        return hashlib.sha256(listed.encode()).hexdigest()[:16]

    @property
    def identity(self) -> dict[str, Any]:
        """For a run's identity: the columns that folders stand for, and commits on the Hub, where there are any."""
        columns = {one.name: str(one.type) for one in self.partitions}
        found = {"partition_columns": columns, "input_commits": dict(self.commits)}
        return {name: value for name, value in found.items() if value}

    @classmethod
    def open(
        cls, source: str | Source, *, output: str | None = None, companion: str | None = None, plan: Plan = NO_PLAN
    ) -> Corpus:
        """Find the files of `source` and read their footers, or, where they have none, their rows.

        Args:
            source: inputs, each a file, a folder (searched to its depths; names that start with `_` or `.` are passed
                over), a glob with `*`, `?` and `**`, or a URI that pyarrow.fs knows, such as `s3://bucket/folder`.
            output: the job's own output folder, a path or URI, which is passed over.
            companion: a folder of the job's own beside it, which is passed over too.
            plan: an earlier run's: files that did not change since are not read.

        Raises:
            CorpusError: nothing is found, files are of several formats, or cannot be read; the text names each.
        """
        source = Source.of(source)
        own = [folder for folder in (output, companion) if folder is not None]
        listing = found_files(source, own, plan.commits)
        filesystem, found = listing.filesystem, listing.files
        form = _format(filesystem, [file.info for file in found])
        contents = _contents(filesystem, [file.info for file in found], form, plan)
        if broken := [content for content in contents if isinstance(content, str)]:
            more = f"\n  and {len(broken) - 5} more" if len(broken) > 5 else ""
            raise CorpusError(
                f"these input files are not readable {TITLES[form]}:\n  " + "\n  ".join(broken[:5]) + more
            )
        read = [
            (file, content) for file, content in zip(found, contents, strict=True) if isinstance(content, FileContent)
        ]
        fields = partition_fields(found) if source.partition_columns else []
        files = tuple(_input_file(filesystem, file, content, form, fields) for file, content in read)
        named = {name for file in files for name, _, _ in file.partitions}
        return cls(
            filesystem,
            files,
            tuple(content.schema for _, content in read),
            tuple(field for field in fields if field.name in named),
            dict(listing.commits),
        )

    def limited(self, num_rows: int | None) -> Corpus:
        """The first rows of the corpus, so many at most; the whole of it for None."""
        if num_rows is None:
            return self
        left, kept = num_rows, list[InputFile]()
        for file in self.files:
            if left <= 0 and kept:
                break
            kept.append(_first_rows(file, left))
            left -= kept[-1].num_rows
        return replace(self, files=tuple(kept), own_schemas=self.own_schemas[: len(kept)])

    def stretches(self, number: int, num_rows: int) -> list[Unit]:
        """Short units, so many at most, at even distances over the corpus; all of it where it has no more rows."""
        if self.num_rows <= number * num_rows:
            return [unit for unit in self.units(num_rows) if unit.num_rows]
        ends = list(accumulate(file.num_rows for file in self.files))
        found = []
        for place in range(number):
            row = self.num_rows * (2 * place + 1) // (2 * number)
            index = bisect_right(ends, row)
            file = self.files[index]
            first = row - (ends[index] - file.num_rows)
            found.append(file.unit(first, min(num_rows, file.num_rows - first)))
        return found

    def units(self, rows_per_unit: int) -> list[Unit]:
        """Cut every file into units of about `rows_per_unit` rows and at most `MAX_UNIT_BYTES` (uncompressed)."""
        return [unit for file in self.files for unit in _units_of(file, rows_per_unit)]

    def shared_units(self, rows_per_unit: int, shared: Sequence[Sequence[str]] | None = ()) -> list[Unit]:
        """Like `units`, but neighbours of one schema that are smaller than a unit share one.

        Args:
            rows_per_unit: the size of a unit.
            shared: names of files that an earlier plan put together, or left alone; so they stay. None: no file shares
                a unit.
        """
        if shared is None:
            return self.units(rows_per_unit)
        places = {file.name: place for place, file in enumerate(self.files)}
        planned = {name: [places[one] for one in names if one in places] for names in shared for name in names}
        schemas, units, neighbours = self.schemas, list[Unit](), _Neighbours(rows_per_unit)
        for place, file in enumerate(self.files):
            own = list(_units_of(file, rows_per_unit))
            together = planned.get(file.name)
            if together is None and len(own) == 1:
                units += neighbours.add(own[0], file.num_bytes, schemas[place])
                continue
            units += neighbours.taken()
            if together is None or len(together) == 1:
                units += own
            elif place == together[0]:
                units.append(Unit.joined([self.files[one].unit(0, self.files[one].num_rows) for one in together]))
        return units + neighbours.taken()


class _Neighbours:
    """Units of small files one after the other, which become one as long as there is room in it."""

    def __init__(self, rows_per_unit: int) -> None:
        self._limit = rows_per_unit
        self._units: list[Unit] = []
        self._num_rows = self._num_bytes = 0
        self._schema: pa.Schema | None = None

    def add(self, unit: Unit, num_bytes: int, schema: pa.Schema) -> list[Unit]:
        """Take one more; the unit that those before it make where it has no room with them."""
        fits = (
            len(self._units) < self._limit
            and self._num_rows + unit.num_rows <= self._limit
            and self._num_bytes + num_bytes <= MAX_UNIT_BYTES
            and self._schema is not None
            and schema.equals(self._schema, check_metadata=True)
        )
        made = [] if fits else self.taken()
        self._units.append(unit)
        self._num_rows, self._num_bytes, self._schema = (
            self._num_rows + unit.num_rows,
            self._num_bytes + num_bytes,
            schema,
        )
        return made

    def taken(self) -> list[Unit]:
        """The unit of those that wait, where any do."""
        made = [Unit.joined(self._units)] if self._units else []
        self._units, self._num_rows, self._num_bytes, self._schema = [], 0, 0, None
        return made


def _extended(schema: pa.Schema, file: InputFile) -> pa.Schema:
    """A file's schema with the columns that its folders stand for."""
    for name, _, kind in file.partitions:
        schema = schema.append(pa.field(name, pa.type_for_alias(kind)))
    return schema


def auto_rows_per_unit(num_rows: int) -> int:
    """A unit size that gives about 4,096 units: small corpora resume finely, large ones do not drown in files."""
    wanted = max(1, math.ceil(num_rows / TARGET_UNITS))
    return min(MAX_UNIT_ROWS, max(MIN_UNIT_ROWS, 1 << (wanted - 1).bit_length()))


def sampled(units: Sequence[Unit], fraction: float | None) -> list[Unit]:
    """A share of units, evenly spread over them and the same at every call; at least one. All for None."""
    if fraction is None:
        return list(units)
    chosen = [unit for place, unit in enumerate(units) if int((place + 1) * fraction) > int(place * fraction)]
    return chosen or [units[len(units) // 2]]


def _first_rows(file: InputFile, num_rows: int) -> InputFile:
    groups = []
    for group in file.groups:
        if num_rows <= 0:
            break
        rows = min(num_rows, group.num_rows)
        groups.append(replace(group, num_rows=rows, num_bytes=group.num_bytes * rows // max(group.num_rows, 1)))
        num_rows -= rows
    return replace(file, groups=tuple(groups))


def _units_of(file: InputFile, rows_per_unit: int) -> Iterator[Unit]:
    row_bytes = max((group.num_bytes / group.num_rows for group in file.groups if group.num_rows), default=0.0)
    limit = max(1, min(rows_per_unit, int(MAX_UNIT_BYTES / row_bytes))) if row_bytes else rows_per_unit
    starts = _starts(file)
    first = pending = 0
    for part in (part for group in file.groups for part in _even(group.num_rows, limit)):
        if pending and pending + part > limit:
            yield _unit(file, first, pending, starts)
            first, pending = first + pending, 0
        pending += part
    if pending or file.num_rows == 0:  # a file without rows has a unit too: its output has its schema
        yield _unit(file, first, pending, starts)


def _starts(file: InputFile) -> list[int]:
    """The first row of each group."""
    return list(accumulate((group.num_rows for group in file.groups[:-1]), initial=0))


def _unit(file: InputFile, first_row: int, num_rows: int, starts: Sequence[int]) -> Unit:
    place = bisect_right(starts, first_row) - 1
    group = file.groups[place] if file.groups else RowGroup(0, 0)
    skip = first_row - starts[place]
    where = (group.offset, group.line, skip) if file.format in TEXT_FORMATS else (0, 1, 0)
    return Unit(
        file.path,
        file.name,
        file.fingerprint,
        first_row,
        num_rows,
        skip > 0,
        file.format,
        *where,
        file.schema,
        file.partitions,
    )


def _even(rows: int, limit: int) -> list[int]:
    """`rows` in as few nearly equal parts of at most `limit` as there can be."""
    parts = math.ceil(rows / limit)
    return [rows * (part + 1) // parts - rows * part // parts for part in range(parts)]


def _format(filesystem: fs.FileSystem, infos: Sequence[fs.FileInfo]) -> Format:
    """The format that all files have; Parquet where their names do not tell.

    Raises:
        CorpusError: they have several.
    """
    found: dict[Format, str] = {}
    for info in infos:
        found.setdefault(named_format(info.base_name), told(filesystem, info.path))
    if len(found) > 1:
        examples = " and ".join(f"{TITLES[form]} ({path})" for form, path in found.items())
        raise CorpusError(
            f"the input has files of {len(found)} formats, {examples}; name one kind with a glob in quotes"
        )
    return next(iter(found))


def _contents(
    filesystem: fs.FileSystem, infos: Sequence[fs.FileInfo], form: Format, plan: Plan
) -> list[FileContent | str]:
    """What `_content` finds in each file. Texts are read few at a time, since each has several threads and, where it is
    large, much memory; small ones on a store wait for it most of the time."""
    few = BoundedSemaphore(TEXTS_AT_ONCE)

    def content(info: fs.FileInfo) -> FileContent | str:
        is_work = form in TEXT_FORMATS and not best_whole(filesystem, info.size)
        with few if is_work else nullcontext():
            return _content(filesystem, info, form, plan)

    with ThreadPoolExecutor(files_at_once(filesystem)) as pool:
        return list(pool.map(content, infos))


def _content(filesystem: fs.FileSystem, info: fs.FileInfo, form: Format, plan: Plan) -> FileContent | str:
    """The rows of a file in groups, and its schema; or why it cannot be read."""
    fingerprint, known = plan.contents.get(info.path, ("", None))
    if known is not None and fingerprint == file_fingerprint(filesystem, info):
        return known
    try:
        if form == "parquet":
            return _footer(filesystem, info)
        with whole_if_small(filesystem, filesystem.open_input_file(info.path)) as source:
            if form == "arrow":
                return scan_batches(source)
            stream = text_stream(source, info.base_name)
            if form == "jsonl":
                content = scan_lines(stream, name=info.path)
            else:
                content = scan_records(stream, delimiter=DELIMITERS[form], name=info.path)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        return f"{told(filesystem, info.path)} ({info.size} bytes): {error}"
    if compression_of(info.base_name):
        return FileContent(content.schema, one_group(content.groups))
    return content


def _footer(filesystem: fs.FileSystem, info: fs.FileInfo) -> FileContent:
    # Told the size, which the listing has, it does not ask the store for it.
    fragment = ds.ParquetFileFormat().make_fragment(info.path, filesystem=filesystem, file_size=info.size)
    footer = fragment.metadata
    groups = [footer.row_group(index) for index in range(footer.num_row_groups)]
    sizes = tuple(RowGroup(group.num_rows, group.total_byte_size) for group in groups)
    return FileContent(footer.schema.to_arrow_schema(), sizes)


def _input_file(
    filesystem: fs.FileSystem, found: FoundFile, content: FileContent, form: Format, fields: Sequence[pa.Field]
) -> InputFile:
    values = dict(found.partitions)
    partitions = tuple(
        _partition(field, values.get(field.name)) for field in fields if field.name not in content.schema.names
    )
    return InputFile(
        path=found.info.path,
        name=found.name,
        fingerprint=file_fingerprint(filesystem, found.info),
        groups=content.groups,
        format=form,
        schema=packed(content.schema) if form in TEXT_FORMATS else "",
        partitions=partitions,
    )


def _partition(field: pa.Field, value: str | None) -> Partition:
    is_number = pa.types.is_integer(field.type) and value is not None
    return field.name, int(value) if is_number and value is not None else value, str(field.type)


def file_fingerprint(filesystem: fs.FileSystem, info: fs.FileInfo) -> str:
    """The size and time of change of a file, which change when it does.

    An S3 store may list milliseconds while it answers with whole seconds where one file is asked for.
    """
    if isinstance(filesystem, fs.PyFileSystem) and (commit := pinned_commit(info.path)):
        return f"{info.size}-{commit[:16]}"
    mtime_ns = info.mtime_ns
    if filesystem.type_name == "s3" and mtime_ns is not None:
        mtime_ns -= mtime_ns % 1_000_000_000
    return f"{info.size}-{mtime_ns}"
