"""Dispatch: parts to whoever is free, again where an actor fails, bounded, and in turn with other callers'."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from ray.exceptions import RayActorError

from cluster.reward_pool.dispatch import MAX_PART_RETRIES, PARTS_PER_ACTOR, Part, dispatch
from cluster.reward_pool.errors import ActorLostError, AsleepError, PoolClosedError, RewardPoolError
from cluster.reward_pool.supervisor import Member
from serve_app.batching.errors import QueueFullError
from serve_app.batching.wire import ScoreReply


class FakeActors:
    """Two actors that answer with their part's number unless `harm` raises; one in `refuse` is not replaced."""

    def __init__(self, harm: Callable[[Member, Part], None] = lambda member, part: None) -> None:
        self._members = {slot: Member(slot, 0, None) for slot in range(2)}
        self._harm = harm
        self.refuse: dict[int, RewardPoolError] = {}
        self.under_way: Counter[int] = Counter()
        self.most_under_way = 0
        self.log: list[Part] = []

    def in_turn(self) -> list[int]:
        return [0, 1]

    def member(self, slot: int) -> Member:
        return self._members[slot]

    async def replace(self, member: Member) -> None:
        if member.slot in self.refuse:
            raise self.refuse[member.slot]
        if self._members[member.slot].generation == member.generation:
            self._members[member.slot] = Member(member.slot, member.generation + 1, None)

    async def ask(self, member: Member, part: Part) -> ScoreReply:
        self.under_way[member.slot] += 1
        self.most_under_way = max(self.most_under_way, *self.under_way.values())
        try:
            await asyncio.sleep(0)
            self._harm(member, part)
        finally:
            self.under_way[member.slot] -= 1
        self.log.append(part)
        return ScoreReply(np.array([part.first], dtype=np.float32))

    def run(self, num_parts: int) -> list[int]:
        async def bounded() -> list[ScoreReply]:
            async with asyncio.timeout(120):
                return await dispatch([Part(place, place + 1) for place in range(num_parts)], self, self.ask)

        return [int(reply.scores[0]) for reply in asyncio.run(bounded())]


def test_replies_are_in_order_and_few_parts_are_under_way() -> None:
    actors = FakeActors()
    assert actors.run(50) == list(range(50))
    assert actors.most_under_way == PARTS_PER_ACTOR
    assert actors.run(0) == []


def test_a_dead_actors_parts_are_asked_for_again(caplog: pytest.LogCaptureFixture) -> None:
    def harm(member: Member, part: Part) -> None:
        if member.slot == 0 and member.generation < 2:
            raise RayActorError

    with caplog.at_level(logging.WARNING):
        assert FakeActors(harm).run(20) == list(range(20))
    assert "reward actor 0 failed (RayActorError); its part of 1 conversations is asked for again" in caplog.text


def test_a_part_is_not_given_to_the_same_dead_actor_again() -> None:
    deaths = Counter[tuple[int, int]]()

    def harm(member: Member, part: Part) -> None:
        if not member.generation:
            deaths[member.slot, part.first] += 1
            raise RayActorError

    assert FakeActors(harm).run(1) == [0]
    assert set(deaths.values()) == {1}


def test_a_part_over_which_actors_keep_dying_ends_the_batch() -> None:
    deaths = Counter[int]()

    def harm(member: Member, part: Part) -> None:
        if part.first == 7:
            deaths[7] += 1
            raise RayActorError

    with pytest.raises(
        ActorLostError, match=f"{MAX_PART_RETRIES + 1} actors died over the same part of 1 conversations"
    ):
        FakeActors(harm).run(20)
    assert deaths[7] == MAX_PART_RETRIES + 1


def test_the_batch_goes_on_without_an_actor_that_cannot_be_replaced(caplog: pytest.LogCaptureFixture) -> None:
    def harm(member: Member, part: Part) -> None:
        if member.slot == 0:
            raise RayActorError

    actors = FakeActors(harm)
    actors.refuse = {0: ActorLostError("no room")}
    assert actors.run(20) == list(range(20))
    assert "reward actor 0 is given up for this batch: no room" in caplog.text


def test_without_any_actor_left_the_last_reason_is_raised() -> None:
    def harm(member: Member, part: Part) -> None:
        raise RayActorError

    actors = FakeActors(harm)
    actors.refuse = dict.fromkeys(range(2), PoolClosedError("the pool is gone"))
    with pytest.raises(PoolClosedError, match="gone"):
        actors.run(3)


def test_what_an_actor_answers_for_a_whole_part_is_raised_at_once() -> None:
    def harm(member: Member, part: Part) -> None:
        if part.first == 3:
            raise AsleepError("asleep")

    actors = FakeActors(harm)
    with pytest.raises(AsleepError):
        actors.run(100)
    assert len(actors.log) < 20


def test_an_actor_with_too_much_to_do_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    refused = Counter[int]()
    monkeypatch.setattr(QueueFullError, "__init__", lambda self: setattr(self, "retry_after_s", 0))

    def harm(member: Member, part: Part) -> None:
        refused[part.first] += 1
        if refused[part.first] < 4:
            raise QueueFullError  # type: ignore[call-arg]

    assert FakeActors(harm).run(5) == list(range(5))


def test_a_small_batch_does_not_wait_for_a_large_one() -> None:
    """Of 200 parts a caller has a few at the actors: who comes then is behind those alone."""
    actors = FakeActors()

    async def run() -> int:
        device = asyncio.Lock()  # one device for both actors, first come first served

        async def ask(member: Member, part: Part) -> ScoreReply:
            async with device:
                await asyncio.sleep(0.001)
                return await actors.ask(member, part)

        large = asyncio.create_task(dispatch([Part(place, place + 1) for place in range(200)], actors, ask))
        await asyncio.sleep(0.01)
        before = len(actors.log)
        await dispatch([Part(1000, 1001)], actors, ask)
        waited_for = len(actors.log) - before
        assert not large.done()
        await large
        return waited_for

    assert asyncio.run(run()) <= 3 * PARTS_PER_ACTOR


def test_cancelling_ends_every_call() -> None:
    actors = FakeActors()

    async def run() -> None:
        async def forever(member: Member, part: Part) -> ScoreReply:
            actors.under_way[member.slot] += 1
            try:
                await asyncio.Event().wait()
            finally:
                actors.under_way[member.slot] -= 1
            raise AssertionError

        batch = asyncio.create_task(dispatch([Part(0, 1), Part(1, 2)], actors, forever))
        await asyncio.sleep(0.01)
        assert sum(actors.under_way.values()) == 2
        batch.cancel()
        with pytest.raises(asyncio.CancelledError):
            await batch

    asyncio.run(run())
    assert sum(actors.under_way.values()) == 0
