"""A driver killed at any point loses and repeats nothing: run on real conversations, with the real command."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pytest

from jobs.score import ScoreConfig, run
from tests.jobs.conftest import ROOT, TIMEOUT_S, kill_after, read_parts

NUM_UNITS = 24


@pytest.fixture
def command(tmp_path: Path, shared: Path, golden_folder: Path) -> list[str]:
    arguments = ["--input", str(shared / "data" / "hh_harmless"), "--output", str(tmp_path / "killed")]
    return [sys.executable, "-m", "jobs.score", *arguments, "--model", str(golden_folder), "--cpus-per-actor", "2"]


@pytest.mark.usefixtures("local_ray")
def test_a_job_killed_three_times_gives_the_output_of_one_left_alone(
    tmp_path: Path, shared: Path, golden_folder: Path, command: list[str]
) -> None:
    output = tmp_path / "killed"
    for num_parts in (0, 5, 15):
        kill_after(command, output, num_parts)
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert finished.returncode == 0, finished.stderr
    assert f"4,624 rows in {output} (" in finished.stdout
    assert "4,624 scored, 0 with errors" in finished.stdout

    alone = ScoreConfig(
        input=str(shared / "data" / "hh_harmless"),
        output=str(tmp_path / "alone"),
        model=str(golden_folder),
        cpus_per_actor=2,
    )
    run(alone)
    killed, whole = read_parts(output), read_parts(tmp_path / "alone")
    assert whole.num_rows == 4624
    assert len(list(output.glob("part-*"))) == NUM_UNITS
    assert killed.equals(whole)  # float32 scores compared by value, none of them null or NaN
    assert whole["score"].null_count == 0
    assert ids_of(whole) == ids_of(read_input(shared))


def ids_of(table: pa.Table) -> list[str]:
    ids: list[str] = table["id"].to_pylist()
    return ids


def read_input(shared: Path) -> pa.Table:
    import pyarrow.parquet as pq

    files = sorted((shared / "data" / "hh_harmless").glob("*.parquet"))
    return pa.concat_tables(pq.read_table(file) for file in files)


def test_a_job_that_is_asked_to_end_says_so_and_leaves_nothing_running(tmp_path: Path, command: list[str]) -> None:
    output = tmp_path / "killed"
    driver = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + TIMEOUT_S
    while not list(output.glob("part-*")):
        assert driver.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    driver.send_signal(signal.SIGTERM)
    _, told = driver.communicate(timeout=60)
    assert driver.returncode == 128 + signal.SIGTERM
    assert told.splitlines()[-1] == "jobs.score interrupted; what is committed stays"
    assert json.loads((output / "_manifest.json").read_text())["status"] == "stopped"
