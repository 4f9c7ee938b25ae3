"""RewardClient: the same calls for threads, run on an event loop in a thread of its own."""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import threading
import weakref
from collections.abc import Callable, Coroutine, Sequence
from types import TracebackType
from typing import Any, TypeVar

from serve_app.client.async_client import DEFAULT_TIMEOUT_S, HEALTH_TIMEOUT_S, AsyncRewardClient
from serve_app.client.batches import Messages, Truncation
from serve_app.client.errors import UnavailableError
from serve_app.client.results import Comparison, ModelInfo, RankedResponse, Ranking, Score

__all__ = ["RewardClient"]

T = TypeVar("T")


class RewardClient:
    """`AsyncRewardClient` for code without an event loop; its arguments, results and errors are the same.

    Several threads may call it at once. A process forked after the first call gets connections of its own.
    """

    def __init__(
        self,
        base_url: str,
        api_key: str | None = None,
        *,
        model: str | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        max_retries: int = 8,
        max_concurrency: int = 8,
        max_conversations_per_request: int = 256,
        max_bytes_per_request: int = 8 * 2**20,
    ) -> None:
        def make() -> AsyncRewardClient:
            return AsyncRewardClient(
                base_url,
                api_key,
                model=model,
                timeout_s=timeout_s,
                max_retries=max_retries,
                max_concurrency=max_concurrency,
                max_conversations_per_request=max_conversations_per_request,
                max_bytes_per_request=max_bytes_per_request,
            )

        self._make = make
        self._unused: AsyncRewardClient | None = make()  # so that a wrong argument is an error here
        self._lock = threading.Lock()
        self._closed = False
        self._thread: _ClientThread | None = None

    def close(self) -> None:
        """Close the connections; calls that other threads have in flight end in `UnavailableError`."""
        with self._lock:
            self._closed = True
            thread, self._thread = self._thread, None
        if thread is not None:
            thread.stop()
            thread.join()

    def __enter__(self) -> RewardClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def score(
        self, conversations: Sequence[Messages], *, truncation: Truncation = "error", timeout_s: float | None = None
    ) -> list[Score]:
        """See `AsyncRewardClient.score`."""
        return self._call(lambda client: client.score(conversations, truncation=truncation, timeout_s=timeout_s))

    def compare(self, first: Messages, second: Messages, *, timeout_s: float | None = None) -> Comparison:
        """See `AsyncRewardClient.compare`."""
        return self._call(lambda client: client.compare(first, second, timeout_s=timeout_s))

    def rank(self, conversations: Sequence[Messages], *, timeout_s: float | None = None) -> Ranking:
        """See `AsyncRewardClient.rank`."""
        return self._call(lambda client: client.rank(conversations, timeout_s=timeout_s))

    def best_of_n(
        self, prompt: Messages, responses: Sequence[str], top_n: int | None = None, *, timeout_s: float | None = None
    ) -> list[RankedResponse]:
        """See `AsyncRewardClient.best_of_n`."""
        return self._call(lambda client: client.best_of_n(prompt, responses, top_n, timeout_s=timeout_s))

    def models(self, *, timeout_s: float | None = None) -> list[ModelInfo]:
        """See `AsyncRewardClient.models`."""
        return self._call(lambda client: client.models(timeout_s=timeout_s))

    def is_healthy(self, *, timeout_s: float = HEALTH_TIMEOUT_S) -> bool:
        """See `AsyncRewardClient.is_healthy`."""
        return self._call(lambda client: client.is_healthy(timeout_s=timeout_s))

    def _call(self, call: Callable[[AsyncRewardClient], Coroutine[Any, Any, T]]) -> T:
        with self._lock:  # so that no call is handed to a thread that `close` has stopped
            future = self._running_thread().submit(call)
        try:
            return future.result()
        except concurrent.futures.CancelledError:
            raise UnavailableError("the client was closed during the call") from None
        except BaseException:
            future.cancel()  # an interrupt of this thread ends the request too
            raise

    def _running_thread(self) -> _ClientThread:
        if self._closed:
            raise RuntimeError("the client is closed")
        if self._thread is None or self._thread.pid != os.getpid():  # threads do not survive a fork
            client, self._unused = self._unused or self._make(), None
            self._thread = _ClientThread(client)
            # A client that is dropped without `close` leaves no thread behind.
            weakref.finalize(self, self._thread.stop).atexit = False
        return self._thread


class _ClientThread:
    """A thread with an event loop and an `AsyncRewardClient` on it, until `stop`."""

    def __init__(self, client: AsyncRewardClient) -> None:
        self.pid = os.getpid()
        self._client = client
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), name="rayward-client", daemon=True)
        self._thread.start()
        self._ready.wait()

    def submit(self, call: Callable[[AsyncRewardClient], Coroutine[Any, Any, T]]) -> concurrent.futures.Future[T]:
        return asyncio.run_coroutine_threadsafe(call(self._client), self._loop)

    def stop(self) -> None:
        """Ask the thread to end, without waiting: the garbage collector may call this in any thread."""
        if self.pid == os.getpid() and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._stopped.set)

    def join(self) -> None:
        if self.pid == os.getpid():
            self._thread.join()

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stopped = asyncio.Event()
        async with self._client:
            self._ready.set()
            await self._stopped.wait()
            calls = asyncio.all_tasks() - {asyncio.current_task()}
            for call in calls:
                call.cancel()
            await asyncio.gather(*calls, return_exceptions=True)
