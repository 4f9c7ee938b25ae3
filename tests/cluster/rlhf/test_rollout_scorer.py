"""Rewards in order, errors by place, and None on request alone."""

from __future__ import annotations

import asyncio
import math

import pytest

from cluster.reward_pool.errors import RewardInputError
from cluster.rlhf.errors import RewardSourceError
from cluster.rlhf.rollouts import RolloutScorer
from cluster.rlhf.sources import LocalRewardSource, as_reward_source
from serve_app.reward_model import ConversationError, RewardModel
from tests.cluster.rlhf.conftest import TOO_LONG, RecordingSource, turns

PICTURE = [{"role": "user", "content": [{"type": "image"}]}]


def test_rewards_are_the_models_scores_in_order(tiny: RewardModel) -> None:
    prompts, responses = ["Hi", "Hi", "Why?"], ["Hello", "Go away", "Because"]
    expected = tiny.get_scores([turns(p, r) for p, r in zip(prompts, responses, strict=True)])
    scorer = RolloutScorer(tiny)
    assert scorer.rewards(prompts, responses) == expected
    assert scorer.rewards(prompts[:1], responses[:1]) == expected[:1]
    assert asyncio.run(scorer.rewards_async(prompts, responses)) == expected
    assert scorer.rewards([], []) == []


def test_the_first_rollout_that_cannot_be_scored_is_named(source: RecordingSource) -> None:
    with pytest.raises(ConversationError, match="item 1: .*other than text") as caught:
        RolloutScorer(source).rewards(["a", PICTURE], ["b", "c"])
    assert caught.value.index == 1
    assert source.asked == []
    with pytest.raises(RewardInputError, match="2 prompts and 1 responses"):
        RolloutScorer(source).rewards(["a", "b"], ["c"])


def test_on_request_what_cannot_be_scored_has_none_and_the_others_their_rewards(source: RecordingSource) -> None:
    scorer = RolloutScorer(source, on_error="null")
    assert scorer.rewards(["a", PICTURE, "c", "d"], ["12", "3", TOO_LONG, "4567"]) == [2.0, None, None, 4.0]
    assert asyncio.run(scorer.rewards_async([PICTURE, "d"], ["3", "4567"])) == [None, 4.0]
    assert scorer.rewards([PICTURE], ["3"]) == [None]
    with pytest.raises(RewardSourceError, match="item 2"):
        scorer.all_rewards(["a", "b", "c"], ["1", "2", TOO_LONG])


def test_a_model_gives_none_for_its_own_limit(tiny: RewardModel) -> None:
    endless = "word " * 40_000
    with pytest.raises(ConversationError, match="item 1: .*the limit is 32768"):
        LocalRewardSource(tiny).score([turns("a", "b"), turns("a", endless)])
    first, second = LocalRewardSource(tiny).score([turns("a", "b"), turns("a", endless)], on_error="null")
    assert math.isfinite(first or math.nan)
    assert second is None


def test_a_source_of_too_few_scores_is_refused(source: RecordingSource, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "score", lambda conversations, on_error: [1.0])
    with pytest.raises(RewardSourceError, match="1 scores for 2"):
        RolloutScorer(source).rewards(["a", "b"], ["c", "d"])


def test_what_is_no_source_and_no_choice_is_refused() -> None:
    with pytest.raises(RewardSourceError, match="int is none of these"):
        as_reward_source(3)
    with pytest.raises(RewardInputError, match="'raise' or 'null'"):
        RolloutScorer(on_error="skip")  # type: ignore[arg-type]


def test_without_a_source_the_environment_names_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAYWARD_URL", raising=False)
    monkeypatch.delenv("RAYWARD_POOL", raising=False)
    with pytest.raises(RewardSourceError, match="neither of RAYWARD_URL and RAYWARD_POOL"):
        RolloutScorer().rewards(["a"], ["b"])
    monkeypatch.setenv("RAYWARD_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("RAYWARD_POOL", "rewards")
    with pytest.raises(RewardSourceError, match="both of"):
        RolloutScorer().rewards(["a"], ["b"])
