"""Calls to one model's replicas, in which small requests that arrive together travel as one.

A call through Serve takes milliseconds of processor time in both processes, more than a small request itself.
"""

from __future__ import annotations

import asyncio
import contextvars
import time
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
GATHER_SHARE, MAX_GATHER_S = 0.25, 0.05
"""While a call is under way, small requests wait for company: this share of what calls take, at most so many seconds.
Otherwise they go at once."""
FIRST_CALL_S, CALLS_AVERAGED = 0.008, 8
"""What a call is taken to last before one has ended, and over how many that is smoothed, roughly."""


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
        self._num_tokens = 0
        self._due: asyncio.Handle | None = None
        self._calls: set[asyncio.Task[None]] = set()
        self._call_s = FIRST_CALL_S

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
        before, self._num_tokens = self._num_tokens, self._num_tokens + batch.num_tokens()
        if self._due is None:
            wait_s = min(MAX_GATHER_S, GATHER_SHARE * self._call_s) if self._calls else 0.0
            self._due = loop.call_later(wait_s, self._send) if wait_s else loop.call_soon(self._send)
        elif before < CALL_TOKENS <= self._num_tokens:
            self._due.cancel()
            self._due = loop.call_soon(self._send)
        return await waiting.reply

    def _send(self) -> None:
        waiting, self._waiting, self._num_tokens, self._due = self._waiting, [], 0, None
        for group in _groups(each for each in waiting if not each.reply.done()):
            # Serve cancels the calls of a request whose client hangs up, by its context: a call of several has none.
            context = group[0].context if len(group) == 1 else contextvars.Context()
            task = asyncio.get_running_loop().create_task(self._call(group), context=context)
            self._calls.add(task)
            task.add_done_callback(self._calls.discard)
            for each in group:
                each.reply.add_done_callback(_cancels(task, group))

    async def _call(self, group: list[_Waiting]) -> None:
        started = time.monotonic()
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
        self._call_s += (time.monotonic() - started - self._call_s) / CALLS_AVERAGED
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
