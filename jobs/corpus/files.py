"""Inputs: which files there are, and how they are cut into units. Of Parquet the footers are read, never the data; text
formats have none, and are read once.

A unit is a range of rows of one file. It ends at the end of a group (a row group, a record batch, a block of lines)
where it can, and inside one where groups are large: `reader.py` streams a file's units one after the other, so that
cutting costs no second read.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import accumulate

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
    format_of,
    one_group,
    packed,
    text_stream,
)
from jobs.corpus.lines import scan_lines
from jobs.corpus.record_batches import scan_batches
from jobs.corpus.storage import filesystem_of, same_store, told
from jobs.errors import CorpusError

FOOTER_THREADS = 16
TITLES: dict[Format, str] = {"parquet": "Parquet", "arrow": "Arrow", "jsonl": "JSONL", "csv": "CSV", "tsv": "TSV"}
MAX_UNIT_BYTES = 64 << 20
MIN_UNIT_ROWS, MAX_UNIT_ROWS, TARGET_UNITS = 256, 16384, 4096


@dataclass(frozen=True, slots=True)
class Unit:
    """Rows `first_row` to `first_row + num_rows - 1` of a file; it is scored, committed and resumed as a whole.

    `splits_group` tells that it begins inside a group, which is best read together with the unit before it. Text has no
    footer that a reader could look up, so that its units say where to read: the byte `offset` and the `line` at which
    the unit's first group begins, how many rows to `skip` in it, and the file's schema, as `formats.packed` has it.
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

    @property
    def id(self) -> str:
        """A name that sorts by row within a file and changes when the file or the range does."""
        identity = f"{self.name}\n{self.fingerprint}\n{self.first_row}\n{self.num_rows}"
        digest = hashlib.sha256(identity.encode()).hexdigest()[:16]
        stem = re.sub(r"[^A-Za-z0-9.-]", "-", self.name.removesuffix(".parquet").replace("/", "--"))[-80:]
        return f"{stem}-{self.first_row:012d}-{digest}"


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

    @property
    def num_rows(self) -> int:
        return sum(group.num_rows for group in self.groups)

    def unit(self, first_row: int, num_rows: int) -> Unit:
        """The unit of so many rows from one on."""
        return _unit(self, first_row, num_rows, _starts(self))


@dataclass(frozen=True, slots=True)
class Corpus:
    """The files of an input, in name order, and their schemas in the same order."""

    filesystem: fs.FileSystem
    files: tuple[InputFile, ...]
    schemas: tuple[pa.Schema, ...]

    @property
    def num_rows(self) -> int:
        return sum(file.num_rows for file in self.files)

    @property
    def num_bytes(self) -> int:
        """Bytes of the data, uncompressed."""
        return sum(group.num_bytes for file in self.files for group in file.groups)

    @property
    def fingerprint(self) -> str:
        """A digest that changes when any file does, or when one comes or goes."""
        listed = "\n".join(f"{file.name} {file.fingerprint}" for file in self.files)
        return hashlib.sha256(listed.encode()).hexdigest()[:16]

    @classmethod
    def open(cls, source: str, *, output: str | None = None, companion: str | None = None) -> Corpus:
        """Find the files of `source` and read their footers, or, where they have none, their rows.

        Args:
            source: a file, a folder (searched to its depths; names that start with `_` or `.` are passed over), a
                glob with `*`, `?` and `**`, or a URI that pyarrow.fs knows, such as `s3://bucket/folder`.
            output: the job's own output folder, a path or URI, which is passed over.
            companion: a folder of the job's own beside it, which is passed over too.

        Raises:
            CorpusError: nothing is found, files are of several formats, or cannot be read; the text names each.
        """
        filesystem, path = filesystem_of(source)
        own = [folder for folder in (output, companion) if folder is not None]
        excluded = tuple(start for folder in own if (start := _below(folder, source, filesystem)) is not None)
        if (_base(path) + "/").startswith(excluded):
            raise CorpusError(f"the input {source} is inside the output folder {output}; choose another --output")
        infos = _find(filesystem, path, excluded)
        if not infos:
            raise CorpusError(
                f"no Parquet files (*.parquet) in {source}, nor *.jsonl, *.csv, *.tsv (or those with .gz or .zst), nor "
                "*.arrow"
            )
        form = _format(filesystem, infos)
        with ThreadPoolExecutor(TEXTS_AT_ONCE if form in TEXT_FORMATS else FOOTER_THREADS) as pool:
            contents = list(pool.map(lambda info: _content(filesystem, info, form), infos))
        if broken := [content for content in contents if isinstance(content, str)]:
            more = f"\n  and {len(broken) - 5} more" if len(broken) > 5 else ""
            raise CorpusError(
                f"these input files are not readable {TITLES[form]}:\n  " + "\n  ".join(broken[:5]) + more
            )
        base = _base(path)
        read = [
            (info, content) for info, content in zip(infos, contents, strict=True) if isinstance(content, FileContent)
        ]
        files = tuple(_input_file(filesystem, info, content, base, form) for info, content in read)
        return cls(filesystem, files, tuple(content.schema for _, content in read))

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
        return replace(self, files=tuple(kept), schemas=self.schemas[: len(kept)])

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


def _below(output: str, source: str, filesystem: fs.FileSystem) -> str | None:
    """The beginning of paths below the output folder, if it is in the store of `source`."""
    output_filesystem, folder = filesystem_of(output)
    shared = output_filesystem.equals(filesystem) or same_store(output, source)
    return folder.rstrip("/") + "/" if shared else None


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
    return Unit(file.path, file.name, file.fingerprint, first_row, num_rows, skip > 0, file.format, *where, file.schema)


def _even(rows: int, limit: int) -> list[int]:
    """`rows` in as few nearly equal parts of at most `limit` as there can be."""
    parts = math.ceil(rows / limit)
    return [rows * (part + 1) // parts - rows * part // parts for part in range(parts)]


def _find(filesystem: fs.FileSystem, path: str, excluded: tuple[str, ...]) -> list[fs.FileInfo]:
    pattern = _pattern(path) if re.search(r"[*?]", path) else None
    base = _base(path)
    try:
        root = filesystem.get_file_info(base if pattern else path)
        if root.type == fs.FileType.NotFound:
            raise CorpusError(f"input {told(filesystem, path)} does not exist")
        if root.type == fs.FileType.File:
            return [root]
        infos = filesystem.get_file_info(fs.FileSelector(root.path, recursive=True))
    except (pa.ArrowException, OSError) as error:
        raise CorpusError(f"input {told(filesystem, path)} cannot be listed: {error}") from error

    def wanted(info: fs.FileInfo) -> bool:
        place = os.path.realpath(info.path) if isinstance(filesystem, fs.LocalFileSystem) else info.path
        if info.type != fs.FileType.File or place.startswith(excluded):
            return False
        if pattern:
            return pattern.fullmatch(info.path) is not None
        below = info.path[len(root.path) :].strip("/").split("/")
        return format_of(below[-1]) is not None and not any(_is_passed_over(part) for part in below)

    found = sorted((info for info in infos if wanted(info)), key=lambda info: info.path)
    if isinstance(filesystem, fs.LocalFileSystem):  # a link to a file that is found too, or a loop of links
        found = list({os.path.realpath(info.path): info for info in reversed(found)}.values())[::-1]
    return found


def _base(path: str) -> str:
    """The folder that unit names are relative to: the part of a glob before its first wildcard, or the path."""
    wild = re.search(r"[*?]", path)
    return path[: wild.start()].rpartition("/")[0] or "/" if wild else path.rstrip("/")


def _pattern(glob: str) -> re.Pattern[str]:
    kinds = {"**/": r"(?:.*/)?", "**": r".*", "*": r"[^/]*", "?": r"[^/]"}
    parts = re.split(r"(\*\*/|\*\*|\*|\?)", glob)
    return re.compile("".join(kinds.get(part, re.escape(part)) for part in parts))


def _is_passed_over(name: str) -> bool:
    """Whether a folder's file or folder of this name is no data: hidden, or what `datasets` keeps beside its own."""
    return name.startswith(("_", ".")) or (name.startswith("cache-") and name.endswith(".arrow"))


def _format(filesystem: fs.FileSystem, infos: Sequence[fs.FileInfo]) -> Format:
    """The format that all files have; Parquet where their names do not tell.

    Raises:
        CorpusError: they have several.
    """
    found: dict[Format, str] = {}
    for info in infos:
        found.setdefault(format_of(info.base_name) or "parquet", told(filesystem, info.path))
    if len(found) > 1:
        examples = " and ".join(f"{TITLES[form]} ({path})" for form, path in found.items())
        raise CorpusError(
            f"the input has files of {len(found)} formats, {examples}; name one kind with a glob in quotes"
        )
    return next(iter(found))


def _content(filesystem: fs.FileSystem, info: fs.FileInfo, form: Format) -> FileContent | str:
    """The rows of a file in groups, and its schema; or why it cannot be read."""
    try:
        if form == "parquet":
            return _footer(filesystem, info)
        with filesystem.open_input_file(info.path) as source:
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
    filesystem: fs.FileSystem, info: fs.FileInfo, content: FileContent, base: str, form: Format
) -> InputFile:
    name = info.path[len(base) :].strip("/") if info.path != base else info.base_name
    return InputFile(
        path=info.path,
        name=name,
        fingerprint=file_fingerprint(filesystem, info),
        groups=content.groups,
        format=form,
        schema=packed(content.schema) if form in TEXT_FORMATS else "",
    )


def file_fingerprint(filesystem: fs.FileSystem, info: fs.FileInfo) -> str:
    """The size and time of change of a file, which change when it does.

    An S3 store may list milliseconds while it answers with whole seconds where one file is asked for.
    """
    mtime_ns = info.mtime_ns
    if filesystem.type_name == "s3" and mtime_ns is not None:
        mtime_ns -= mtime_ns % 1_000_000_000
    return f"{info.size}-{mtime_ns}"
