"""What a job's output folder tells of its pace: parts carry the time of their commit."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

__all__ = ["commit_rate", "same_rows"]


def commit_rate(output: Path) -> float:
    """Tokens per second from the first commit to the last, of the units that were committed after the first."""
    parts = sorted(output.glob("part-*.parquet"), key=lambda part: part.stat().st_mtime_ns)
    first, last = (parts[place].stat().st_mtime_ns for place in (0, -1))
    tokens = sum(sum(pq.read_table(part, columns=["num_tokens"])["num_tokens"].to_pylist()) for part in parts[1:])
    return float(tokens / (last - first) * 1e9)


def same_rows(first: Path, second: Path) -> bool:
    """Whether two outputs hold the same rows, bit for bit and in the same parts."""
    tables = [pa.concat_tables(pq.read_table(part) for part in sorted(one.glob("part-*"))) for one in (first, second)]
    return bool(tables[0].equals(tables[1]))
