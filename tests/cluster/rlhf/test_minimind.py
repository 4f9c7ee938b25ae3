"""minimind's contract as recorded from its `trainer/trainer_utils.py` (master, 2026): `LMForRewardModel`."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.rlhf.minimind import LMForRewardModel, RewardModelFacade, with_rayward
from serve_app.reward_model import RewardModel
from tests.cluster.rlhf.conftest import RecordingSource, turns


class TrainersClass:
    """Loads by remote code, folds the history into one turn and clamps: the shape of minimind's class."""

    def __init__(self, model_path: str, device: str = "cuda", dtype: Any = None) -> None:
        raise AssertionError("remote code")

    def get_score(self, messages: list[dict[str, str]], response: str) -> float:
        folded = " / ".join(message["content"] for message in messages)
        score: float = self.model.get_score(self.tokenizer, turns(folded, response))  # type: ignore[attr-defined]
        return max(min(score, 3.0), -3.0)


def test_the_trainers_own_folding_and_clamp_work_on_rewards_of_ours(source: RecordingSource) -> None:
    made = with_rayward(TrainersClass, source)
    model = made("internlm/internlm2-1_8b-reward", device="cuda:0", dtype=None)
    assert isinstance(model, TrainersClass)
    assert model.get_score(turns("a", "b", "c"), "de") == 2.0
    assert model.get_score(turns("a"), "much longer") == 3.0
    assert source.asked[0] == turns("a / b / c", "de")


def test_alone_it_scores_the_turns_and_clamps_once(tiny: RewardModel) -> None:
    history = turns("How are you?", "Well.", "And now?")
    raw = tiny.get_score([*history, {"role": "assistant", "content": "Well"}])
    assert abs(raw) < 3.0
    given = LMForRewardModel("any", "cpu", source=tiny).get_score(history, "Well")
    assert isinstance(given, float)
    assert given == raw


@pytest.mark.parametrize(("length", "clamped"), [(2, 2.0), (5, 3.0)])
def test_scores_are_clamped_to_three(source: RecordingSource, length: int, clamped: float) -> None:
    assert LMForRewardModel(source=source).get_score(turns("a"), "b" * length) == clamped


def test_the_facade_answers_as_a_loaded_model_does(source: RecordingSource) -> None:
    model = RewardModelFacade(source).to("cuda").eval().requires_grad_(False)
    assert model.get_score(None, turns("a", "b" * 5)) == 5.0
    assert model.get_scores(None, [turns("a", "bc")]) == [2.0]
