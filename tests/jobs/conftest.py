"""Parquet files for the tests of this folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq


def write(path: Path, rows: list[dict[str, Any]], *, row_group_size: int | None = None) -> Path:
    """Write rows as a Parquet file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=row_group_size)
    return path


def read_parts(output: Path) -> pa.Table:
    """All rows of a job's output, in the order of its parts."""
    return pa.concat_tables(pq.read_table(part) for part in sorted(output.glob("part-*.parquet")))
