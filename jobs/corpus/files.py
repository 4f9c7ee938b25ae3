"""Parquet inputs: which files there are, and how they are cut into units. Footers are read, never the data.

A unit is a range of rows of one file. It ends at the end of a row group where it can, and inside one where row groups
are large: `reader.py` streams a file's units one after the other, so that cutting costs no second read.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from pyarrow import fs

from jobs.corpus.storage import filesystem_of, same_store, told
from jobs.errors import CorpusError

FOOTER_THREADS = 16
MAX_UNIT_BYTES = 64 << 20
MIN_UNIT_ROWS, MAX_UNIT_ROWS, TARGET_UNITS = 256, 16384, 4096


@dataclass(frozen=True, slots=True)
class InputFile:
    """A Parquet file: its `path` on the filesystem, its `name` below the input, and what its footer says.

    `row_groups` holds (rows, uncompressed bytes) of each; `fingerprint` changes when the file does.
    """

    path: str
    name: str
    fingerprint: str
    row_groups: tuple[tuple[int, int], ...]

    @property
    def num_rows(self) -> int:
        return sum(rows for rows, _ in self.row_groups)


@dataclass(frozen=True, slots=True)
class Unit:
    """Rows `first_row` to `first_row + num_rows - 1` of a file; it is scored, committed and resumed as a whole.

    `splits_group` tells that it begins inside a row group, which is best read together with the unit before it.
    """

    path: str
    name: str
    fingerprint: str
    first_row: int
    num_rows: int
    splits_group: bool = False

    @property
    def id(self) -> str:
        """A name that sorts by row within a file and changes when the file or the range does."""
        identity = f"{self.name}\n{self.fingerprint}\n{self.first_row}\n{self.num_rows}"
        digest = hashlib.sha256(identity.encode()).hexdigest()[:16]
        stem = re.sub(r"[^A-Za-z0-9.-]", "-", self.name.removesuffix(".parquet").replace("/", "--"))[-80:]
        return f"{stem}-{self.first_row:012d}-{digest}"


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
        return sum(size for file in self.files for _, size in file.row_groups)

    @property
    def fingerprint(self) -> str:
        """A digest that changes when any file does, or when one comes or goes."""
        listed = "\n".join(f"{file.name} {file.fingerprint}" for file in self.files)
        return hashlib.sha256(listed.encode()).hexdigest()[:16]

    @classmethod
    def open(cls, source: str, *, output: str | None = None, companion: str | None = None) -> Corpus:
        """Find the Parquet files of `source` and read their footers.

        Args:
            source: a file, a folder (searched to its depths; names that start with `_` or `.` are passed over), a
                glob with `*`, `?` and `**`, or a URI that pyarrow.fs knows, such as `s3://bucket/folder`.
            output: the job's own output folder, a path or URI, which is passed over.
            companion: a folder of the job's own beside it, which is passed over too.

        Raises:
            CorpusError: nothing is found, or files are not Parquet; the text names each.
        """
        filesystem, path = filesystem_of(source)
        own = [folder for folder in (output, companion) if folder is not None]
        excluded = tuple(start for folder in own if (start := _below(folder, source, filesystem)) is not None)
        if (_base(path) + "/").startswith(excluded):
            raise CorpusError(f"the input {source} is inside the output folder {output}; choose another --output")
        infos = _find(filesystem, path, excluded)
        if not infos:
            raise CorpusError(f"no Parquet files (*.parquet) in {source}")
        with ThreadPoolExecutor(FOOTER_THREADS) as pool:
            footers = list(pool.map(lambda info: _footer(filesystem, info), infos))
        if broken := [footer for footer in footers if isinstance(footer, str)]:
            more = f"\n  and {len(broken) - 5} more" if len(broken) > 5 else ""
            raise CorpusError("these input files are not readable Parquet:\n  " + "\n  ".join(broken[:5]) + more)
        base = _base(path)
        read = [(info, footer) for info, footer in zip(infos, footers, strict=True) if not isinstance(footer, str)]
        files = tuple(_input_file(filesystem, info, footer, base) for info, footer in read)
        return cls(filesystem, files, tuple(footer.schema.to_arrow_schema() for _, footer in read))

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


def _units_of(file: InputFile, rows_per_unit: int) -> Iterator[Unit]:
    row_bytes = max((size / rows for rows, size in file.row_groups if rows), default=0.0)
    limit = max(1, min(rows_per_unit, int(MAX_UNIT_BYTES / row_bytes))) if row_bytes else rows_per_unit
    group_starts = {0, *accumulate(rows for rows, _ in file.row_groups)}

    def unit(first: int, num_rows: int) -> Unit:
        return Unit(file.path, file.name, file.fingerprint, first, num_rows, first not in group_starts)

    first = pending = 0
    for part in (part for rows, _ in file.row_groups for part in _even(rows, limit)):
        if pending and pending + part > limit:
            yield unit(first, pending)
            first, pending = first + pending, 0
        pending += part
    if pending or file.num_rows == 0:  # a file without rows has a unit too: its output has its schema
        yield unit(first, pending)


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
        return below[-1].lower().endswith(".parquet") and not any(part.startswith(("_", ".")) for part in below)

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


def _footer(filesystem: fs.FileSystem, info: fs.FileInfo) -> pq.FileMetaData | str:
    try:
        # Told the size, which the listing has, it does not ask the store for it.
        fragment = ds.ParquetFileFormat().make_fragment(info.path, filesystem=filesystem, file_size=info.size)
        return fragment.metadata
    except (pa.ArrowException, OSError) as error:
        return f"{told(filesystem, info.path)} ({info.size} bytes): {error}"


def _input_file(filesystem: fs.FileSystem, info: fs.FileInfo, footer: pq.FileMetaData, base: str) -> InputFile:
    name = info.path[len(base) :].strip("/") if info.path != base else info.base_name
    groups = [footer.row_group(index) for index in range(footer.num_row_groups)]
    return InputFile(
        path=info.path,
        name=name,
        fingerprint=file_fingerprint(filesystem, info),
        row_groups=tuple((group.num_rows, group.total_byte_size) for group in groups),
    )


def file_fingerprint(filesystem: fs.FileSystem, info: fs.FileInfo) -> str:
    """The size and time of change of a file, which change when it does.

    An S3 store may list milliseconds while it answers with whole seconds where one file is asked for.
    """
    mtime_ns = info.mtime_ns
    if filesystem.type_name == "s3" and mtime_ns is not None:
        mtime_ns -= mtime_ns % 1_000_000_000
    return f"{info.size}-{mtime_ns}"
