"""Small files: 1,000 of one row each against one of 1,000 rows, in a folder and on a store that answers late.

    python -m tests.benchmarks.bench_small_files

The store is the stand-in of the tests; each of its answers comes 30 ms late, those to several connections at the same
time. Planning lists the files and reads their footers; reading makes a table of each unit, in one process, where a job
has several. The job is the command jobs.score with its start-up, and its output lies beside its input. The two inputs
take turns. The last line is JSON.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tyro
from pydantic import BaseModel, ConfigDict, NonNegativeFloat, PositiveInt

from cluster.connect import local_cores
from jobs.corpus.files import Corpus, auto_rows_per_unit
from jobs.corpus.reader import UnitReader
from jobs.corpus.storage import filesystem_of
from serve_app.reward_model.tiny import NAME as TINY
from tests.benchmarks.bench_score import processor
from tests.benchmarks.processes import measured
from tests.jobs.object_store import object_store

ROOT = Path(__file__).parents[2]


class BenchConfig(BaseModel):
    """Measure what it costs that rows are in many files."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rows: PositiveInt = 1000
    """Rows of each input, and files of one of them."""
    latency_s: NonNegativeFloat = 0.03
    """How late the store answers each request."""
    repeats: PositiveInt = 3
    """How often each thing is timed."""
    results: Path = Path(__file__).parent / "results" / "bench_small_files.json"
    """Where the JSON is written."""


def main() -> int:
    """Run the benchmark; the exit status."""
    config = tyro.cli(BenchConfig, description=__doc__, prog="python -m tests.benchmarks.bench_small_files")
    with tempfile.TemporaryDirectory() as folder:
        write_inputs(folder, config.rows)
        local = compared(folder, config)
    with pytest.MonkeyPatch.context() as environment, object_store(environment) as store:
        write_inputs("s3://bucket", config.rows)
        store.latency_s = config.latency_s
        remote = compared("s3://bucket", config)
    result = {
        "hardware": f"{local_cores()} cores of {processor()}",
        "rows": config.rows,
        "latency_s": config.latency_s,
        "local": local,
        "store": remote,
    }
    config.results.parent.mkdir(parents=True, exist_ok=True)
    config.results.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))
    return 0


def write_inputs(location: str, rows: int) -> None:
    """The folders `many`, with a file for each row, and `one`, with one file of all rows."""
    texts = [{"prompt": f"What is {row} + 1?", "response": str(row + 1)} for row in range(rows)]
    filesystem, folder = filesystem_of(location)
    for name, size in (("many", 1), ("one", rows)):
        filesystem.create_dir(f"{folder}/{name}")
        for first in range(0, rows, size):
            table = pa.Table.from_pylist(texts[first : first + size])
            pq.write_table(table, f"{folder}/{name}/{first:06d}.parquet", filesystem=filesystem)


def compared(location: str, config: BenchConfig) -> dict[str, dict[str, float]]:
    """Seconds (median) of each step with many files and with one, and how many times as long many take."""
    seconds: dict[str, list[dict[str, float]]] = {"many": [], "one": []}
    for repeat in range(config.repeats):
        for name, found in seconds.items():
            found.append(in_new_process(planned_and_read, f"{location}/{name}"))
            output = f"{location}/out-{name}-{repeat}"
            command = ["-m", "jobs.score", "--input", f"{location}/{name}", "--output", output, "--model", TINY]
            found[-1]["job_s"] = measured(command, folder=ROOT).seconds
            print(location, name, {step: round(time, 3) for step, time in found[-1].items()}, flush=True)
    medians = {
        name: {step: round(statistics.median(one[step] for one in found), 3) for step in found[0]}
        for name, found in seconds.items()
    }
    ratios = {step: round(many / medians["one"][step], 2) for step, many in medians["many"].items()}
    return {**medians, "many_over_one": ratios}


def in_new_process(function: Callable[[str], dict[str, float]], argument: str) -> dict[str, float]:
    """What the function returns in a process that does not answer the store's requests too."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, argument).result()


def planned_and_read(location: str) -> dict[str, float]:
    """Seconds of planning an input, and of reading all its units."""
    started = time.perf_counter()
    corpus = Corpus.open(location)
    units = corpus.shared_units(auto_rows_per_unit(corpus.num_rows))
    planned = time.perf_counter()
    tables = [table for _, table in UnitReader(corpus.filesystem).read(units)]
    read = time.perf_counter()
    assert sum(table.num_rows for table in tables if isinstance(table, pa.Table)) == corpus.num_rows
    return {"planning_s": planned - started, "reading_s": read - planned}


if __name__ == "__main__":
    sys.exit(main())
