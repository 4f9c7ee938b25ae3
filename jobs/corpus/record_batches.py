"""Arrow files and streams, such as `datasets` saves to disk: record batches, which are read as they stand."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa

from jobs.corpus.formats import FileContent, RowGroup, one_group

MAGIC = b"ARROW1"


def scan_batches(source: pa.NativeFile) -> FileContent:
    """The schema of an Arrow file or stream, and its record batches. A stream is one group: it is read from its start.

    Raises:
        ArrowInvalid: it is neither.
    """
    file = _file(source)
    if file is not None:
        batches = (file.get_batch(index) for index in range(file.num_record_batches))
        return FileContent(file.schema, tuple(RowGroup(batch.num_rows, batch.nbytes) for batch in batches))
    stream = pa.ipc.open_stream(source)
    return FileContent(stream.schema, one_group(tuple(RowGroup(batch.num_rows, batch.nbytes) for batch in stream)))


def batches_from(source: pa.NativeFile, row: int) -> tuple[pa.Schema, int, Iterator[pa.RecordBatch]]:
    """The schema, the batches from the one on that holds `row`, and how many rows stand in it before that row."""
    file = _file(source)
    if file is None:
        stream = pa.ipc.open_stream(source)
        return stream.schema, row, iter(stream)
    for index in range(file.num_record_batches):
        rows = file.get_batch(index).num_rows
        if row < rows:
            return file.schema, row, (file.get_batch(later) for later in range(index, file.num_record_batches))
        row -= rows
    return file.schema, row, iter(())


def _file(source: pa.NativeFile) -> pa.ipc.RecordBatchFileReader | None:
    """The reader of an Arrow file; None where it is a stream."""
    begins = source.read(len(MAGIC))
    source.seek(0)
    return pa.ipc.open_file(source) if begins == MAGIC else None
