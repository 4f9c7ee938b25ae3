"""A process's connection to a pool: its supervisor, its actors and how much each has to do; and how a pool comes up."""

from __future__ import annotations

import logging
import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import RayError

from cluster.connect import ClusterResources
from cluster.reward_pool.actor import CALLS_AT_ONCE, NAMESPACE
from cluster.reward_pool.calls import answer, blocking
from cluster.reward_pool.dispatch import Part, dispatch
from cluster.reward_pool.errors import PoolClosedError, PoolStartError, RewardInputError, RewardTimeoutError
from cluster.reward_pool.supervisor import STATUS_TIMEOUT_S, Member, PoolPlan, PoolSupervisor, Roster
from serve_app.batching.wire import ScoreReply, TokenBatch
from serve_app.reward_model.spec import is_uneven

logger = logging.getLogger(__name__)

SUPERVISOR_TIMEOUT_S = 60.0
"""A supervisor answers at once; what takes it long has a bound of its own, and this much more for the messages."""


class PoolConnection:
    """Asks a pool's actors, and its supervisor where an actor failed. Several threads and event loops may use it."""

    def __init__(self, supervisor: Any, plan: PoolPlan, roster: Roster) -> None:
        self.supervisor = supervisor
        self.plan = plan
        self.roster = roster
        self.is_closed = False
        self._members = {member.slot: member for member in roster.members}
        self._tokens_under_way: Counter[int] = Counter()

    async def score(self, batch: TokenBatch, parts: Sequence[Part]) -> list[ScoreReply]:
        """The reply to each part of a batch, in order. The batch is put into Ray's object store once.

        Raises:
            RewardPoolError: the pool sleeps, is gone, or its actors keep dying.
        """
        self._check_open()
        sent = ray.put(batch) if len(parts) > 1 else batch  # a single part takes it along

        async def ask(member: Member, part: Part) -> ScoreReply:
            tokens = batch.num_tokens(part.first, part.stop)
            self._tokens_under_way[member.slot] += tokens
            try:
                what = f"scoring {part.num_sequences} conversations on reward actor {member.slot}"
                ref = member.handle.score_tokens.remote(sent, part.first, part.stop)
                reply: ScoreReply = await answer(ref, timeout_s=self.plan.timeout_s, what=what)
            finally:
                self._tokens_under_way[member.slot] -= tokens
            return reply

        return await dispatch(parts, self, ask)

    def in_turn(self) -> list[int]:
        """The slots, the idlest first as far as this process knows; among equals by chance, as others choose too."""
        slots = list(self._members)
        random.shuffle(slots)
        return sorted(slots, key=self._tokens_under_way.__getitem__)

    def member(self, slot: int) -> Member:
        return self._members[slot]

    async def replace(self, member: Member) -> None:
        """See to it that a member that failed answers or is replaced. Raises `RewardPoolError` where neither comes."""
        if self._members[member.slot].generation == member.generation:
            timeout_s = self.plan.start_timeout_s + STATUS_TIMEOUT_S
            found: Member = await self.ask_supervisor("replace", member.slot, member.generation, timeout_s=timeout_s)
            self._members[member.slot] = found

    async def ask_supervisor(self, method: str, *args: Any, timeout_s: float = 0.0) -> Any:
        """The supervisor's answer. Raises `PoolClosedError` where it is gone."""
        self._check_open()
        try:
            ref = getattr(self.supervisor, method).remote(*args)
            return await answer(ref, timeout_s=timeout_s + SUPERVISOR_TIMEOUT_S, what=f"{method} of the reward pool")
        except RayError as error:
            raise PoolClosedError(
                f"the pool is gone: it was shut down, or the process that made it has ended ({type(error).__name__})"
            ) from None

    def _check_open(self) -> None:
        if self.is_closed:
            raise PoolClosedError("the pool was shut down")


def device_and_gpus(device: str, num_gpus: float | None, resources: ClusterResources) -> tuple[str, float]:
    """The kind of device the actors use, and the GPUs of one.

    Raises:
        RewardInputError: the two do not go together.
    """
    if device == "auto":
        has_gpus = resources.num_gpus > 0 if num_gpus is None else num_gpus > 0
        device = "cuda" if has_gpus else "cpu"
    if num_gpus is None:
        num_gpus = 0.0 if device == "cpu" else 1.0
    if num_gpus < 0 or (device == "cpu") != (num_gpus == 0):
        raise RewardInputError(f"actors on {device} cannot have num_gpus={num_gpus:g}")
    if is_uneven(num_gpus):
        raise RewardInputError(f"num_gpus={num_gpus:g}: an actor takes a part of a GPU, or a whole number of them")
    if num_gpus > 1 and resources.num_gpus and resources.most_gpus < num_gpus:
        logger.warning(
            "actors of %g GPUs each have no place: a node has %d at most; the pool waits for one that has more",
            num_gpus,
            resources.most_gpus,
        )
    return device, num_gpus


def cpus_of_actor(num_cpus: float | None, device: str, num_actors: int, resources: ClusterResources) -> float:
    """The CPUs of one actor: as asked for; else 1 on CUDA, and on CPU a share of half a node's: a trainer needs some.

    Raises:
        RewardInputError: it is negative.
    """
    if num_cpus is not None:
        if num_cpus < 0:
            raise RewardInputError(f"num_cpus is at least 0, not {num_cpus:g}")
        return num_cpus
    if device != "cpu":
        return 1.0
    actors_per_node = -(-num_actors // max(1, resources.num_nodes))
    return float(max(1, resources.node_cpus // 2 // actors_per_node))


def started(plan: PoolPlan, *, name: str | None, detached: bool) -> PoolConnection:
    """Start a pool, and wait until every actor can score.

    Raises:
        PoolStartError: the name is taken, or the actors do not come up in time.
        CheckpointError: the model cannot be loaded.
    """
    _warn_if_full(plan)
    options: dict[str, Any] = {"num_cpus": 0, "max_concurrency": CALLS_AT_ONCE}
    if name is not None:
        options |= {"name": name, "namespace": NAMESPACE}
    if detached:
        options["lifetime"] = "detached"
    try:
        supervisor: Any = ray.remote(PoolSupervisor).options(**options).remote(plan)
    except ValueError as error:
        raise PoolStartError(f"a pool {name!r} cannot be started: {error}; RewardActorPool.attach joins one") from error
    try:
        return blocking(_connected(supervisor, plan, "start"))
    except RewardTimeoutError as error:
        text = f"{error}: {plan.num_actors} actors of {plan.num_cpus:g} CPUs and {plan.num_gpus:g} GPUs each; free are "
        ray.kill(supervisor)
        raise PoolStartError(text + _named(ray.available_resources())) from None
    except BaseException:
        ray.kill(supervisor)
        raise


def attached(name: str) -> PoolConnection:
    """The connection to a running pool. Raises `PoolClosedError` where there is none of that name."""
    try:
        supervisor = ray.get_actor(name, namespace=NAMESPACE)
    except ValueError:
        raise PoolClosedError(f"there is no reward pool named {name!r}") from None

    async def connected() -> PoolConnection:
        plan = await PoolConnection(supervisor, PoolPlan(), Roster((), 1)).ask_supervisor("plan")
        return await _connected(supervisor, plan, "roster")

    return blocking(connected())


async def _connected(supervisor: Any, plan: PoolPlan, method: str) -> PoolConnection:
    """The connection, once the supervisor has answered with its actors."""
    unknown = PoolConnection(supervisor, plan, Roster((), 1))
    roster: Roster = await unknown.ask_supervisor(method, timeout_s=plan.start_timeout_s)
    return PoolConnection(supervisor, plan, roster)


def _warn_if_full(plan: PoolPlan) -> None:
    """Say at once what is waited for: a cluster may grow, so it is no error yet."""
    has = ray.cluster_resources()
    wanted = {"CPU": plan.num_actors * plan.num_cpus, "GPU": plan.num_actors * plan.num_gpus}
    if any(wanted[name] > has.get(name, 0) for name in wanted):
        logger.warning(
            "the pool wants %s and the cluster has %s; it waits for more, up to %g s",
            _named(wanted),
            _named(has),
            plan.start_timeout_s,
        )


def _named(resources: dict[str, float]) -> str:
    return f"{resources.get('CPU', 0):g} CPUs and {resources.get('GPU', 0):g} GPUs"
