"""Calls of actors: awaited for a bounded time, and a lock for calls that must not meet."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import ray
from ray.exceptions import RayError, RayTaskError

from cluster.reward_pool.errors import RewardPoolError, RewardTimeoutError
from serve_app.reward_model import RaywardError

T = TypeVar("T")


async def answer(ref: Any, *, timeout_s: float, what: str) -> Any:
    """The result of the call behind `ref`. Where nobody waits for it any more, the call is cancelled.

    Args:
        ref: the call's object reference.
        timeout_s: the longest to wait.
        what: the call in words, for errors.

    Raises:
        RewardTimeoutError: the time is over.
        RaywardError: as the actor raised it; what it raised of any other kind is a `RewardPoolError`.
        RayError: the actor died or cannot be reached.
    """
    try:
        async with asyncio.timeout(timeout_s):
            return await ref
    except RayTaskError as error:
        if isinstance(error.cause, RaywardError):
            raise error.cause from None
        raise RewardPoolError(f"{what} failed: {type(error.cause).__name__}: {error.cause}") from error
    except TimeoutError:
        _cancel(ref)
        raise RewardTimeoutError(f"{what} took longer than {timeout_s:g} s") from None
    except asyncio.CancelledError:
        _cancel(ref)
        raise


def _cancel(ref: Any) -> None:
    with contextlib.suppress(RayError, ValueError, RuntimeError):  # its actor may be gone, or Ray itself
        ray.cancel(ref, recursive=False)  # a supervisor finishes what it began, with calls of its own


def blocking(work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, for code without an event loop; called on one, that loop stands still meanwhile."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(1, thread_name_prefix="rayward") as thread:
        return thread.submit(asyncio.run, work).result()


class SharedLock:
    """Scoring shares the model; what changes it waits until nobody scores, and has it alone."""

    def __init__(self) -> None:
        self._waiters: set[asyncio.Future[None]] = set()
        self._num_shared = 0
        self._num_wanting = 0
        self._is_held = False

    @asynccontextmanager
    async def shared(self) -> AsyncIterator[None]:
        """Hold it with others; waits while someone holds it alone or wants to."""
        await self._until(lambda: not self._is_held and not self._num_wanting)
        self._num_shared += 1
        try:
            yield
        finally:
            self._num_shared -= 1
            self._wake()

    @asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        """Hold it alone."""
        self._num_wanting += 1
        try:
            await self._until(lambda: not self._is_held and not self._num_shared)
            self._is_held = True
        finally:
            self._num_wanting -= 1
            self._wake()
        try:
            yield
        finally:
            self._is_held = False
            self._wake()

    async def _until(self, is_free: Callable[[], bool]) -> None:
        while not is_free():
            waiter = asyncio.get_running_loop().create_future()
            self._waiters.add(waiter)
            try:
                await waiter
            finally:
                self._waiters.discard(waiter)

    def _wake(self) -> None:
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)
