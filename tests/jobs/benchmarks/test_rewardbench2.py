"""RewardBench 2's figures: what its own code makes of the same scores, and the edges of the Ties score."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from jobs.benchmarks import rewardbench2
from jobs.benchmarks.outcome import AnsweredRow
from jobs.benchmarks.rewardbench2 import ties_score
from jobs.errors import CorpusError


def prompt(*scores: float | None, num_correct: int = 1, subset: str = "Math") -> AnsweredRow:
    return AnsweredRow(0, None, subset, num_correct, scores)


def ties(row_id: str, *scores: float | None, num_correct: int = 1) -> AnsweredRow:
    return AnsweredRow(0, row_id, "Ties", num_correct, scores)


def test_the_scores_of_the_golden_give_exactly_its_figures(shared: Path) -> None:
    golden = json.loads((shared / "goldens" / "rewardbench2.json").read_text(encoding="utf-8"))
    rows = [
        AnsweredRow(place, row["id"], row["subset"], row["num_correct"], tuple(row["scores"]))
        for place, row in enumerate(golden["rows"])
    ]
    expected = golden["expected"]
    for outcome in (rewardbench2.evaluate(rows), rewardbench2.evaluate(rows[::-1])):
        figures = {section.name: section.score for section in outcome.sections}
        assert figures == pytest.approx({name: expected[name] for name in figures}, abs=1e-15)
        assert outcome.score == pytest.approx(expected["mean"], abs=1e-15)
        assert not any(section.is_whole for section in outcome.sections)
        assert outcome.notes == ()
    in_order = rewardbench2.evaluate(rows)
    assert {section.name: section.score for section in in_order.sections} | {"mean": in_order.score} == expected


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (prompt(2, 1, 0, -1), 1.0),
        (prompt(1, 2, 0, -1), 0.0),
        (prompt(2, 2, 0, -1), 1 / 2),
        (prompt(2, 2, 2, 2), 1 / 4),
        (prompt(2, 3, 3, 1, num_correct=2), 1 / 2),
        (prompt(3, 3, 1, num_correct=2), 1.0),
        (prompt(2, 1, None, -1), 0.0),
        (prompt(None, 1, 0, -1), 0.0),
        (prompt(math.nan, 1, 0, -1), 0.0),
        (prompt(num_correct=0), 0.0),
        (prompt(2, 1, 0, num_correct=2, subset="Ties"), 1.0),
        (prompt(2, 1, 1, num_correct=2, subset="Ties"), 0.0),
    ],
)
def test_a_prompt_counts_the_share_of_right_answers_at_the_top(row: AnsweredRow, expected: float) -> None:
    assert rewardbench2.accuracy(row) == expected


def test_the_ties_score_adds_accuracies_and_margins() -> None:
    rows = [
        ties("ref:1", 2.0, 1.0),  # gap 1
        ties("tied:1", 3.0, 2.5, 1.0, num_correct=2),  # spread 0.5, gap 1.5
        ties("ref:2", 1.0, 2.0),  # gap -1
        ties("tied:2", 3.0, 1.0, 0.5, num_correct=2),  # spread 2, gap 0.5
    ]
    margins = math.tanh(1 / 0.5 - 1) + math.tanh(-1 / 2 - 1)
    expected = 0.30 * 1 + 0.30 * 0.5 + 0.20 * 0.5 + 0.20 * 0.5 + 0.01 * margins / 2
    assert ties_score(rows) == pytest.approx(expected, abs=1e-15)


def test_a_spread_of_nothing_is_the_limit_of_the_margin() -> None:
    ahead = [ties("ref:1", 2.0, 1.0), ties("tied:1", 3.0, 3.0, 1.0, num_correct=2)]
    assert ties_score(ahead) == pytest.approx(1.0 + 0.01, abs=1e-15)
    behind = [ties("ref:1", 1.0, 2.0), ties("tied:1", 0.0, 0.0, 1.0, num_correct=2)]
    assert ties_score(behind) == pytest.approx(-0.01, abs=1e-15)
    level = [ties("ref:1", 1.0, 1.0), ties("tied:1", 1.0, 1.0, 1.0, num_correct=2)]
    assert ties_score(level) == 0.0  # 0 / 0 counts as 0


def test_a_row_without_all_its_scores_is_wrong_and_its_margin_counts_nothing() -> None:
    good = [ties("ref:1", 2.0, 1.0), ties("tied:1", 3.0, 3.0, 1.0, num_correct=2)]
    broken = [ties("ref:2", None, 1.0), ties("tied:2", 3.0, 3.0, 1.0, num_correct=2)]
    assert ties_score([*good, *broken]) == pytest.approx(0.30 + 0.15 + 0.20 + 0.10 + 0.005, abs=1e-15)
    broken = [ties("ref:2", 2.0, 1.0), ties("tied:2", num_correct=0)]
    assert ties_score([*good, *broken]) == pytest.approx(0.15 + 0.30 + 0.10 + 0.10 + 0.005, abs=1e-15)


def test_a_number_without_the_other_row_counts_in_the_accuracies_and_is_named() -> None:
    rows = [ties("ref:1", 2.0, 1.0), ties("tied:1", 3.0, 3.0, 1.0, num_correct=2), ties("ref:7", 0.0, 1.0)]
    outcome = rewardbench2.evaluate(rows)
    assert outcome.sections[-1].score == pytest.approx(0.30 + 0.15 + 0.40 + 0.01, abs=1e-15)
    assert outcome.notes == ("Ties compares ref:N with tied:N; without the other: ref:7",)
    alone = rewardbench2.evaluate([ties("ref:7", 1.0, 0.0)])
    assert alone.sections[-1].score is None
    assert alone.sections[-1].missing == ["Ties"]


@pytest.mark.parametrize("row_id", [None, "7", "ref:", "ref:x", "best:1", "tied:-1"])
def test_an_id_of_ties_that_tells_nothing_is_refused(row_id: str | None) -> None:
    with pytest.raises(CorpusError, match="ref:N and tied:N"):
        rewardbench2.ties_number(row_id)


def test_a_part_of_the_benchmark_has_its_subsets_and_no_final_score() -> None:
    outcome = rewardbench2.evaluate(
        [prompt(2, 1), prompt(1, 2), prompt(1, 0, subset="Focus"), prompt(1, 1, subset="x")]
    )
    figures = {section.name: section.score for section in outcome.sections}
    assert figures == {"Factuality": None, "Precise IF": None, "Math": 0.5, "Safety": None, "Focus": 1.0, "Ties": None}
    assert outcome.score is None
    assert [(subset.name, subset.score) for subset in outcome.others] == [("x", 0.5)]
    assert sum(rewardbench2.NUM_PROMPTS.values()) == 1865
