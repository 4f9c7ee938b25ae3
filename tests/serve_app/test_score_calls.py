"""Small requests that arrive together travel in one call, and harm each other in no way."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Coroutine, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from serve_app.batching.wire import ScoreReply, TokenBatch
from serve_app.score_calls import CALL_TOKENS, SMALL_TOKENS, ScoreCalls

CLIENT: contextvars.ContextVar[str] = contextvars.ContextVar("client", default="nobody")


class Replicas:
    """A Serve handle's stand-in: a sequence's score is its length, given once `gate` is open."""

    def __init__(self) -> None:
        self.calls: list[list[int]] = []
        self.timeouts: list[float | None] = []
        self.clients: list[str] = []
        self.cancelled = 0
        self.fails: Exception | None = None
        self.gate = asyncio.Event()
        self.score = SimpleNamespace(remote=self._score)
        self.score_each = SimpleNamespace(remote=self._score_each)

    def _score(self, batch: TokenBatch, *, timeout_s: float | None) -> asyncio.Future[ScoreReply]:
        async def first() -> ScoreReply:
            (reply,) = await self._replies([batch], [timeout_s])
            return reply

        return asyncio.ensure_future(first())

    def _score_each(
        self, batches: Sequence[TokenBatch], timeouts_s: Sequence[float | None]
    ) -> asyncio.Future[list[ScoreReply]]:
        return asyncio.ensure_future(self._replies(batches, timeouts_s))

    async def _replies(self, batches: Sequence[TokenBatch], timeouts_s: Sequence[float | None]) -> list[ScoreReply]:
        self.calls.append([batch.num_tokens() for batch in batches])
        self.timeouts += timeouts_s
        self.clients.append(CLIENT.get())
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self.fails is not None:
            raise self.fails
        return [ScoreReply(batch.lengths.astype(np.float32)) for batch in batches]


def asked(calls: ScoreCalls, length: int, **options: Any) -> asyncio.Task[ScoreReply]:
    options = {"timeout_s": None} | options
    return asyncio.create_task(calls.score(TokenBatch.of([[1] * length]), **options))


async def until_called(replicas: Replicas, number: int) -> None:
    async with asyncio.timeout(60):
        while len(replicas.calls) < number:
            await asyncio.sleep(0.001)


def run(main: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(main, 120))


def test_those_that_arrive_together_travel_as_one_and_each_has_its_own_reply() -> None:
    async def main() -> None:
        replicas = Replicas()
        calls = ScoreCalls(replicas)  # type: ignore[arg-type]
        replicas.gate.set()
        replies = await asyncio.gather(asked(calls, 5, timeout_s=7.0), asked(calls, 6), asked(calls, 7))
        assert [reply.outcomes() for reply in replies] == [[5.0], [6.0], [7.0]]
        assert (replicas.calls, replicas.timeouts) == ([[5, 6, 7]], [7.0, None, None])

    run(main())


def test_while_a_call_is_under_way_others_gather() -> None:
    async def main() -> None:
        replicas = Replicas()
        calls = ScoreCalls(replicas)  # type: ignore[arg-type]
        first = asked(calls, 1)
        await until_called(replicas, 1)
        second = asked(calls, 2)
        await asyncio.sleep(0)
        third = asked(calls, 3)
        await until_called(replicas, 2)
        assert replicas.calls == [[1], [2, 3]]
        replicas.gate.set()
        await asyncio.gather(first, second, third)

    run(main())


def test_a_call_that_is_full_goes_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long others would wait for company."""
    monkeypatch.setattr("serve_app.score_calls.MAX_GATHER_S", 3600.0)

    async def main() -> None:
        replicas = Replicas()
        calls = ScoreCalls(replicas)  # type: ignore[arg-type]
        calls._call_s = 4 * 3600.0
        first = asked(calls, 1)
        await until_called(replicas, 1)
        others = [asked(calls, SMALL_TOKENS) for _ in range(CALL_TOKENS // SMALL_TOKENS)]
        await until_called(replicas, 2)
        assert replicas.calls[1] == [SMALL_TOKENS] * (CALL_TOKENS // SMALL_TOKENS)
        replicas.gate.set()
        await asyncio.gather(first, *others)
        assert calls._call_s < 4 * 3600.0

    run(main())


def test_a_large_one_and_one_that_failed_before_go_alone() -> None:
    async def main() -> None:
        replicas = Replicas()
        replicas.gate.set()
        calls = ScoreCalls(replicas)  # type: ignore[arg-type]
        await asyncio.gather(
            asked(calls, 3), asked(calls, SMALL_TOKENS + 1), asked(calls, 4, alone=True), asked(calls, 5)
        )
        assert sorted(replicas.calls) == [[3, 5], [4], [SMALL_TOKENS + 1]]
        many = [asked(calls, SMALL_TOKENS) for _ in range(2 * CALL_TOKENS // SMALL_TOKENS)]
        await asyncio.gather(*many)
        assert replicas.calls[-2:] == [[SMALL_TOKENS] * (CALL_TOKENS // SMALL_TOKENS)] * 2

    run(main())


def test_who_hangs_up_takes_no_other_along_and_the_last_one_ends_the_call() -> None:
    async def main() -> None:
        replicas = Replicas()
        calls = ScoreCalls(replicas)  # type: ignore[arg-type]
        first, second = asked(calls, 1), asked(calls, 2)
        await until_called(replicas, 1)
        first.cancel()
        await asyncio.sleep(0.01)
        assert (first.cancelled(), second.done(), replicas.cancelled) == (True, False, 0)
        second.cancel()
        await asyncio.wait([first, second])
        async with asyncio.timeout(60):
            while not replicas.cancelled:
                await asyncio.sleep(0.001)
        third = asked(calls, 3)
        replicas.gate.set()
        assert (await third).outcomes() == [3.0]

    run(main())


def test_a_call_of_several_belongs_to_none_of_their_clients() -> None:
    """Serve cancels what was called for a client who hangs up, which it finds by the context."""

    async def client(calls: ScoreCalls, name: str) -> None:
        CLIENT.set(name)
        await asked(calls, 1)

    async def main() -> None:
        replicas = Replicas()
        replicas.gate.set()
        calls = ScoreCalls(replicas)  # type: ignore[arg-type]
        await asyncio.create_task(client(calls, "lone"))
        await asyncio.gather(client(calls, "first"), client(calls, "second"))
        assert replicas.clients == ["lone", "nobody"]

    run(main())


def test_an_error_of_the_call_is_each_one_s() -> None:
    async def main() -> None:
        replicas = Replicas()
        replicas.fails = ConnectionError("the replica died")
        replicas.gate.set()
        calls = ScoreCalls(replicas)  # type: ignore[arg-type]
        tasks = [asked(calls, 1), asked(calls, 2)]
        for task in tasks:
            with pytest.raises(ConnectionError):
                await task

    run(main())
