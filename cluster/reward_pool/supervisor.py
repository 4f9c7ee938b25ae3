"""PoolSupervisor: the actor that starts a pool's reward actors, replaces the dead, and changes all of them or none.

Scores never pass through it. It holds what must outlive a reward actor: which weights the pool scores with, and
whether it sleeps; a replaced actor starts from that. Pools in other processes know the same supervisor.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar

import ray
from ray.exceptions import RayError

from cluster.reward_pool.actor import ActorStatus, launch
from cluster.reward_pool.calls import answer
from cluster.reward_pool.encoder import Encoding
from cluster.reward_pool.errors import (
    ActorLostError,
    AsleepError,
    PoolStartError,
    RewardPoolError,
    SleepError,
    WeightsUpdateError,
)
from cluster.reward_pool.model_holder import WeightsVersion
from serve_app.reward_model import ModelSpec, RaywardError

logger = logging.getLogger(__name__)
T = TypeVar("T")

STATUS_TIMEOUT_S = 10.0
RESTARTS_WITHIN_S = 3600.0
FAILURES = (RaywardError, RayError)


@dataclass(frozen=True, slots=True)
class PoolPlan:
    """A pool as it is to be: its model, how many actors there are, and what each takes of the cluster.

    `start_timeout_s` bounds every loading of weights, `max_restarts` the actors replaced within an hour.
    """

    spec: ModelSpec = field(default_factory=ModelSpec)
    encoding: Encoding = field(default_factory=Encoding)
    num_actors: int = 1
    num_gpus: float = 0.0
    num_cpus: float = 1.0
    timeout_s: float = 600.0
    start_timeout_s: float = 900.0
    max_restarts: int = 10


@dataclass(frozen=True, slots=True)
class Member:
    """One reward actor of a pool; `generation` counts how often the actor in this slot was replaced."""

    slot: int
    generation: int
    handle: Any


@dataclass(frozen=True, slots=True)
class Roster:
    """The actors of a pool, and what their callers need to know."""

    members: tuple[Member, ...]
    token_budget: int


@dataclass(frozen=True, slots=True)
class MemberHealth:
    """How an actor is. Where it does not answer, `status` is None and `problem` says why."""

    slot: int
    num_replaced: int
    status: ActorStatus | None
    problem: str | None = None

    @property
    def is_alive(self) -> bool:
        return self.status is not None


class PoolSupervisor:
    """The class of the supervisor's Ray actor. `start` comes first; changes to the pool happen one after the other."""

    def __init__(self, plan: PoolPlan) -> None:
        self._plan = plan
        self._changing = asyncio.Lock()
        self._begun: set[asyncio.Task[Any]] = set()
        self._members: list[Member] = []
        self._restarts: deque[float] = deque()
        self._version: WeightsVersion | None = None
        self._asleep = False
        self._token_budget = 1

    async def start(self) -> Roster:
        """Start every actor and load the model in each.

        Raises:
            PoolStartError: they do not come up in time, or loaded different files.
            CheckpointError: the model cannot be loaded.
        """
        async with self._changing:
            self._members = [Member(slot, 0, self._launched()) for slot in range(self._plan.num_actors)]
            opened = await asyncio.gather(*map(self._opened, self._members), return_exceptions=True)
            for failure in opened:
                if isinstance(failure, BaseException):
                    raise failure
            statuses = [status for status in opened if isinstance(status, ActorStatus)]
            fingerprints = {status.weights.fingerprint: status.node for status in statuses}
            if len(fingerprints) > 1:
                raise PoolStartError(f"the files of {self._plan.spec.model} differ between nodes: {fingerprints}")
            self._version = statuses[0].weights
            self._token_budget = min(status.token_budget for status in statuses)
            return self._roster()

    async def plan(self) -> PoolPlan:
        """For those who join later."""
        return self._plan

    async def roster(self) -> Roster:
        """The actors as they are now."""
        return self._roster()

    async def replace(self, slot: int, generation: int) -> Member:
        """Another actor for one that failed its caller, unless that was done already or it answers after all.

        Raises:
            ActorLostError: too many were replaced lately, or the new one does not come up.
        """
        return await self._whole(self._replace(slot, generation))

    async def _replace(self, slot: int, generation: int) -> Member:
        async with self._changing:
            member = self._members[slot]
            if member.generation != generation or await self._answers(member):
                return member
            self._count_restart()
            _kill(member)
            replaced = Member(slot, generation + 1, self._launched())
            self._members[slot] = replaced
            try:
                await self._opened(replaced)
            except FAILURES as error:
                _kill(replaced)
                raise ActorLostError(f"reward actor {slot} died and cannot be replaced: {error}") from None
            logger.warning("reward actor %d was replaced", slot)
            return replaced

    async def sleep(self) -> None:
        """Put every actor's weights away, or none's. Raises `SleepError`."""
        await self._whole(self._set_asleep(True))

    async def wake(self) -> None:
        """Bring every actor's weights back, or none's. Raises `SleepError`."""
        await self._whole(self._set_asleep(False))

    async def _set_asleep(self, asleep: bool) -> None:
        method, undo = ("sleep", "wake") if asleep else ("wake", "sleep")
        async with self._changing:
            # A dead actor does not count: what replaces it starts as the pool is then.
            answers = _failures(await self._each(method))
            failures = {slot: error for slot, error in answers.items() if not isinstance(error, RayError)}
            if failures:
                await self._each(undo)
                raise SleepError(f"{method} failed, the pool is as before: {_described(failures)}")
            self._asleep = asleep

    async def update_weights(self, model: str, revision: str | None) -> WeightsVersion:
        """Take a new checkpoint in every actor, or in none.

        Raises:
            WeightsUpdateError: an actor could not read or take it, or the actors read different files.
            AsleepError: the pool sleeps.
        """
        return await self._whole(self._update_weights(model, revision))

    async def _update_weights(self, model: str, revision: str | None) -> WeightsVersion:
        async with self._changing:
            if self._asleep:
                raise AsleepError("the pool sleeps: call wake() before update_weights()")
            assert self._version is not None
            staged = await self._each("stage_weights", model, revision)
            await self._refuse_unless(staged, f"{model} cannot be taken")
            if len(set(staged.values())) > 1:
                await self._rolled_back()
                raise WeightsUpdateError(f"the actors read different files at {model}: fingerprints {staged}")
            version = WeightsVersion(self._version.number + 1, model, revision, next(iter(staged.values())))
            committed = await self._each("commit_weights", version)
            await self._refuse_unless(committed, f"{model} cannot be taken")
            self._version = version
            for slot, failure in _failures(await self._each("finish_weights")).items():
                logger.warning("reward actor %d keeps its old weights in memory: %s", slot, failure)
            return version

    async def health(self) -> list[MemberHealth]:
        """How each actor is; those that do not answer within seconds are told by name."""
        found = await self._each("status", timeout_s=STATUS_TIMEOUT_S)
        return [
            MemberHealth(member.slot, member.generation, None, _named(status))
            if isinstance(status := found[member.slot], BaseException)
            else MemberHealth(member.slot, member.generation, status)
            for member in self._members
        ]

    async def stop(self) -> None:
        """End every actor."""
        for member in self._members:
            _kill(member)
        self._members = []

    async def _whole(self, change: Coroutine[Any, Any, T]) -> T:
        """Finish what was begun, also where the caller does not wait for it any more."""
        task = asyncio.create_task(change)
        self._begun.add(task)
        task.add_done_callback(self._begun.discard)
        return await asyncio.shield(task)

    def _launched(self) -> Any:
        plan = self._plan
        return launch(num_gpus=plan.num_gpus, num_cpus=plan.num_cpus)

    async def _opened(self, member: Member) -> ActorStatus:
        plan = self._plan
        # Without the encoding: what is tokenised for a pool is tokenised where its callers are.
        ref = member.handle.open.remote(plan.spec, version=self._version, asleep=self._asleep)
        try:
            status = await answer(ref, timeout_s=plan.start_timeout_s, what=f"starting reward actor {member.slot}")
        except RayError as error:
            raise PoolStartError(f"reward actor {member.slot} died at its start: {_first_line(error)}") from None
        assert isinstance(status, ActorStatus)
        return status

    async def _answers(self, member: Member) -> bool:
        try:
            await answer(member.handle.status.remote(), timeout_s=STATUS_TIMEOUT_S, what="a probe")
        except FAILURES:
            return False
        return True

    def _count_restart(self) -> None:
        now = time.monotonic()
        while self._restarts and self._restarts[0] < now - RESTARTS_WITHIN_S:
            self._restarts.popleft()
        if len(self._restarts) >= self._plan.max_restarts:
            raise ActorLostError(
                f"{len(self._restarts)} reward actors died within an hour; no more are started (max_restarts)"
            )
        self._restarts.append(now)

    async def _each(self, method: str, *args: Any, timeout_s: float | None = None) -> dict[int, Any]:
        """The answer of each actor, by slot, or its error."""
        timeout_s = timeout_s or self._plan.start_timeout_s

        async def one(member: Member) -> Any:
            try:
                ref = getattr(member.handle, method).remote(*args)
                return await answer(ref, timeout_s=timeout_s, what=f"{method} of reward actor {member.slot}")
            except FAILURES as error:
                return error

        answers = await asyncio.gather(*map(one, self._members))
        return {member.slot: found for member, found in zip(self._members, answers, strict=True)}

    async def _refuse_unless(self, answers: dict[int, Any], what: str) -> None:
        failures = _failures(answers)
        if failures:
            await self._rolled_back()
            raise WeightsUpdateError(f"{what}, the old weights stay: {_described(failures)}")

    async def _rolled_back(self) -> None:
        """An actor that cannot go back is ended: what replaces it has the old weights."""
        for slot in _failures(await self._each("roll_back_weights")):
            _kill(self._members[slot])

    def _roster(self) -> Roster:
        if not self._members:
            raise RewardPoolError("the pool has no actors: it was stopped, or did not start")
        return Roster(tuple(self._members), self._token_budget)


def _failures(answers: dict[int, Any]) -> dict[int, BaseException]:
    return {slot: found for slot, found in answers.items() if isinstance(found, BaseException)}


def _described(failures: dict[int, BaseException]) -> str:
    return "; ".join(f"reward actor {slot}: {_named(error)}" for slot, error in failures.items())


def _named(error: BaseException) -> str:
    return f"{type(error).__name__}: {_first_line(error)}"


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]


def _kill(member: Member) -> None:
    ray.kill(member.handle)
