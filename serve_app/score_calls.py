"""Calls to one model's replicas, in which small requests that arrive together travel as one.

A call through Serve takes milliseconds of processor time in both processes, more than a small request itself.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from ray.serve.handle import DeploymentHandle

from serve_app.batching.wire import ScoreReply, TokenBatch
from serve_app.replica import RewardReplica

SMALL_TOKENS = 1024
"""A request of more goes alone: it would keep its companions waiting."""
CALL_TOKENS = 4096
"""Tokens of the requests in one call, at most: about what one pass takes, so that they are done together."""
GATHER_S = 0.002
"""While a call is under way, small requests wait so long for company. Otherwise they go at once."""


@dataclass(eq=False, slots=True)
class _Waiting:
    batch: TokenBatch
    timeout_s: float | None
    reply: asyncio.Future[ScoreReply]
    context: contextvars.Context


class ScoreCalls:
    """`RewardReplica.score` of some replica, for requests of one event loop."""

    def __init__(self, replicas: DeploymentHandle[RewardReplica]) -> None:
        self._replicas = replicas
        self._waiting: list[_Waiting] = []
        self._is_due = False
        self._calls: set[asyncio.Task[None]] = set()

    async def score(self, batch: TokenBatch, *, timeout_s: float | None, alone: bool = False) -> ScoreReply:
        """One replica's reply. Cancelling tells the replica, unless it works for others in the same call.

        Args:
            batch: sequences of token ids.
            timeout_s: how long the caller waits for them to begin.
            alone: whether the request travels by itself, such as one that may have killed a replica.
        """
        if alone or batch.num_tokens() > SMALL_TOKENS:
            reply: ScoreReply = await _answer(self._replicas.score.remote(batch, timeout_s=timeout_s))
            return reply
        loop = asyncio.get_running_loop()
        waiting = _Waiting(batch, timeout_s, loop.create_future(), contextvars.copy_context())
        self._waiting.append(waiting)
        if not self._is_due:
            self._is_due = True
            if self._calls:
                loop.call_later(GATHER_S, self._send)
            else:
                loop.call_soon(self._send)
        return await waiting.reply

    def _send(self) -> None:
        self._is_due = False
        waiting, self._waiting = self._waiting, []
        for group in _groups(each for each in waiting if not each.reply.done()):
            # Serve cancels the calls of a request whose client hangs up, by its context: a call of several has none.
            context = group[0].context if len(group) == 1 else contextvars.Context()
            task = asyncio.get_running_loop().create_task(self._call(group), context=context)
            self._calls.add(task)
            task.add_done_callback(self._calls.discard)
            for each in group:
                each.reply.add_done_callback(_cancels(task, group))

    async def _call(self, group: list[_Waiting]) -> None:
        try:
            if len(group) == 1:
                only = group[0]
                replies = [await _answer(self._replicas.score.remote(only.batch, timeout_s=only.timeout_s))]
            else:
                batches, timeouts = [each.batch for each in group], [each.timeout_s for each in group]
                replies = await _answer(self._replicas.score_each.remote(batches, timeouts))
        except asyncio.CancelledError:
            for each in group:
                each.reply.cancel()
            raise
        except Exception as error:
            for each in group:
                if not each.reply.done():
                    each.reply.set_exception(error)
            return
        for each, reply in zip(group, replies, strict=True):
            if not each.reply.done():
                each.reply.set_result(reply)


def _cancels(task: asyncio.Task[None], group: list[_Waiting]) -> Callable[[asyncio.Future[ScoreReply]], None]:
    """What ends a call once nobody in it waits any more."""

    def cancel(_: asyncio.Future[ScoreReply]) -> None:
        if all(each.reply.cancelled() for each in group):
            task.cancel()

    return cancel


def _groups(waiting: Iterable[_Waiting]) -> Iterator[list[_Waiting]]:
    group: list[_Waiting] = []
    tokens = 0
    for each in waiting:
        tokens += each.batch.num_tokens()
        if group and tokens > CALL_TOKENS:
            yield group
            group, tokens = [], each.batch.num_tokens()
        group.append(each)
    if group:
        yield group


async def _answer(response: Any) -> Any:
    """The answer of a handle's call. Where nobody waits for it any more, the replica is told."""
    try:
        return await response
    except asyncio.CancelledError:
        response.cancel()
        raise
