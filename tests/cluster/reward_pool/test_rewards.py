"""Shaping: each by name, none twice, and statistics that are the same however the rewards were cut."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import statistics
from collections.abc import Sequence

import pytest

from cluster.reward_pool.encoder import OnError
from cluster.reward_pool.ensemble import RewardEnsemble
from cluster.reward_pool.errors import RewardInputError
from cluster.reward_pool.rewards import RewardMoments, RunningNormalization, clip, combine, group_advantages
from serve_app.reward_model import ConversationLike
from tests.conftest import chat

REWARDS = [random.Random(3).gauss(1e4, 0.5) for _ in range(500)]


def test_clip_keeps_nulls_and_what_is_inside() -> None:
    assert clip([-9.0, 0.25, None, 9.0], -3, 3) == [-3, 0.25, None, 3]
    with pytest.raises(RewardInputError, match="low 3 is not below high -3"):
        clip([1.0], 3, -3)


@pytest.mark.parametrize("cuts", [(), (1, 2, 3), (250,), (499,), (10, 10, 400)])
def test_merged_moments_are_those_of_all_numbers(cuts: tuple[int, ...]) -> None:
    """At a mean of 20,000 deviations, where the difference of sums of squares would keep few digits."""
    pieces = [REWARDS[start:stop] for start, stop in itertools.pairwise([0, *cuts, len(REWARDS)])]
    moments = RewardMoments.merged(RewardMoments.of(piece) for piece in pieces)
    assert moments.count == len(REWARDS)
    assert moments.mean == pytest.approx(statistics.fmean(REWARDS), rel=1e-14)
    assert moments.std == pytest.approx(statistics.pstdev(REWARDS), rel=1e-9)


def test_running_normalization_is_that_of_everything_seen() -> None:
    running = RunningNormalization()
    first = running([1.0, 2.0, None, 3.0])
    assert first == pytest.approx([-1.2247, 0, None, 1.2247], abs=1e-4)
    assert running([5.0, None])[0] == pytest.approx((5 - 2.75) / statistics.pstdev([1, 2, 3, 5]))
    assert running.normalized([2.75]) == pytest.approx([0])
    assert running.moments.count == 4
    assert RunningNormalization(center=False)([2.0, 4.0]) == pytest.approx([2, 4])


def test_equal_rewards_are_centred_alone() -> None:
    assert RunningNormalization()([7.0, 7.0]) == [0, 0]
    assert RunningNormalization()([7.0]) == [0]


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), float("-inf")])
def test_no_advantage_comes_of_a_reward_that_is_not_finite(wrong: float) -> None:
    with pytest.raises(RewardInputError, match=f"reward 2 is {wrong}.*give None"):
        group_advantages([1.0, None, wrong, 3.0], 2)


def test_a_reward_that_is_not_finite_is_refused_and_not_taken_in() -> None:
    running = RunningNormalization()
    with pytest.raises(RewardInputError, match="reward 1 is nan"):
        running([1.0, float("nan")])
    assert running.moments.count == 0


def test_processes_that_merge_count_every_reward_once() -> None:
    workers = [RunningNormalization() for _ in range(3)]
    for round_ in range(4):
        for rank, worker in enumerate(workers):
            worker(REWARDS[round_ * 30 + rank * 10 :][:10])
        owns = [worker.own for worker in workers]
        for worker in workers:
            worker.merge(owns)
    assert len({worker.moments for worker in workers}) == 1
    assert workers[0].moments.count == 120
    assert workers[0].moments.std == pytest.approx(statistics.pstdev(REWARDS[:120]), rel=1e-9)
    with pytest.raises(RewardInputError, match="not among them"):
        workers[0].merge([RewardMoments.of([1.0])])


def test_the_state_survives_json_and_is_checked() -> None:
    running = RunningNormalization(center=False)
    running(REWARDS[:7])
    running.merge([running.own, RewardMoments.of(REWARDS[7:20])])
    running(REWARDS[20:30])
    restored = RunningNormalization.restore(json.loads(json.dumps(running.state())))
    assert restored(REWARDS[30:40]) == running(REWARDS[30:40])
    for broken in ({}, {"center": True, "merged": {}, "own": {}}, {**running.state(), "own": {"count": -1}}):
        with pytest.raises(ValueError, match="lacks|moments"):
            RunningNormalization.restore(broken)


def test_group_advantages_are_trls() -> None:
    """TRL 1.16 divides by the sample's deviation plus 1e-4, group by group."""
    rewards = [1.0, 2.0, 4.0, 8.0, 8.0, 8.0]
    found = group_advantages(rewards, 3)
    std = statistics.stdev(rewards[:3])
    assert found[:3] == pytest.approx([(reward - 7 / 3) / (std + 1e-4) for reward in rewards[:3]])
    assert found[3:] == [0, 0, 0]
    mixed = group_advantages([1.0, 8.0, 2.0, 8.0, 4.0, 8.0], ["a", "b"] * 3)
    assert [mixed[place] for place in (0, 2, 4, 1, 3, 5)] == found
    assert group_advantages([1.0, 3.0], 2, scale=False) == [-1, 1]


def test_a_null_is_in_no_group() -> None:
    assert group_advantages([1.0, None, 3.0, 5.0], 2, scale=False) == [0, None, -1, 1]
    assert group_advantages([], 4) == []


@pytest.mark.parametrize(("rewards", "groups"), [([1.0] * 5, 2), ([1.0], 0), ([1.0, 2.0], ["a"])])
def test_groups_that_do_not_fit_are_refused(rewards: list[float], groups: Sequence[str] | int) -> None:
    with pytest.raises(RewardInputError, match="groups"):
        group_advantages(rewards, groups)


def test_models_combine() -> None:
    models: list[list[float | None]] = [[1.0, 2.0, None], [3.0, 2.0, 1.0]]
    assert combine(models) == [2, 2, None]
    assert combine(models, "min") == [1, 2, None]
    assert combine(models, "mean_minus_std", weight=0.5) == [1.5, 2, None]
    with pytest.raises(RewardInputError, match="at least one model"):
        combine([])
    with pytest.raises(RewardInputError, match=r"\[1, 2\]"):
        combine([[1.0], [1.0, 2.0]])
    with pytest.raises(RewardInputError, match="not 'max'"):
        combine(models, "max")  # type: ignore[arg-type]


class Constant:
    """A model that gives every conversation one score."""

    def __init__(self, value: float | None) -> None:
        self.value = value

    def score(self, conversations: Sequence[ConversationLike], *, on_error: OnError = "raise") -> list[float | None]:
        return [self.value for _ in conversations]

    async def score_async(
        self, conversations: Sequence[ConversationLike], *, on_error: OnError = "raise"
    ) -> list[float | None]:
        return self.score(conversations, on_error=on_error)


def test_an_ensemble_scores_as_a_pool_does() -> None:
    chats = [chat("Hi", "Hello"), chat("Hi", "Yo")]
    ensemble = RewardEnsemble([Constant(1.0), Constant(4.0)], "min")
    assert ensemble.score(chats) == asyncio.run(ensemble.score_async(chats)) == [1, 1]
    assert RewardEnsemble([Constant(1.0), Constant(None)]).score(chats, on_error="null") == [None, None]
    shaped = RewardEnsemble([Constant(1.0), Constant(4.0)], shapes=[lambda _: [8.0, 9.0], list])
    assert shaped.score(chats) == [6, 6.5]
    with pytest.raises(RewardInputError, match="2 members have 1 shapes"):
        RewardEnsemble([Constant(1.0), Constant(4.0)], shapes=[list])
