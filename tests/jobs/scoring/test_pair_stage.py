"""Pairs of a unit are scored side by side; margins, counts and errors are those of the sides."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from jobs.scoring.pair_stage import PAIR_SCORE_COLUMNS, PairOutcome, accuracy_told, pair_columns, pair_stats
from serve_app.reward_model import ConversationError, Score


def score(value: float, *, truncated: bool = False) -> Score:
    return Score(float(np.float32(value)), num_tokens=5, truncated=truncated)


BAD = ConversationError("it is null")
OUTCOMES: list[PairOutcome] = [
    (score(1.1), score(0.3, truncated=True)),
    (score(0.1), score(2.0)),
    (score(1.0), score(1.0)),
    (score(1.0), BAD),
    (BAD, BAD),
]


def test_margins_are_float32_and_errors_name_their_side() -> None:
    table = pair_columns(pa.table({"id": range(5)}), OUTCOMES, prefix="my_")
    assert table.column_names == ["id", *(f"my_{name}" for name in PAIR_SCORE_COLUMNS)]
    kinds = [str(table.schema.field(f"my_{name}").type) for name in PAIR_SCORE_COLUMNS]
    assert kinds == ["float", "float", "float", "int32", "int32", "bool", "string"]
    margins = table["my_margin"].to_pylist()
    assert margins == [np.float32(1.1) - np.float32(0.3), np.float32(0.1) - np.float32(2.0), 0.0, None, None]
    assert table["my_chosen_score"].to_pylist()[3:] == [1.0, None]
    assert table["my_truncated"].to_pylist() == [True, False, False, None, None]
    told = "ConversationError: it is null"
    assert table["my_error"].to_pylist() == [None, None, None, f"rejected: {told}", f"both: {told}"]
    assert pair_columns(pa.table({"id": pa.array([], pa.int64())}), [], prefix="").num_rows == 0


def test_accuracy_counts_a_tie_as_half_and_has_wilsons_interval() -> None:
    stats = pair_stats(OUTCOMES, seconds=1.0)
    assert (stats.rows, stats.errors, stats.tokens) == (5, 2, 35)
    counts = {name: stats.counts[name] for name in ("pairs", "pairs_right", "pairs_tied")}
    assert counts == {"pairs": 3, "pairs_right": 1, "pairs_tied": 1}
    assert accuracy_told({"pairs": 10, "pairs_right": 8}) == (
        "; accuracy 80.0% of 10 pairs (95 % interval 49.0% to 94.3%)"
    )
    assert "50.0% of 3 pairs" in accuracy_told(stats.counts)
    assert "1 ties as half" in accuracy_told(stats.counts)
    assert accuracy_told({}) == ""


def test_options_that_name_two_readings_are_refused() -> None:
    from jobs.score import ScoreConfig

    wrong_ones: tuple[dict[str, Any], ...] = (
        {"reads": "conversations", "chosen_column": "a"},
        {"reads": "pairs", "messages_column": "a"},
        {"rejected_column": "a", "response_column": "b"},
    )
    for wrong in wrong_ones:
        with pytest.raises(ValueError, match="leave"):
            ScoreConfig(input="a", output="b", model="tiny", **wrong)
