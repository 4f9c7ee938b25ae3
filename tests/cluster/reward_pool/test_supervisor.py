"""The supervisor changes every actor or none, and replaces the dead within bounds; the actors here are no processes."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest
from ray.exceptions import RayActorError

from cluster.reward_pool import supervisor as supervisor_module
from cluster.reward_pool.actor import ActorStatus
from cluster.reward_pool.errors import (
    ActorLostError,
    AsleepError,
    PoolStartError,
    RewardPoolError,
    SleepError,
    WeightsUpdateError,
)
from cluster.reward_pool.model_holder import WeightsVersion
from cluster.reward_pool.supervisor import PoolPlan, PoolSupervisor
from serve_app.reward_model import CheckpointError

OLD = WeightsVersion(0, "old", None, "aa")
STATUS = ActorStatus("node", 1, "cpu", "float32", OLD, False, 4096, 0)


class FakeActor:
    """An actor that does as it is told; what stands in `fails` raises."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.fails: dict[str, Exception] = {}
        self.version = OLD
        self.previous = OLD
        self.asleep = False
        self.staged = "bb"
        self.opened_with: dict[str, Any] = {}
        self.is_killed = False

    def __getattr__(self, method: str) -> Any:
        return type("Method", (), {"remote": staticmethod(lambda *args, **options: self._call(method, args, options))})

    async def _call(self, method: str, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        self.calls.append(method)
        if self.is_killed:
            raise RayActorError
        if method in self.fails:
            raise self.fails[method]
        if method == "open":
            await asyncio.sleep(0.01)
            self.opened_with = options
            self.version = options["version"] or OLD
            self.asleep = options["asleep"]
        elif method == "stage_weights":
            return self.staged
        elif method == "commit_weights":
            self.previous, self.version = self.version, args[0]
        elif method == "roll_back_weights":
            self.version = self.previous
        elif method in ("sleep", "wake"):
            self.asleep = method == "sleep"
        return replace(STATUS, weights=self.version, is_asleep=self.asleep)


@pytest.fixture
def actors(monkeypatch: pytest.MonkeyPatch) -> list[FakeActor]:
    """Every actor that was started, in order."""
    started: list[FakeActor] = []

    def launch(**_: Any) -> FakeActor:
        started.append(FakeActor())
        return started[-1]

    monkeypatch.setattr(supervisor_module, "launch", launch)
    monkeypatch.setattr(supervisor_module, "_kill", lambda member: setattr(member.handle, "is_killed", True))
    return started


def run(work: Callable[[PoolSupervisor], Awaitable[None]], **plan: Any) -> None:
    async def started() -> None:
        supervisor = PoolSupervisor(PoolPlan(num_actors=2, **plan))
        await supervisor.start()
        await work(supervisor)

    asyncio.run(started())


def test_new_weights_are_in_all_actors_and_in_those_that_replace_them(actors: list[FakeActor]) -> None:
    async def work(supervisor: PoolSupervisor) -> None:
        version = await supervisor.update_weights("new", None)
        assert version == WeightsVersion(1, "new", None, "bb")
        assert [actor.version for actor in actors] == [version, version]
        assert [actor.calls[-1] for actor in actors] == ["finish_weights"] * 2
        actors[0].is_killed = True
        member = await supervisor.replace(0, 0)
        assert (member.generation, member.handle) == (1, actors[2])
        assert actors[2].version == version

    run(work)


@pytest.mark.parametrize("step", ["stage_weights", "commit_weights"])
@pytest.mark.parametrize("error", [CheckpointError("torn file"), RayActorError()])
def test_where_one_actor_fails_all_keep_the_old_weights(actors: list[FakeActor], step: str, error: Exception) -> None:
    async def work(supervisor: PoolSupervisor) -> None:
        actors[1].fails[step] = error
        with pytest.raises(WeightsUpdateError, match=f"the old weights stay: reward actor 1: {type(error).__name__}"):
            await supervisor.update_weights("new", None)
        assert actors[0].version == OLD
        assert "finish_weights" not in actors[0].calls
        actors[1].is_killed = True
        await supervisor.replace(1, 0)
        assert actors[2].opened_with["version"] == OLD

    run(work)


def test_actors_that_read_different_files_keep_the_old_weights(actors: list[FakeActor]) -> None:
    async def work(supervisor: PoolSupervisor) -> None:
        actors[1].staged = "cc"
        with pytest.raises(WeightsUpdateError, match="different files"):
            await supervisor.update_weights("new", None)
        assert [actor.calls[-1] for actor in actors] == ["roll_back_weights"] * 2

    run(work)


def test_an_actor_that_cannot_go_back_is_ended(actors: list[FakeActor]) -> None:
    async def work(supervisor: PoolSupervisor) -> None:
        actors[0].fails["roll_back_weights"] = RewardPoolError("out of memory")
        actors[1].fails["commit_weights"] = WeightsUpdateError("out of memory")
        with pytest.raises(WeightsUpdateError):
            await supervisor.update_weights("new", None)
        assert actors[0].is_killed
        assert not actors[1].is_killed

    run(work)


@pytest.mark.parametrize("method", ["sleep", "wake"])
def test_all_sleep_or_none(actors: list[FakeActor], method: str) -> None:
    async def work(supervisor: PoolSupervisor) -> None:
        if method == "wake":
            await supervisor.sleep()
        actors[1].fails[method] = SleepError("no memory")
        with pytest.raises(SleepError, match="reward actor 1: SleepError: no memory"):
            await getattr(supervisor, method)()
        assert actors[0].asleep == (method == "wake")
        actors[0].is_killed = True
        await supervisor.replace(0, 0)
        assert actors[2].asleep == (method == "wake")

    run(work)


def test_a_dead_actor_keeps_nobody_from_sleeping_and_its_successor_sleeps_too(actors: list[FakeActor]) -> None:
    async def work(supervisor: PoolSupervisor) -> None:
        actors[1].is_killed = True
        await supervisor.sleep()
        await supervisor.replace(1, 0)
        assert actors[0].asleep
        assert actors[2].asleep
        with pytest.raises(AsleepError, match="wake"):
            await supervisor.update_weights("new", None)

    run(work)


def test_replacing_is_bounded_and_done_once(actors: list[FakeActor]) -> None:
    async def work(supervisor: PoolSupervisor) -> None:
        assert (await supervisor.replace(0, 0)).generation == 0  # it answers
        for generation in range(2):
            actors[-1 if generation else 0].is_killed = True
            found = await asyncio.gather(*(supervisor.replace(0, generation) for _ in range(3)))
            assert {member.generation for member in found} == {generation + 1}
        assert len(actors) == 4
        actors[-1].is_killed = True
        with pytest.raises(ActorLostError, match="2 reward actors died within an hour"):
            await supervisor.replace(0, 2)
        assert len(actors) == 4

    run(work, max_restarts=2)


def test_what_was_begun_is_finished_without_its_caller(actors: list[FakeActor]) -> None:
    """A batch that ends with an error gives its wait for a replacement up; the replacement is there all the same."""

    async def work(supervisor: PoolSupervisor) -> None:
        actors[0].is_killed = True
        caller = asyncio.create_task(supervisor.replace(0, 0))
        while len(actors) < 3:
            await asyncio.sleep(0)
        caller.cancel()
        with pytest.raises(asyncio.CancelledError):
            await caller
        assert (await supervisor.replace(0, 0)).generation == 1
        assert actors[2].calls == ["open"]
        assert actors[2].opened_with
        assert not actors[2].is_killed

    run(work)


def test_health_tells_the_dead_from_the_living(actors: list[FakeActor]) -> None:
    async def work(supervisor: PoolSupervisor) -> None:
        actors[1].is_killed = True
        health = await supervisor.health()
        assert [found.is_alive for found in health] == [True, False]
        assert health[1].problem is not None
        assert "RayActorError" in health[1].problem

    run(work)


def test_a_start_that_fails_says_why(actors: list[FakeActor], monkeypatch: pytest.MonkeyPatch) -> None:
    broken = FakeActor()
    fingerprints = Counter[str]()

    def launch(**_: Any) -> FakeActor:
        fingerprints["launched"] += 1
        return broken if fingerprints["launched"] == 2 else FakeActor()

    async def work(supervisor: PoolSupervisor) -> None:
        raise AssertionError

    monkeypatch.setattr(supervisor_module, "launch", launch)
    for error, raised in ((CheckpointError("no such model"), CheckpointError), (RayActorError(), PoolStartError)):
        fingerprints.clear()
        broken.fails["open"] = error
        with pytest.raises(raised, match="no such model|died at its start"):
            run(work)
