"""Candidates of a row are scored together; the best, the errors and the counts are those of the responses."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from jobs.score import ScoreConfig
from jobs.scoring.candidate_stage import (
    CANDIDATE_SCORE_COLUMNS,
    CandidateOutcome,
    candidate_columns,
    candidate_stats,
    candidates_told,
)
from serve_app.reward_model import ConversationError, Score


def score(value: float, *, truncated: bool = False) -> Score:
    return Score(float(np.float32(value)), num_tokens=5, truncated=truncated, attributes={"help": value})


BAD = ConversationError("it is null")
OUTCOMES: list[CandidateOutcome] = [
    [score(0.1), score(2.0, truncated=True), score(2.0)],
    [BAD, score(-1.5), BAD, ConversationError("empty")],
    [BAD],
    ConversationError("the responses are null"),
]


def test_columns_have_an_element_for_each_response() -> None:
    table = candidate_columns(pa.table({"id": range(4)}), OUTCOMES, prefix="my_", attributes=("help",))
    assert table.column_names == ["id", *(f"my_{name}" for name in CANDIDATE_SCORE_COLUMNS), "my_attributes"]
    kinds = [str(table.schema.field(f"my_{name}").type) for name in CANDIDATE_SCORE_COLUMNS]
    assert kinds == ["list<item: float>", "int32", "list<item: int32>", "list<item: bool>", "string"]
    assert table["my_scores"].to_pylist() == [
        [float(np.float32(0.1)), 2.0, 2.0],
        [None, -1.5, None, None],
        [None],
        None,
    ]
    assert table["my_best"].to_pylist() == [1, 1, None, None]
    assert table["my_num_tokens"].to_pylist() == [[5, 5, 5], [None, 5, None, None], [None], None]
    assert table["my_truncated"].to_pylist() == [[False, True, False], [None, False, None, None], [None], None]
    told = "ConversationError: it is null"
    assert table["my_error"].to_pylist() == [
        None,
        f"responses 0, 2: {told}; response 3: ConversationError: empty",
        f"response 0: {told}",
        "ConversationError: the responses are null",
    ]
    assert candidate_columns(pa.table({"id": pa.array([], pa.int64())}), [], prefix="").num_rows == 0


def test_attributes_stand_in_lists_too() -> None:
    table = candidate_columns(pa.table({"id": range(4)}), OUTCOMES, prefix="", attributes=("help",))
    first, second, third, fourth = table["attributes"].to_pylist()
    assert first == [{"help": float(np.float32(0.1))}, {"help": 2.0}, {"help": 2.0}]
    assert second == [None, {"help": -1.5}, None, None]
    assert (third, fourth) == ([None], None)


def test_a_row_with_a_response_that_failed_is_an_error() -> None:
    stats = candidate_stats(OUTCOMES, seconds=1.0)
    assert (stats.rows, stats.errors, stats.tokens) == (4, 3, 20)
    assert dict(stats.counts) == {"candidates": 8, "candidates_scored": 4}
    assert candidates_told(stats.counts) == "; 4 of 8 candidates scored"
    assert candidates_told({}) == ""


def test_options_that_name_another_reading_are_refused() -> None:
    for wrong in ({"reads": "pairs"}, {"chosen_column": "a"}, {"messages_column": "a"}, {"response_column": "a"}):
        with pytest.raises(ValueError, match="candidates have --responses-column"):
            ScoreConfig(input="a", output="b", model="tiny", responses_column="c", **wrong)  # type: ignore[arg-type]
