"""RewardBench's figures: held against the published accuracies of the 1.8B model, and at the edges."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from jobs.benchmarks import rewardbench1
from jobs.benchmarks.outcome import AnsweredRow


def pair(chosen: float | None, rejected: float | None, subset: str = "llmbar-natural", row: int = 0) -> AnsweredRow:
    return AnsweredRow(row, None, subset, 1, (chosen, rejected))


@pytest.fixture(scope="module")
def published(shared: Path) -> dict[str, float]:
    """The accuracy of internlm2-1_8b-reward in each subset, as its authors published it."""
    text = (shared / "data" / "internlm2-1_8b-reward.rewardbench-subsets.json").read_text(encoding="utf-8")
    return {name: figure for name, figure in json.loads(text).items() if isinstance(figure, float)}


def percent(sections: dict[str, float | None]) -> dict[str, float]:
    return {name: round(100 * score, 2) for name, score in sections.items() if score is not None}


def test_the_published_accuracies_give_the_sections_of_the_card(published: dict[str, float]) -> None:
    sections = rewardbench1.section_scores(published)
    assert percent(sections) == {"Chat": 94.97, "Chat Hard": 58.11, "Safety": 79.59, "Reasoning": 87.44}
    final = rewardbench1.final_score(published)
    assert final == pytest.approx(sum(score for score in sections.values() if score is not None) / 4, abs=1e-15)


def test_the_card_itself_weights_with_the_xstest_counts_exchanged(published: dict[str, float]) -> None:
    card = rewardbench1.PUBLISHED[-1]
    sections = rewardbench1.section_scores(published, weights=rewardbench1.CARD_WEIGHTS)
    assert {name: round(score, 3) for name, score in sections.items() if score is not None} == card.sections
    final = rewardbench1.final_score(published, weights=rewardbench1.CARD_WEIGHTS)
    assert final is not None
    assert round(final, 3) == card.score
    # 147 of 154 and 197 of 250 pairs: the other way round neither count is a whole number.
    assert published["xstest-should-refuse"] * 154 == pytest.approx(147, abs=1e-9)
    assert published["xstest-should-respond"] * 250 == pytest.approx(197, abs=1e-9)


def test_the_benchmark_is_23_subsets_of_2985_pairs_and_math_weighs_as_much_as_code() -> None:
    weights = rewardbench1.WEIGHTS
    assert sum(rewardbench1.NUM_PAIRS.values()) == 2985
    assert [name for names in rewardbench1.SECTIONS.values() for name in names] == list(rewardbench1.NUM_PAIRS)
    assert weights["math-prm"] == sum(weight for name, weight in weights.items() if name.startswith("hep-")) == 984


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"),
    [(2.0, 1.0, 1.0), (1.0, 2.0, 0.0), (1.0, 1.0, 0.0), (None, 1.0, 0.0), (1.0, None, 0.0), (math.nan, 1.0, 0.0),
     (1.0, math.nan, 0.0), (0.0, -0.0, 0.0)],
)  # fmt: skip
def test_the_chosen_answer_must_score_strictly_higher(
    chosen: float | None, rejected: float | None, expected: float
) -> None:
    assert rewardbench1.accuracy(pair(chosen, rejected)) == expected


def test_a_part_of_the_benchmark_has_its_sections_and_no_final_score() -> None:
    rows = [pair(2, 1), pair(1, 2), pair(None, 1, row=2), pair(1, 1), pair(1, 0, "llmbar-adver-manual")]
    outcome = rewardbench1.evaluate([*rows, pair(1, 0, "mine")])
    sections = {section.name: section for section in outcome.sections}
    assert sections["Chat Hard"].score == pytest.approx((0.25 * 100 + 1.0 * 46) / 146, abs=1e-15)
    assert sections["Chat Hard"].missing == [
        "mt-bench-hard", "llmbar-adver-neighbor", "llmbar-adver-GPTInst", "llmbar-adver-GPTOut"
    ]  # fmt: skip
    assert not sections["Chat Hard"].is_whole
    assert (sections["Chat"].score, sections["Safety"].score, outcome.score) == (None, None, None)
    natural = sections["Chat Hard"].subsets[1]
    assert (natural.num_rows, natural.benchmark_rows, natural.num_unscored) == (4, 100, 1)
    assert [(subset.name, subset.score, subset.benchmark_rows) for subset in outcome.others] == [("mine", 1.0, None)]
    assert outcome.comparisons == rewardbench1.PUBLISHED
    assert outcome.notes == ()


def test_the_whole_benchmark_has_a_final_score_and_one_weighted_as_the_cards() -> None:
    rows = [pair(1, 2 * (name == "xstest-should-refuse"), name) for name in rewardbench1.NUM_PAIRS]
    outcome = rewardbench1.evaluate(rows)
    safety = 1 - 154 / 740
    assert outcome.score == pytest.approx((3 + safety) / 4, abs=1e-15)
    as_on_cards = outcome.comparisons[0]
    assert as_on_cards.sections["Safety"] == pytest.approx(1 - 250 / 740, abs=1e-15)
    assert as_on_cards.score == pytest.approx((4 - 250 / 740) / 4, abs=1e-15)
    assert outcome.notes == ("the cards' figures are weighted with the counts of the two xstest subsets exchanged",)


def test_no_rows_give_no_figures() -> None:
    outcome = rewardbench1.evaluate([])
    assert outcome.score is None
    assert [section.score for section in outcome.sections] == [None] * 4
