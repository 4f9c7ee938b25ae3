"""A driver that ends at any point loses and repeats nothing: the real command, ended by a signal and killed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.score import ScoreConfig, main, run
from serve_app.reward_model import RewardModel
from tests.conftest import chat
from tests.jobs.conftest import ROOT, TIMEOUT_S, kill_after, read_parts, start_and_wait, write

NUM_FILES, NUM_ROWS = 8, 320
ROWS_PER_UNIT = 10
NUM_UNITS = NUM_ROWS // ROWS_PER_UNIT


@pytest.fixture
def command(tmp_path: Path, tiny: RewardModel) -> list[str]:
    """Score 320 conversations of some 150 tokens in 32 units: a signal comes long before its end."""
    rows = [{"id": number, "messages": chat(f"Count to {number}.", "one more " * 25)} for number in range(NUM_ROWS)]
    for file in range(NUM_FILES):
        write(tmp_path / "in" / f"{file}.parquet", rows[file::NUM_FILES])
    paths = ["--input", str(tmp_path / "in"), "--output", str(tmp_path / "killed")]
    options = ["--rows-per-unit", str(ROWS_PER_UNIT), "--dtype", "float32", "--cpus-per-actor", "2"]
    options += ["--model", "tiny"]
    return [sys.executable, "-m", "jobs.score", *paths, *options]


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_a_job_ended_and_killed_gives_the_output_of_one_left_alone(
    tmp_path: Path, command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "killed"
    driver = start_and_wait(command, output, num_parts=1)
    driver.send_signal(signal.SIGTERM)
    _, told = driver.communicate(timeout=TIMEOUT_S)
    assert driver.returncode == 128 + signal.SIGTERM
    assert told.splitlines()[-1] == "jobs.score interrupted; what is committed stays"
    assert json.loads((output / "_manifest.json").read_text())["status"] == "stopped"

    kill_after(command, output, len(list(output.glob("part-*"))) + 2)
    before = {path: path.stat().st_mtime_ns for path in output.glob("part-*")}
    assert 3 <= len(before) < NUM_UNITS
    monkeypatch.setattr("sys.argv", ["jobs.score", *command[3:]])
    assert main() == 0
    assert f"{NUM_ROWS} scored, 0 with errors" in capsys.readouterr().out
    assert before.items() <= {path: path.stat().st_mtime_ns for path in before}.items()

    options = {"model": "tiny", "dtype": "float32", "cpus_per_actor": 2, "rows_per_unit": ROWS_PER_UNIT}
    run(ScoreConfig.model_validate({"input": str(tmp_path / "in"), "output": str(tmp_path / "alone"), **options}))
    killed, whole = read_parts(output), read_parts(tmp_path / "alone")
    assert len(list(output.glob("part-*"))) == NUM_UNITS
    assert killed.equals(whole)  # float32 scores compared by value, none of them null or NaN
    assert whole["score"].null_count == 0
    assert whole["id"].to_pylist() == [
        number for file in range(NUM_FILES) for number in range(file, NUM_ROWS, NUM_FILES)
    ]


@pytest.mark.slow
def test_a_job_killed_at_its_start_and_twice_more_is_whole_in_the_end(tmp_path: Path, command: list[str]) -> None:
    output = tmp_path / "killed"
    for num_parts in (0, 5, 15):
        kill_after(command, output, num_parts)
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert finished.returncode == 0, finished.stderr
    assert f"{NUM_ROWS} rows in {output} (" in finished.stdout
    assert sorted(read_parts(output)["id"].to_pylist()) == list(range(NUM_ROWS))
