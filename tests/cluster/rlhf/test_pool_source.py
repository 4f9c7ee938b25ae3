"""A real pool of reward actors as the source: given, pickled, and named in the environment."""

from __future__ import annotations

import asyncio
import pickle

import pytest

from cluster.reward_pool.errors import PoolClosedError
from cluster.rlhf.openrlhf import RewardFunction as OpenRlhfRewardFunction
from cluster.rlhf.rollouts import RolloutScorer
from cluster.rlhf.trl import AsyncRewardFunction, RewardFunction
from serve_app.reward_model import ConversationTooLongError, RewardModel
from tests.cluster.rlhf.conftest import chatml, turns

NAME = "rewards-of-tests"


def test_every_way_to_a_pool_gives_the_engines_bits(
    local_ray: None, tiny: RewardModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cluster.reward_pool.pool import RewardActorPool

    prompts, completions = ["Hi", "Hi", "What time is it?"], ["Hello", "Go away", "Late"]
    expected = tiny.get_scores([turns(p, c) for p, c in zip(prompts, completions, strict=True)])
    monkeypatch.delenv("RAYWARD_URL", raising=False)
    with RewardActorPool("tiny", dtype="float32", num_cpus=1, name=NAME) as pool:
        for given in (RewardFunction(pool), pickle.loads(pickle.dumps(RewardFunction(pool)))):
            assert given(prompts=prompts, completions=completions) == expected
        awaited = AsyncRewardFunction(pool)
        assert asyncio.run(awaited(prompts=prompts, completions=completions)) == expected

        monkeypatch.setenv("RAYWARD_POOL", NAME)
        queries = [chatml(turns(p)) + c + "<|im_end|>" for p, c in zip(prompts, completions, strict=True)]
        rewards_B = OpenRlhfRewardFunction()(queries, [chatml(turns(p)) for p in prompts], [None] * 3)["rewards"]
        assert rewards_B.tolist() == expected

        endless = ["word " * 40_000, "Hello"]
        with pytest.raises(ConversationTooLongError, match="item 0"):
            RolloutScorer(pool).rewards(["Hi", "Hi"], endless)
        assert RolloutScorer(pool, on_error="null").rewards(["Hi", "Hi"], endless) == [None, expected[0]]

    with pytest.raises(PoolClosedError, match=NAME):
        RolloutScorer().rewards(prompts, completions)
