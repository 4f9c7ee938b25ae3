"""One local Ray for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.connect import connect
from serve_app.reward_model import RewardModel


@pytest.fixture(scope="session")
def local_ray(tiny: RewardModel) -> Iterator[None]:
    """A local Ray of 4 logical CPUs, stopped at the end. Its workers find the embedded model where `tiny` was made."""
    import ray

    with connect(num_cpus=4):
        yield
    assert not ray.is_initialized()


def write(path: Path, rows: list[dict[str, Any]], *, row_group_size: int | None = None) -> Path:
    """Write rows as a Parquet file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=row_group_size)
    return path


def read_parts(output: Path) -> pa.Table:
    """All rows of a job's output, in the order of its parts."""
    return pa.concat_tables(pq.read_table(part) for part in sorted(output.glob("part-*.parquet")))
