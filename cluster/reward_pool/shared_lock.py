"""SharedLock: many readers or one writer on one event loop; a writer that waits goes before readers that come later."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

__all__ = ["SharedLock"]


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
