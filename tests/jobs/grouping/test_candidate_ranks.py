"""Candidates in lists become rows of their own, ranked within their list, that other jobs read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import fs

from jobs.corpus.candidates import CandidateColumns
from jobs.corpus.readings import conversation_reading
from jobs.grouping.candidate_ranks import CandidateRankStage
from jobs.grouping.ranks import Summary
from jobs.runs.ledger import Ledger
from tests.conftest import chat

SCORED: dict[str, Any] = {
    "id": [7, 8, 9],
    "prompt": ["hi", "ho", "hu"],
    "responses": [["a", "b", "c"], ["d", None], None],
    "scores": pa.array([[1.0, 3.0, 3.0], [2.5, None], None], pa.list_(pa.float32())),
    "best": [1, 0, None],
    "num_tokens": [[4, 5, 6], [7, None], None],
    "error": [None, "response 1: it is null", "the responses are null"],
}


def ranked(tmp_path: Path, data: dict[str, Any], *, top_k: int | None = None) -> tuple[pa.Table, Summary, int]:
    columns = CandidateColumns("responses", "prompt")
    ledger = Ledger(str(tmp_path / "out"))
    stage = CandidateRankStage(fs.LocalFileSystem(), ledger, columns, "scores", "", top_k)
    table = pa.table(data)
    found = stage.ranked(table)
    kept = set(table.column_names) - stage.dropped(table.schema)
    assert set(found[0].column_names) == kept | set(stage.added(table.schema))
    return found


def test_every_candidate_has_a_row_with_its_own_figures(tmp_path: Path) -> None:
    table, summary, num_candidates = ranked(tmp_path, SCORED)
    assert table.to_pydict() == {
        "id": [7, 7, 7, 8, 8, 9],
        "prompt": ["hi", "hi", "hi", "ho", "ho", "hu"],
        "error": [None, None, None, None, "response 1: it is null", "the responses are null"],
        "candidate": [0, 1, 2, 0, 1, None],
        "response": ["a", "b", "c", "d", None, None],
        "score": [1.0, 3.0, 3.0, 2.5, None, None],
        "num_tokens": [4, 5, 6, 7, None, None],
        "rank": [2, 0, 1, 0, None, None],
        "group_size": [3, 3, 3, 2, 2, None],
        "margin": [2.0, 0.0, 0.0, 0.0, None, None],
    }
    assert (num_candidates, summary.unscored, summary.ungrouped) == (6, 2, 1)
    assert summary.scores.points.tolist() == [1.0, 2.5, 3.0, 3.0]
    assert conversation_reading(table.schema).response == "response"


def test_the_best_of_each_row_are_kept(tmp_path: Path) -> None:
    table, _, num_candidates = ranked(tmp_path, SCORED, top_k=1)
    assert (table["id"].to_pylist(), table["response"].to_pylist()) == ([7, 8], ["b", "d"])
    assert num_candidates == 6


@pytest.mark.parametrize(
    ("responses", "names"),
    [
        ([[{"response": "a", "model": "x"}, {"response": "b", "model": "y"}]], ["response", "responses_item"]),
        ([[chat("hi", "a"), chat("hi", "b")]], ["messages"]),
        ([[chat("hi", "a")[1], chat("hi", "b")[1]]], ["messages"]),
    ],
)
def test_candidates_of_every_layout_can_be_read_again(tmp_path: Path, responses: list[Any], names: list[str]) -> None:
    scores = pa.array([[1.0, 2.0]], pa.list_(pa.float32()))
    table, _, _ = ranked(tmp_path, {"prompt": ["hi"], "responses": responses, "scores": scores})
    assert set(names) <= set(table.column_names)
    if names == ["messages"]:
        assert table["messages"].to_pylist() == [chat("hi", "a"), chat("hi", "b")]
    else:
        assert table["response"].to_pylist() == ["a", "b"]
        assert table["responses_item"].to_pylist() == responses[0]
    conversation_reading(table.schema)
