"""Calls to the replicas of a Serve deployment: a few under way at once, asked again where that may help.

A replica that is busy or gone is asked again, elsewhere, for as long as the deployment makes progress. Where a replica
dies, the calls that it had are suspects: each is made again while no other is under way, and halved each time that a
replica dies on it, until a single row is found guilty.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager
from typing import Any

from jobs.errors import ScorerError
from jobs.runs.attempts import Attempts
from jobs.scoring.stage import DeadRowError
from serve_app.batching.wire import ScoreReply, TokenBatch
from serve_app.reward_model import ScoringError
from serve_app.reward_model.scores import Outputs

logger = logging.getLogger(__name__)

Outcomes = list[Outputs | ScoringError]

# Calls that a replica has at once: one runs, the others wait, so that it never does. Clients of the endpoint that come
# after them wait for these too.
CALLS_PER_REPLICA = 3
COUNT_EVERY_S = 10.0
REPLY_TIMEOUT_S = 600.0
NO_PROGRESS_S = 900.0
MAX_FAILURES = 3
PAUSE_S = 1.0


def num_replicas(app: str, deployment: str) -> int:
    """Replicas of a deployment that run now."""
    from ray import serve

    found = serve.status().applications.get(app)
    if found is None or deployment not in found.deployments:
        return 0
    return sum(count for state, count in found.deployments[deployment].replica_states.items() if state == "RUNNING")


class CallGate:
    """Lets `limit` calls in at once, or one that has to be alone."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.num_inside = 0
        self._num_lone = 0
        self._lone_turn = asyncio.Lock()
        self._changed = asyncio.Condition()

    @asynccontextmanager
    async def shared(self) -> AsyncIterator[None]:
        """One of at most `limit`; waits while one that has to be alone is inside or waits."""
        async with self._changed:
            await self._changed.wait_for(lambda: self.num_inside < self.limit and not self._num_lone)
            self.num_inside += 1
        try:
            yield
        finally:
            await self._leave()

    @asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        """Inside, nothing else is."""
        self._num_lone += 1
        try:
            async with self._lone_turn:
                async with self._changed:
                    await self._changed.wait_for(lambda: not self.num_inside)
                yield
        finally:
            self._num_lone -= 1
            async with self._changed:
                self._changed.notify_all()

    async def _leave(self) -> None:
        self.num_inside -= 1
        async with self._changed:
            self._changed.notify_all()


class ReplicaCalls:
    """Asks the replicas of a deployment that have the model of `key`, from a thread of its own.

    `num_callers` is how many processes ask; they share what replicas take at once. `processors` are the kinds that
    answers were computed on.
    """

    def __init__(self, app: str, deployment: str, key: str, *, num_callers: int, handle: Any = None) -> None:
        from ray import serve

        self._app, self._deployment, self._key, self._num_callers = app, deployment, key, num_callers
        self._replicas = handle or serve.get_deployment_handle(deployment, app)
        self.processors: set[str] = set()
        self._gate = CallGate(CALLS_PER_REPLICA)
        self._counted_at = -math.inf
        self._progressed_at = time.monotonic()
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="replica-calls", daemon=True).start()

    def submit(self, sequences: Sequence[list[int]]) -> Future[Outcomes]:
        """The outcomes of sequences of token ids, in order, once replicas have scored them.

        The future raises:
            ScorerError: the replicas make no progress, keep dying, or have another model.
        """
        self._count_replicas()
        return asyncio.run_coroutine_threadsafe(self._outcomes(sequences), self._loop)

    def _count_replicas(self) -> None:
        """Follow the deployment as it grows and shrinks."""
        now = time.monotonic()
        if now - self._counted_at > COUNT_EVERY_S:
            self._counted_at = now
            share = CALLS_PER_REPLICA * num_replicas(self._app, self._deployment) / self._num_callers
            self._gate.limit = max(2, math.ceil(share))

    async def _outcomes(self, sequences: Sequence[list[int]]) -> Outcomes:
        import ray

        async with self._gate.shared():
            if self._gate.num_inside == 1:
                self._progressed_at = time.monotonic()
            try:
                return await self._answer(sequences)
            except ray.exceptions.RayActorError as error:
                logger.warning("a replica died with %d sequences: %s", len(sequences), type(error).__name__)
        async with self._gate.alone():
            self._progressed_at = time.monotonic()
            return await self._halved(sequences)

    async def _halved(self, sequences: Sequence[list[int]]) -> Outcomes:
        """The outcomes of suspects; what a replica dies on is halved, and a row on which it died twice is given up."""
        import ray

        attempts = Attempts.of(len(sequences))
        found: dict[int, Outputs | ScoringError] = {}
        index = 0
        while index < len(attempts.ranges):
            attempts.current = index
            first, stop = attempts.ranges[index]
            try:
                found |= enumerate(await self._answer(sequences[first:stop]), start=first)
                index += 1
            except ray.exceptions.RayActorError:
                attempts.after_death()
        found |= {row: DeadRowError.after(attempts.strikes[row]) for row in attempts.given_up}
        return [found[row] for row in range(len(sequences))]

    async def _answer(self, sequences: Sequence[list[int]]) -> Outcomes:
        """A replica's outcomes of the sequences, however often it has to be asked.

        Raises:
            RayActorError: the replica died with them.
            ScorerError: as `submit` says.
        """
        batch = TokenBatch.of(sequences)
        num_failures = 0
        while True:
            reply, pause_s = await self._ask(batch)
            if reply is not None and reply.failure is None:
                self._progressed_at = time.monotonic()
                self.processors.add(reply.processor)
                return reply.outputs()
            num_failures += reply is not None
            if reply is not None and num_failures == MAX_FAILURES:
                raise ScorerError(f"the model of {self._app} fails on {len(sequences)} sequences: {reply.failure}")
            waited_s = time.monotonic() - self._progressed_at
            if waited_s > NO_PROGRESS_S:
                raise ScorerError(f"the replicas of {self._deployment} took on nothing for {waited_s:.0f} seconds")
            await asyncio.sleep(pause_s)

    async def _ask(self, batch: TokenBatch) -> tuple[ScoreReply | None, float]:
        """A replica's scores or failure, or None, and the seconds to wait before it is asked again."""
        from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

        response = self._replicas.score.remote(batch, key=self._key)
        try:
            async with asyncio.timeout(REPLY_TIMEOUT_S):
                reply: ScoreReply = await response
        except (BackPressureError, DeploymentUnavailableError, TimeoutError) as error:
            response.cancel()
            logger.warning("%s is asked again: %s", self._deployment, type(error).__name__)
            return None, PAUSE_S
        except asyncio.CancelledError:
            response.cancel()
            raise
        if reply.refusal is None:
            return reply, PAUSE_S
        if reply.refusal.reason == "another_model":
            raise ScorerError(
                f"{self._app} serves another model than when the job began; what is committed stays: resume the job "
                "once the former model is back, or choose another --output"
            )
        return None, float(reply.refusal.retry_after_s)
