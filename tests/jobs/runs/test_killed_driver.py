"""A driver that ends at any point loses and repeats nothing: the real command, ended by a signal and killed."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

import pytest

from jobs.score import main
from serve_app.reward_model import RewardModel
from tests.conftest import chat
from tests.jobs.conftest import TIMEOUT_S, kill_after, read_parts, start_and_wait, write

NUM_FILES, NUM_ROWS = 8, 240
ROWS_PER_UNIT = 10
NUM_UNITS = NUM_ROWS // ROWS_PER_UNIT


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_a_job_ended_and_killed_gives_the_output_of_one_left_alone(
    tmp_path: Path, tiny: RewardModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """240 conversations of some 150 tokens in 24 units: a signal comes long before the job's end."""
    asked = [chat(f"Count to {number}.", "one more " * 25) for number in range(NUM_ROWS)]
    rows = [{"id": number, "messages": conversation} for number, conversation in enumerate(asked)]
    for file in range(NUM_FILES):
        write(tmp_path / "in" / f"{file}.parquet", rows[file::NUM_FILES])
    output = tmp_path / "killed"
    options = ["--rows-per-unit", str(ROWS_PER_UNIT), "--dtype", "float32", "--cpus-per-actor", "2"]
    arguments = ["--model", "tiny", "--input", str(tmp_path / "in"), "--output", str(output), *options]
    command = [sys.executable, "-m", "jobs.score", *arguments]

    kill_after(command, output, 0)
    driver = start_and_wait(command, output, num_parts=1)
    driver.send_signal(signal.SIGTERM)
    _, told = driver.communicate(timeout=TIMEOUT_S)
    assert driver.returncode == 128 + signal.SIGTERM
    assert told.splitlines()[-1] == "jobs.score interrupted; what is committed stays"
    assert json.loads((output / "_manifest.json").read_text())["status"] == "stopped"

    kill_after(command, output, len(list(output.glob("part-*"))) + 2)
    before = {path: path.stat().st_mtime_ns for path in output.glob("part-*")}
    assert 3 <= len(before) < NUM_UNITS
    monkeypatch.setattr("sys.argv", ["jobs.score", *arguments])
    assert main() == 0
    assert f"{NUM_ROWS} scored, 0 with errors" in capsys.readouterr().out
    assert before.items() <= {path: path.stat().st_mtime_ns for path in before}.items()

    found = read_parts(output)
    assert len(list(output.glob("part-*"))) == NUM_UNITS
    in_order = [number for file in range(NUM_FILES) for number in range(file, NUM_ROWS, NUM_FILES)]
    assert found["id"].to_pylist() == in_order
    assert found["score"].to_pylist() == tiny.get_scores([asked[number] for number in in_order])
