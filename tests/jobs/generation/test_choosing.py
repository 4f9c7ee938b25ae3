"""Which candidate is the best, what its row says, and what the row of a prompt says that has none."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest

from jobs.generation.candidates import Candidate, Generation
from jobs.generation.choosing import Judged, all_rows, best_rows
from serve_app.reward_model import Score, ScoringError
from serve_app.reward_model.errors import ConversationError
from serve_app.reward_model.scores import order

PROMPTS = pa.table({"id": [7], "prompt": ["Which?"]})


def judged(*outcomes: float | ScoringError, failures: tuple[str, ...] = ()) -> Judged:
    """A prompt whose candidate number i says `answer i`, with these scores or errors."""
    candidates = tuple(Candidate(f"answer {number}", "stop") for number in range(len(outcomes)))
    scored = tuple(Score(outcome, 10) if isinstance(outcome, float) else outcome for outcome in outcomes)
    return Judged(Generation(candidates, failures), scored)


def best(one: Judged) -> dict[str, Any]:
    row: dict[str, Any] = best_rows(PROMPTS, [one], prefix="").to_pylist()[0]
    return row


def cards_choice(scores: list[float]) -> int:
    """What the model card's best-of-N prints: it sorts by `rank`'s result, which its code fills with the order."""
    return min(range(len(scores)), key=lambda index: order(scores)[index])


def test_the_best_of_three_is_not_the_one_that_the_model_card_picks() -> None:
    scores = [0.1, 0.3, 0.2]
    assert cards_choice(scores) == 2
    assert best(judged(*scores))["response"] == "answer 1"
    assert best(judged(*scores))["score"] == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("scores", "place"),
    [([1.0], 0), ([-2.0, -1.0], 1), ([1.0, 1.0], 0), ([0.0, 3.0, 3.0], 1), ([0.0, -0.0], 0), ([1.0, 2.0, 4.0, 3.0], 2)],
)
def test_the_highest_score_wins_and_of_equal_ones_the_first_generated(scores: list[float], place: int) -> None:
    assert best(judged(*scores))["response"] == f"answer {place}"


def test_a_row_keeps_its_columns_and_says_what_was_chosen() -> None:
    assert best(judged(1.0, 2.0)) == {
        "id": 7,
        "prompt": "Which?",
        "response": "answer 1",
        "finish_reason": "stop",
        "score": 2.0,
        "num_tokens": 10,
        "truncated": False,
        "num_candidates": 2,
        "failures": None,
        "error": None,
    }


def test_a_prompt_answered_in_part_says_how_many_came_and_why_the_others_did_not() -> None:
    row = best(judged(1.0, ConversationError("too odd"), 2.0, failures=("HTTP 500: gone",) * 2))
    assert (row["response"], row["num_candidates"], row["error"]) == ("answer 2", 3, None)
    assert row["failures"] == "2 of 5: HTTP 500: gone; 1 of 5: ConversationError: too odd"


def test_a_prompt_without_a_response_has_a_named_reason() -> None:
    none_came = best(judged(failures=("no answer within 9 s",) * 4))
    assert (none_came["response"], none_came["score"], none_came["num_candidates"]) == (None, None, 0)
    assert none_came["error"] == "no candidate has a score: 4 of 4: no answer within 9 s"
    none_scored = best(judged(ConversationError("too odd")))
    assert none_scored["error"] == "no candidate has a score: 1 of 1: ConversationError: too odd"
    assert none_scored["num_candidates"] == 1
    malformed = best(Judged(Generation(()), (), ConversationError("the prompt is null")))
    assert malformed["error"] == "ConversationError: the prompt is null"
    assert malformed["failures"] is None


def test_all_candidates_have_a_row_the_best_first_and_those_without_a_score_last() -> None:
    both = pa.concat_tables([PROMPTS, PROMPTS])
    table = all_rows(both, [judged(1.0, ConversationError("odd"), 3.0, 1.0), judged(failures=("late",))], prefix="new_")
    columns = ["id", "new_response", "new_rank", "new_candidate", "new_score"]
    assert [tuple(row.values()) for row in table.select(columns).to_pylist()] == [
        (7, "answer 2", 0, 2, 3.0),
        (7, "answer 0", 1, 0, 1.0),
        (7, "answer 3", 2, 3, 1.0),
        (7, "answer 1", None, 1, None),
        (7, None, None, None, None),
    ]
    assert table["new_error"].to_pylist()[3:] == ["ConversationError: odd", "no candidate has a score: 1 of 1: late"]
