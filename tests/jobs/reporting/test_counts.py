"""Counts of stretches, added, are those of the whole corpus; each against a plain computation."""

from __future__ import annotations

from collections import Counter
from functools import reduce
from operator import add

import numpy as np
import pyarrow as pa
import pytest

from jobs.reporting.counts import MAX_KINDS, MAX_TURNS, ErrorKinds, ScoreCounts, counts_of, turn_moments
from jobs.reporting.extremes import Extremes, shown_row
from jobs.reporting.scales import finite_scores
from jobs.reporting.stats import CoMoments
from tests.jobs.reporting.corpora import COLUMNS, SCORE, scales_of, scored

TABLE = scored(2000)
ROWS = [row for row in TABLE.to_pylist() if row["score"] is not None]
STRETCHES = [TABLE.slice(0, 700), TABLE.slice(700, 0), TABLE.slice(700, 800), TABLE.slice(1500)]


@pytest.fixture(scope="module")
def counts() -> ScoreCounts:
    """The counts of the stretches, each of which is read in tables of its own."""
    scales = scales_of(STRETCHES)
    parts = [
        counts_of([table.slice(0, 300), table.slice(300)], COLUMNS, scales, stretch=place, num_examples=4)["score"]
        for place, table in enumerate(STRETCHES)
    ]
    return reduce(add, parts)


def test_scores_after_each_answer() -> None:
    rows = [[1.0, 2.0], None, [3.0], [], [5.0, float("nan"), 7.0], [0.5] * (MAX_TURNS + 9)]
    whole = pa.chunked_array([pa.array(rows[:2], pa.list_(pa.float32())), pa.array(rows[2:], pa.list_(pa.float32()))])
    found = turn_moments(whole.slice(0, 4)) + turn_moments(whole.slice(4))
    assert found.count.tolist() == [4, 2, 2, *[1] * (MAX_TURNS - 4), 10]
    assert found.mean[:3].tolist() == [2.375, 1.25, 3.75]
    assert turn_moments(whole.slice(1, 1)).count.sum() == 0


def test_scores_are_counted_by_group_and_by_side(counts: ScoreCounts) -> None:
    scores = np.array([row["score"] for row in ROWS])
    assert counts.scores.histogram.sum() == len(scores) == counts.scores.moments.count[0]
    assert counts.scores.moments.mean[0] == pytest.approx(scores.mean())
    values = scales_of(STRETCHES).values["domain"]
    assert values == ("(none)", "chat", "code", "\u5bf9\u8bdd")
    by = Counter(row["domain"] or "(none)" for row in ROWS)
    assert counts.by["domain"].moments.count.tolist() == [by[value] for value in values or ()]
    assert counts.by["domain"].histogram.sum(1).tolist() == [by[value] for value in values or ()]
    assert counts.sides is not None
    sides = Counter(row["preferred"] for row in ROWS)
    assert counts.sides.moments.count.tolist() == [sides[False], sides[True]]


def test_lengths_are_counted_where_both_are_known(counts: ScoreCounts) -> None:
    both = [(row["num_tokens"], row["score"]) for row in ROWS if row["num_tokens"] is not None]
    x, y = np.array(both).T
    lengths = counts.lengths
    assert lengths is not None
    assert lengths.linear.count == lengths.ranked.count == lengths.shares.count.sum() == lengths.map.sum() == len(both)
    assert lengths.linear.correlation == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-9)
    assert lengths.doubling.slope == pytest.approx(np.polyfit(np.log2(x), y, 1)[0], abs=1e-6)
    exact = CoMoments.of(*(np.array([(v < w).sum() + (v <= w).sum() for w in v], float) for v in (x, y)))
    assert lengths.ranked.correlation == pytest.approx(exact.correlation, abs=1e-9)


def test_extremes_are_the_best_and_worst_rows_with_their_places(counts: ScoreCounts) -> None:
    scores = finite_scores(TABLE, "score")
    starts = [0, 700, 700, 1500]
    for found, order in ((counts.extremes.best, np.argsort(-scores)), (counts.extremes.worst, np.argsort(scores))):
        assert [starts[place.stretch] + place.row for place in found] == order[:4].tolist()
        assert [place.score for place in found] == scores[order[:4]].tolist()


def test_of_equal_scores_the_first_rows_count() -> None:
    parts = [Extremes.of(np.ones(5, np.float32), stretch=stretch, first_row=0, k=3) for stretch in (0, 1)]
    for one in (parts[0] + parts[1], parts[1] + parts[0]):
        assert [(place.stretch, place.row) for place in one.best] == [(0, 0), (0, 1), (0, 2)]
        assert one.best == one.worst
    assert Extremes.of(np.ones(5, np.float32), stretch=0, first_row=0, k=0).best == ()


def test_errors_are_counted_by_their_type(counts: ScoreCounts) -> None:
    kinds = Counter(row["error"].partition(":")[0] for row in TABLE.to_pylist() if row["score"] is None)
    assert {kind: found.count for kind, found in counts.errors.kinds.items()} == kinds
    assert counts.errors.kinds["TooLongError"].example == "TooLongError: 40,000 tokens"
    assert counts.errors.total == TABLE.num_rows - len(ROWS)


def test_a_missing_score_without_a_reason_is_an_error_too() -> None:
    table = pa.table({"score": pa.array([None, float("inf"), None], pa.float32()), "error": ["Odd error", None, None]})
    kinds = ErrorKinds.of(table, SCORE).kinds
    assert {kind: found.count for kind, found in kinds.items()} == {
        "Odd error": 1,
        "(the score is not finite)": 1,
        "(no reason given)": 1,
    }


def test_many_kinds_of_errors_are_bounded_and_none_is_lost() -> None:
    texts = [f"Kind{place % 150}: {place}" for place in range(450)]
    table = pa.table({"score": pa.nulls(450, pa.float32()), "error": texts})
    found = ErrorKinds.of(table.slice(0, 200), SCORE) + ErrorKinds.of(table.slice(200), SCORE)
    assert len(found.kinds) == MAX_KINDS
    assert found.total == 450
    assert found.kinds["(other kinds)"].count > 100


@pytest.mark.parametrize(
    ("cells", "prompt", "response"),
    [
        ({"prompt": "why?", "response": "[1, 2]"}, "why?", "[1, 2]"),
        ({"prompt": [{"role": "user", "content": "why?"}], "response": None}, "why?", None),
        ({"prompt": None, "response": "x" * 2000}, None, "x" * 500 + " \u2026 [1,500 more characters]"),
    ],
)
def test_shown_rows_have_their_texts_shortened(
    cells: dict[str, object], prompt: str | None, response: str | None
) -> None:
    rest = {"score": 1.0, "num_tokens": None, "domain": None, "preferred": False}
    found = shown_row({**cells, **rest}, SCORE, COLUMNS, file="a.parquet", row=3)
    assert (found.prompt, found.response) == (prompt, response)
    assert found.facts == (("preferred", "False"),)
