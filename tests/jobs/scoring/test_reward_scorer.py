"""The stage for Ray Data pipelines gives tables the columns and the bits of `jobs.score`."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest

from jobs.api import RewardScorer, score_dataset
from jobs.errors import CorpusError
from jobs.scoring.candidate_stage import CANDIDATE_SCORE_COLUMNS
from jobs.scoring.pair_stage import PAIR_SCORE_COLUMNS
from serve_app.reward_model import RewardModel
from tests.conftest import chat

GOOD, BAD = chat("Why is the sea salt?", "Rivers carry salt into it."), chat("Why is the sea salt?", "It just is.")


def test_conversations_pairs_and_candidates_are_scored(tiny: RewardModel) -> None:
    good, bad = tiny.get_scores([GOOD, BAD])
    scorer = RewardScorer("tiny", dtype="float32")
    table = scorer(pa.table({"id": [1, 2, 3], "messages": [GOOD, None, BAD]}))
    assert table.column_names == ["id", "messages", "score", "num_tokens", "truncated", "error"]
    assert table["score"].to_pylist() == [good, None, bad]
    assert table["error"].to_pylist() == [None, "ConversationError: the messages are null", None]

    talk = [*GOOD, *BAD]
    table = RewardScorer("tiny", dtype="float32", every_turn=True)(pa.table({"messages": [talk]}))
    assert table["turn_scores"].to_pylist() == [[turn.value for turn in tiny.score_turns(talk)]]

    pairs = RewardScorer("tiny", dtype="float32", reads="pairs", output_prefix="x_")
    table = pairs(pa.table({"messages": [GOOD], "chosen": [GOOD], "rejected": [BAD]}))
    assert table.column_names[3:] == [f"x_{name}" for name in PAIR_SCORE_COLUMNS]
    assert (table["x_chosen_score"][0].as_py(), table["x_rejected_score"][0].as_py()) == (good, bad)

    prompt = GOOD[0]["content"]
    responses = [[GOOD[1]["content"], None, BAD[1]["content"]]]
    table = scorer(pa.table({"prompt": [prompt], "responses": responses}))
    assert table.column_names[2:] == list(CANDIDATE_SCORE_COLUMNS)
    assert table["scores"].to_pylist() == [[good, None, bad]]
    lists = RewardScorer("tiny", dtype="float32", reads="candidates")
    assert lists(pa.table({"prompt": [prompt], "responses": [None]}))["error"].to_pylist() == [
        "ConversationError: the responses are null"
    ]


def test_batches_that_cannot_be_read_say_what_to_do() -> None:
    scorer = RewardScorer("tiny", dtype="float32")
    with pytest.raises(CorpusError, match='set batch_format="pyarrow"'):
        scorer({"messages": [GOOD]})
    with pytest.raises(CorpusError, match="can be read in 2 ways"):
        scorer(pa.table({"messages": [GOOD], "chosen": [GOOD], "rejected": [BAD]}))
    with pytest.raises(CorpusError, match=r"the dataset already has the columns \['score'\]"):
        scorer(pa.table({"messages": [GOOD], "score": [1.0]}))


def test_options_of_actors_are_the_pipelines() -> None:
    with pytest.raises(ValueError, match="num_actors, address: map_batches says"):
        RewardScorer("tiny", num_actors=2, address="auto")
    with pytest.raises(ValueError, match="no_such_option"):
        RewardScorer("tiny", no_such_option=1)
    with pytest.raises(ValueError, match="scored by jobs.score alone"):
        RewardScorer("tiny", steps_column="steps")


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_a_pipeline_scores_between_a_filter_and_a_group_by(tiny: RewardModel) -> None:
    import ray.data
    from ray.data.expressions import col

    rows: list[dict[str, Any]] = [
        {"lang": "en" if number % 2 else "zh", "length": number, "messages": chat(f"Count to {number}.", "one, two")}
        for number in range(12)
    ]
    dataset = ray.data.from_items([*rows, {"lang": "en", "length": 13, "messages": None}])
    kept = dataset.filter(expr=col("length") >= 4)
    scored = score_dataset(kept, model="tiny", dtype="float32", concurrency=1)
    found = scored.groupby("lang", num_partitions=2).map_groups(_summed, batch_format="pyarrow").take_all()
    wanted: dict[str, list[float]] = {"en": [], "zh": []}
    for row, value in zip(rows[4:], tiny.get_scores([row["messages"] for row in rows[4:]]), strict=True):
        wanted[row["lang"]].append(value)
    assert {row["lang"]: sorted(row["scores"]) for row in found} == {lang: sorted(own) for lang, own in wanted.items()}
    assert {row["lang"]: row["errors"] for row in found} == {"en": 1, "zh": 0}


def _summed(group: pa.Table) -> pa.Table:
    scores = [value for value in group["score"].to_pylist() if value is not None]
    errors = len(group) - group["error"].null_count
    return pa.table({"lang": [group["lang"][0].as_py()], "scores": [scores], "errors": [errors]})
