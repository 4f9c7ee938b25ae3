"""JSON lines: an object a line. The schema is that of all lines together; a line that is none of it has its reason.

A string stays a string, whatever it looks like. A field that a line lacks is null.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.json as pj

from jobs.corpus.conversations import is_list
from jobs.corpus.formats import (
    BLOCK_BYTES,
    LINE_ERROR,
    FileContent,
    RowGroup,
    has_line_errors,
    in_threads,
    merged,
    with_line_errors,
)

PARSED_AT_ONCE = 1 << 20
SHOWN_CHARS = 60
ARRAY_ADVICE = "`jq -c '.[]' {}` makes lines of an array"


def line_blocks(stream: pa.NativeFile) -> Iterator[bytes]:
    """The content of a stream in blocks that end at line ends; a line longer than a block is one by itself."""
    begun: list[bytes] = []
    while content := stream.read(BLOCK_BYTES):
        end = content.rfind(b"\n") + 1
        if not end:
            begun.append(content)
            continue
        yield b"".join([*begun, content[:end]])
        begun = [content[end:]]
    if last := b"".join(begun):
        yield last


def scan_lines(stream: pa.NativeFile, *, name: str) -> FileContent:
    """The schema of all lines, and the blocks that they stand in: the whole stream is read.

    Raises:
        CorpusError: some lines cannot be read, and there is no room for the column that says so.
        ArrowInvalid: no line is an object, or the file is one array.
    """
    schema, groups, all_fit = pa.schema([]), list[RowGroup](), True
    offset, line = 0, 1
    for block, found in in_threads(_block_schema, line_blocks(stream)):
        if not groups:
            _refuse_array(block, name)
        schema, fits = merged(schema, found.remove_metadata())
        marks = found.metadata or {}
        all_fit &= fits and b"misfits" not in marks
        rows = int(marks[b"rows"])
        groups.append(RowGroup(rows, len(block), offset, line))
        offset, line = offset + len(block), line + block.count(b"\n")
    if not schema.names and groups:
        raise pa.ArrowInvalid(f"no line is a JSON object; {ARRAY_ADVICE.format(name)}")
    schema = _writable(schema)
    return FileContent(schema if all_fit else with_line_errors(schema, name=name), tuple(groups))


def _refuse_array(block: bytes, name: str) -> None:
    """Refuse a file that begins as an array of many lines does."""
    first = block.lstrip().partition(b"\n")[0].strip()
    if not first.startswith(b"["):
        return
    try:
        json.loads(first)
    except (ValueError, RecursionError):
        raise pa.ArrowInvalid(f"it is one JSON array; {ARRAY_ADVICE.format(name)}") from None


def parse_lines(block: bytes, schema: pa.Schema, *, line: int) -> pa.Table:
    """The rows of a block of lines in the columns of a schema, the first one being that number of the file.

    Raises:
        ArrowInvalid: a line cannot be read, and the schema has no column that says so.
    """
    own = schema.remove(schema.names.index(LINE_ERROR)) if has_line_errors(schema) else schema
    fast = _parsed(block, pj.ParseOptions(explicit_schema=own, unexpected_field_behavior="error"))
    if fast is not None:
        table = fast.select(own.names)
        return (
            table if own is schema else table.append_column(schema.field(LINE_ERROR), pa.nulls(len(table), pa.string()))
        )
    rows = [_checked(text, own, number) for number, text in _numbered(block, line)]
    if own is schema and (reasons := [row for row in rows if isinstance(row, str)]):
        raise pa.ArrowInvalid(reasons[0])
    columns = [
        pa.array(
            [_converted(row.get(field.name), field.type) if isinstance(row, dict) else None for row in rows], field.type
        )
        for field in own
    ]
    if own is not schema:
        columns.append(pa.array([row if isinstance(row, str) else None for row in rows], pa.string()))
    return pa.Table.from_arrays(columns, schema=schema)


def _block_schema(block: bytes) -> pa.Schema:
    """The schema of a block's lines; its metadata says how many rows there are, and whether lines do not fit it."""
    table = _parsed(block, pj.ParseOptions())
    if table is not None:
        return _plain(table.schema).with_metadata({"rows": str(len(table))})
    objects, rows, misfits = [], 0, False
    for number, text in _numbered(block, 1):
        parsed = _object(text, number)
        rows += 1
        if isinstance(parsed, str):
            misfits = True
        else:
            objects.append(parsed)
    schema, fits = _schema_of(objects)
    marks = {"rows": str(rows)} | ({"misfits": "1"} if misfits or not fits else {})
    return schema.with_metadata(marks)


def _schema_of(objects: list[dict[str, Any]]) -> tuple[pa.Schema, bool]:
    """The schema of objects, and whether all of them fit it: the types that come first stay."""
    try:
        return pa.schema(list(pa.array(objects).type) if objects else []), True
    except (pa.ArrowException, UnicodeEncodeError, OverflowError):
        pass
    schema, all_fit = pa.schema([]), True
    for one in objects:
        try:
            schema, fits = merged(schema, pa.schema(list(pa.array([one]).type)))
        except (pa.ArrowException, UnicodeEncodeError, OverflowError):
            fits = False
        all_fit &= fits
    return schema, all_fit


def _parsed(block: bytes, options: pj.ParseOptions) -> pa.Table | None:
    """The table of a block in which every line is an object that fits; else None."""
    num_lines = block.count(b"\n") + (not block.endswith(b"\n"))
    if not _is_utf8(block):
        return None
    for size in (PARSED_AT_ONCE, len(block) + 1):  # a line may be longer than a part
        try:
            table = pj.read_json(io.BytesIO(block), pj.ReadOptions(block_size=size), options)
        except (pa.ArrowException, OverflowError):
            continue
        return table if len(table) == num_lines else None
    return None


def _is_utf8(block: bytes) -> bool:
    """Whether a block is text; Arrow's reader does not ask."""
    try:
        block.decode()
    except UnicodeDecodeError:
        return False
    return True


def _plain(schema: pa.Schema) -> pa.Schema:
    """A schema with strings where strings were taken for times."""
    return pa.schema([(field.name, _plain_type(field.type)) for field in schema])


def _plain_type(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_temporal(kind):
        return pa.string()
    if is_list(kind):
        return pa.list_(_plain_type(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([(field.name, _plain_type(field.type)) for field in kind])
    return kind


def _writable(schema: pa.Schema) -> pa.Schema:
    """A schema without structs that have no field, which Parquet cannot keep: they become nulls."""
    return pa.schema([(field.name, _writable_type(field.type)) for field in schema])


def _writable_type(kind: pa.DataType) -> pa.DataType:
    if is_list(kind):
        return pa.list_(_writable_type(kind.value_type))
    if not pa.types.is_struct(kind):
        return kind
    return pa.struct([(field.name, _writable_type(field.type)) for field in kind]) if kind.num_fields else pa.null()


def _numbered(block: bytes, first: int) -> Iterator[tuple[int, bytes]]:
    """The lines that are not empty, with their numbers."""
    for number, text in enumerate(block.split(b"\n"), start=first):
        if text.strip():
            yield number, text


def _object(text: bytes, number: int) -> dict[str, Any] | str:
    """The object of a line, or why it is none."""
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError) as error:
        return f"line {number} is not JSON: {error}"
    if not isinstance(parsed, dict):
        return f"line {number} is {_told(parsed)}, not an object"
    return parsed


def _checked(text: bytes, schema: pa.Schema, number: int) -> dict[str, Any] | str:
    """The object of a line, or why it is none or does not fit the schema."""
    parsed = _object(text, number)
    if isinstance(parsed, str):
        return parsed
    misfit = _misfit(parsed, pa.struct(list(schema)))
    return parsed if misfit is None else f"line {number}: {misfit}"


def _misfit(value: Any, kind: pa.DataType, place: str = "") -> str | None:
    """Why a value is not of a type; None where it is."""
    if value is None or (pa.types.is_null(kind) and value == {}):
        return None
    if is_list(kind) and isinstance(value, list):
        return next((found for item in value if (found := _misfit(item, kind.value_type, place))), None)
    if pa.types.is_struct(kind) and isinstance(value, dict):
        names = {field.name: field.type for field in kind}
        if strange := [name for name in value if name not in names]:
            return f"{place} has a field {strange[0]!r}, which the lines before do not have".lstrip()
        below = ((item, names[name], f"{place}.{name}".lstrip(".")) for name, item in value.items())
        return next((found for one in below if (found := _misfit(*one))), None)
    try:
        fits = _is_scalar(value, kind) and len(pa.array([_converted(value, kind)], kind)) == 1
    except (pa.ArrowException, UnicodeEncodeError, OverflowError):
        fits = False
    return None if fits else f"{place} is {_told(value)}, and {kind} in the lines before"


def _is_scalar(value: Any, kind: pa.DataType) -> bool:
    if isinstance(value, bool):
        return bool(pa.types.is_boolean(kind))
    if isinstance(value, int | float):
        return bool(pa.types.is_floating(kind) or (isinstance(value, int) and pa.types.is_integer(kind)))
    return isinstance(value, str) and bool(pa.types.is_string(kind))


def _converted(value: Any, kind: pa.DataType) -> Any:
    """A value that fits, with nulls where the type has no room for an empty object."""
    if pa.types.is_null(kind):
        return None
    if isinstance(value, int) and pa.types.is_floating(kind):
        return float(value)
    if isinstance(value, list):
        return [_converted(item, kind.value_type) for item in value]
    if isinstance(value, dict):
        return {field.name: _converted(value.get(field.name), field.type) for field in kind}
    return value


def _told(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    told = names.get(type(value), "null")
    return f"{told} ({str(value)[:SHOWN_CHARS]!r})" if isinstance(value, str) else told
