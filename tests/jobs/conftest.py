"""Parquet files and ways to run jobs for the tests of this folder."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import fs

from jobs.corpus.files import Unit
from jobs.runs import pipeline, unit_run
from jobs.runs.ledger import Ledger
from jobs.runs.pipeline import Stage, UnitReport

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 600


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch, threads: None) -> None:
    """Jobs pass their units through the same reader, stages and ledger one after another in this process.

    A job on Ray costs some 6 s of processor time; what becomes of rows is the same without.
    """

    def run_units(
        units: list[Unit], *, filesystem: fs.FileSystem, ledger: Ledger, stages: Sequence[Stage]
    ) -> Iterator[UnitReport]:
        task = pa.table({"units": [[unit.text() for unit in units]]})
        workers = [pipeline._ActorStage(stage.make, stage.pool.num_threads) for stage in stages]
        for parcel in pipeline._read(task, filesystem=filesystem):
            for worker in workers:
                parcel = worker(parcel)
            (row,) = pipeline._commit(parcel, ledger=ledger).to_pylist()
            yield pipeline._report(row)

    monkeypatch.setattr(unit_run, "run_units", run_units)


def write(path: Path, rows: list[dict[str, Any]], *, row_group_size: int | None = None) -> Path:
    """Write rows as a Parquet file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=row_group_size)
    return path


def read_parts(output: Path) -> pa.Table:
    """All rows of a job's output, in the order of its parts."""
    return pa.concat_tables(pq.read_table(part) for part in sorted(output.glob("part-*.parquet")))


def candidates(num_prompts: int, *, scored: bool = False) -> pa.Table:
    """Prompts with six responses each, in the columns of a corpus of candidates; every score is there several times."""
    rows = [
        {
            "prompt_id": str(number // 6),
            "prompt": f"Question {number // 6}: why is the sea salt" + " and wide" * (number // 6 % 40) + "?",
            "response": f"Answer {number}: " + "it is, since " * (number % 13) + "so.",
        }
        for number in range(6 * num_prompts)
    ]
    table = pa.Table.from_pylist(rows)
    if scored:
        scores = [float(number * 37 % 101) for number in range(table.num_rows)]
        table = table.append_column("score", pa.array(scores, pa.float32()))
    return table


def start_and_wait(command: list[str], output: Path, *, num_parts: int) -> subprocess.Popen[str]:
    """A job's driver that runs, with so many parts or more in the folder. Its errors can be read from it."""
    driver = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + TIMEOUT_S
    try:
        while not (output / "_manifest.json").exists() or len(list(output.glob("part-*"))) < num_parts:
            assert driver.poll() is None, f"the job ended by itself with {driver.returncode}"
            assert time.monotonic() < deadline, "the job commits nothing"
            time.sleep(0.02)
    except BaseException:
        driver.kill()
        driver.wait()
        raise
    return driver


def kill_after(command: list[str], output: Path, num_parts: int) -> None:
    """Start a job, and kill its driver as soon as so many parts are in the folder."""
    driver = start_and_wait(command, output, num_parts=num_parts)
    driver.send_signal(signal.SIGKILL)
    driver.communicate()
