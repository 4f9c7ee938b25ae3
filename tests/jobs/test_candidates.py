"""Candidates from file to scores, to ranked rows of their own, end to end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jobs.rank import RankConfig
from jobs.rank import run as rank
from jobs.score import ScoreConfig
from jobs.score import run as score
from serve_app.reward_model import RewardModel
from tests.conftest import chat
from tests.jobs.conftest import read_parts, write

pytestmark = pytest.mark.usefixtures("local_ray", "in_process")

ROWS: list[dict[str, Any]] = [
    {
        "instruction": f"Question {number}: why is the sea salt?",
        "completions": [{"response": f"Since {number} times {place}.", "model": str(place)} for place in range(3)],
    }
    for number in range(4)
]


def test_candidates_are_scored_in_lists_and_ranked_as_rows(
    tmp_path: Path, tiny: RewardModel, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "in" / "a.parquet", [*ROWS, {"instruction": "Why?", "completions": []}])
    engine: dict[str, Any] = {"model": "tiny", "dtype": "float32", "cpus_per_actor": 1, "rows_per_unit": 3}
    total = score(ScoreConfig(input=str(tmp_path / "in"), output=str(tmp_path / "out"), **engine))
    assert (total.rows, total.errors) == (5, 1)
    assert "; 12 of 12 candidates scored; this run" in capsys.readouterr().out
    scored = read_parts(tmp_path / "out")
    texts = [[chat(row["instruction"], one["response"]) for one in row["completions"]] for row in ROWS]
    expected = [tiny.get_scores(row) for row in texts]
    assert scored["scores"].to_pylist() == [*expected, None]
    assert scored["best"].to_pylist() == [*(row.index(max(row)) for row in expected), None]

    counts = rank(RankConfig(input=str(tmp_path / "out"), output=str(tmp_path / "best"), top_k=1))
    assert (counts.rows, counts.written, counts.unscored, counts.ungrouped) == (13, 4, 1, 1)
    best = read_parts(tmp_path / "best")
    assert best["score"].to_pylist() == [max(row) for row in expected]
    assert best["response"].to_pylist() == [
        row["completions"][place]["response"] for row, place in zip(ROWS, best["candidate"].to_pylist(), strict=True)
    ]
    assert "4 of 13 rows in" in capsys.readouterr().out
    again = rank(RankConfig(input=str(tmp_path / "out"), output=str(tmp_path / "best"), top_k=1))
    assert again == counts

    rank(RankConfig(input=str(tmp_path / "in"), output=str(tmp_path / "direct"), top_k=1, **engine))
    assert read_parts(tmp_path / "direct").equals(best)
