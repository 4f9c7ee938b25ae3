"""The answer to a call of an actor: awaited for a bounded time, with the error that the actor raised."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import ray
from ray.exceptions import RayError, RayTaskError

from cluster.reward_pool.errors import RewardPoolError, RewardTimeoutError
from serve_app.reward_model import RaywardError

__all__ = ["answer", "blocking"]

T = TypeVar("T")


async def answer(ref: Any, *, timeout_s: float, what: str) -> Any:
    """What the call behind `ref` returns. Where nobody waits for it any more, the call is cancelled.

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
        ray.cancel(ref, recursive=False)  # a keeper finishes what it began, with calls of its own


def blocking(work: Coroutine[Any, Any, T]) -> T:
    """What `work` returns, for code without an event loop; called on one, that loop stands still meanwhile."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(1, thread_name_prefix="rayward") as thread:
        return thread.submit(asyncio.run, work).result()
