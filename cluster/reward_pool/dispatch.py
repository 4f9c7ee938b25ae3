"""The parts of one batch -> the reward actors of a pool: a few under way at each, and again where an actor dies.

Every batch keeps few parts waiting at an actor, so that batches of several callers take turns there. Whichever actor
is free takes the next part; results keep their places.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from ray.exceptions import RayError

from cluster.reward_pool.errors import ActorLostError, RewardTimeoutError
from cluster.reward_pool.supervisor import Member
from serve_app.batching.errors import BatcherStalledError, ForwardError, QueueFullError
from serve_app.batching.wire import ScoreReply
from serve_app.reward_model import RaywardError

logger = logging.getLogger(__name__)

PARTS_PER_ACTOR = 2
"""Parts of one batch that an actor has at once: one that it scores, and one that waits so that it need not."""
MAX_PART_RETRIES = 2
MAX_BUSY_ANSWERS = 120
RETRIED = (RayError, RewardTimeoutError, BatcherStalledError, ForwardError)


@dataclass(frozen=True, slots=True)
class Part:
    """Sequences `first` to `stop` - 1 of a batch, in the order in which it travels."""

    first: int
    stop: int

    @property
    def num_sequences(self) -> int:
        return self.stop - self.first


class Actors(Protocol):
    """The actors of a pool, as a dispatch needs them."""

    def in_turn(self) -> Sequence[int]:
        """The slots, the idlest first."""
        ...

    def member(self, slot: int) -> Member:
        """The member that is in a slot now."""
        ...

    async def replace(self, member: Member) -> None:
        """See to it that a member that failed answers or is replaced. Raises `RaywardError` where neither comes."""
        ...


Ask = Callable[[Member, Part], Awaitable[ScoreReply]]


async def dispatch(parts: Sequence[Part], actors: Actors, ask: Ask) -> list[ScoreReply]:
    """The reply to each part, in order.

    Raises:
        ActorLostError: actors died over one part time and again, or none is left.
        RaywardError: as an actor answers for a whole part.
    """
    return await _Dispatch(parts, actors, ask).run() if parts else []


class _Dispatch:
    def __init__(self, parts: Sequence[Part], actors: Actors, ask: Ask) -> None:
        self._parts = parts
        self._actors = actors
        self._ask = ask
        self._replies: dict[int, ScoreReply] = {}
        self._num_failures = [0] * len(parts)
        self._failed: set[tuple[int, int]] = set()
        self._waiting: asyncio.Queue[int] = asyncio.Queue()
        self._finished: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._last_error: RaywardError = ActorLostError("no reward actor of the pool is left")

    async def run(self) -> list[ScoreReply]:
        for place in range(len(self._parts)):
            self._waiting.put_nowait(place)
        slots = [slot for _ in range(PARTS_PER_ACTOR) for slot in self._actors.in_turn()]
        workers = [asyncio.create_task(self._work(slot)) for slot in slots]
        everyone = asyncio.gather(*workers, return_exceptions=True)
        everyone.add_done_callback(lambda _: self._fail(self._last_error))
        try:
            await self._finished
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.wait(workers)
        return [self._replies[place] for place in range(len(self._parts))]

    async def _work(self, slot: int) -> None:
        """Take part after part to the actor in a slot, until the batch is done or nobody can be had for the slot."""
        try:
            while True:
                await self._see_to(slot)
                place = await self._waiting.get()
                member = self._actors.member(slot)
                if (member.slot, member.generation) in self._failed:  # meanwhile, with another part
                    self._waiting.put_nowait(place)
                elif not await self._scored(place, member):
                    self._failed.add((member.slot, member.generation))
        except RaywardError as error:
            logger.warning("reward actor %d is given up for this batch: %s", slot, error)
            self._last_error = error

    async def _see_to(self, slot: int) -> None:
        """Where who is in the slot failed, wait until that one answers or another is there."""
        member = self._actors.member(slot)
        failed = (member.slot, member.generation)
        if failed in self._failed:
            await self._actors.replace(member)
            self._failed.discard(failed)

    async def _scored(self, place: int, member: Member) -> bool:
        """Whether the member scored a part. If it failed, the part waits for whoever is free, a few times at most."""
        part = self._parts[place]
        try:
            self._replies[place] = await self._asked(member, part)
        except RETRIED as error:
            self._note_failure(place, member, error)
            return False
        except Exception as error:
            self._fail(error)
            return True
        if len(self._replies) == len(self._parts) and not self._finished.done():
            self._finished.set_result(None)
        return True

    async def _asked(self, member: Member, part: Part) -> ScoreReply:
        """One reply. An actor that has too much to do refuses, and is asked again."""
        for _ in range(MAX_BUSY_ANSWERS):
            try:
                return await self._ask(member, part)
            except QueueFullError as error:
                await asyncio.sleep(error.retry_after_s)
        return await self._ask(member, part)

    def _note_failure(self, place: int, member: Member, error: Exception) -> None:
        num_sequences = self._parts[place].num_sequences
        self._num_failures[place] += 1
        if self._num_failures[place] <= MAX_PART_RETRIES:
            text = "reward actor %d failed (%s); its part of %d conversations is asked for again"
            logger.warning(text, member.slot, type(error).__name__, num_sequences)
            self._waiting.put_nowait(place)
        elif isinstance(error, RayError):
            reason = str(error).strip().partition("\n")[0]
            died = f"{self._num_failures[place]} actors died over the same part of {num_sequences} conversations"
            self._fail(ActorLostError(f"{died}: {reason}"))
        else:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        if not self._finished.done():
            self._finished.set_exception(error)
