"""What a process knows of a pool: its keeper, its actors and how much each has to do for this process."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import RayError

from cluster.reward_pool.dispatch import Part, dispatch
from cluster.reward_pool.errors import PoolClosedError
from cluster.reward_pool.keeper import PROBE_TIMEOUT_S, Member, PoolPlan, Roster
from cluster.reward_pool.remote_call import answer
from cluster.reward_pool.token_batch import ScoreReply, TokenBatch

__all__ = ["PoolConnection"]

# A keeper answers at once; what takes it long has a bound of its own, and this much more for the messages.
KEEPER_TIMEOUT_S = 60.0


class PoolConnection:
    """Asks a pool's actors, and its keeper where an actor failed. Several threads and event loops may use it."""

    def __init__(self, keeper: Any, plan: PoolPlan, roster: Roster) -> None:
        self.keeper = keeper
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
            tokens = int(batch.starts[part.stop] - batch.starts[part.first])
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
            timeout_s = self.plan.start_timeout_s + PROBE_TIMEOUT_S
            found: Member = await self.ask_keeper("replace", member.slot, member.generation, timeout_s=timeout_s)
            self._members[member.slot] = found

    async def ask_keeper(self, method: str, *args: Any, timeout_s: float = 0.0) -> Any:
        """What the keeper answers. Raises `PoolClosedError` where it is gone."""
        self._check_open()
        try:
            ref = getattr(self.keeper, method).remote(*args)
            return await answer(ref, timeout_s=timeout_s + KEEPER_TIMEOUT_S, what=f"{method} of the reward pool")
        except RayError as error:
            raise PoolClosedError(
                f"the pool is gone: it was shut down, or the process that made it has ended ({type(error).__name__})"
            ) from None

    def _check_open(self) -> None:
        if self.is_closed:
            raise PoolClosedError("the pool was shut down")
