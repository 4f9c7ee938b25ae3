"""Where adapters get rewards from: actors on Ray, a model in this process, or an endpoint over HTTP, behind one face.

An adapter makes conversations of what its trainer hands over (`rollout_reader.py`) and asks a source for their scores.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

from cluster.rlhf.errors import RewardSourceError
from serve_app.reward_model import RewardModel, ScoringError

__all__ = [
    "LocalRewardSource",
    "Messages",
    "OnError",
    "RewardSource",
    "as_reward_source",
    "pool_named",
    "reward_source_from_environment",
]

URL_VARIABLE = "RAYWARD_URL"
POOL_VARIABLE = "RAYWARD_POOL"

Messages: TypeAlias = Sequence[Mapping[str, str]]
"""A conversation: messages with `role` and `content`, the last one the response."""
OnError: TypeAlias = Literal["raise", "null"]
"""A conversation that cannot be scored fails its batch, or has None for a reward and the others theirs."""


@runtime_checkable
class RewardSource(Protocol):
    """Scores conversations: one raw logit each, in order."""

    def score(self, conversations: Sequence[Messages], *, on_error: OnError = "raise") -> list[float | None]:
        """One score per conversation; None only where `on_error` is "null". Raises a `RaywardError`."""
        ...

    async def score_async(
        self, conversations: Sequence[Messages], *, on_error: OnError = "raise"
    ) -> list[float | None]:
        """`score` for an event loop: any loop, also a new one for each call."""
        ...


class LocalRewardSource:
    """A `RewardModel` of this process as a source. Asynchronous calls share one thread, in order."""

    def __init__(self, model: RewardModel) -> None:
        self._model = model
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="rewards")

    def score(self, conversations: Sequence[Messages], *, on_error: OnError = "raise") -> list[float | None]:
        """See `RewardSource.score`."""
        outcomes = self._model.outcomes(conversations)
        failed = next((outcome for outcome in outcomes if isinstance(outcome, ScoringError)), None)
        if failed is not None and on_error == "raise":
            raise failed
        return [None if isinstance(outcome, ScoringError) else outcome.value for outcome in outcomes]

    async def score_async(
        self, conversations: Sequence[Messages], *, on_error: OnError = "raise"
    ) -> list[float | None]:
        """See `RewardSource.score_async`."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, lambda: self.score(conversations, on_error=on_error))


def as_reward_source(source: Any) -> RewardSource:
    """`source` itself if it is one, else a `RewardModel`, or an endpoint's address, as one.

    Raises:
        RewardSourceError: it is none of these.
    """
    if isinstance(source, RewardModel):
        return LocalRewardSource(source)
    if isinstance(source, str):
        from cluster.rlhf.http_source import HttpRewardSource

        return HttpRewardSource(source)
    if isinstance(source, RewardSource):
        return source
    raise RewardSourceError(
        "rewards come from a RewardActorPool, a RewardModel, the address of an endpoint, or anything with score and "
        f"score_async; {type(source).__name__} is none of these"
    )


def reward_source_from_environment() -> RewardSource:
    """The source that the environment names, for trainers that load a file and pass it no options.

    `RAYWARD_URL` is the address of an endpoint; `RAYWARD_POOL` the name of a detached `RewardActorPool`.

    Raises:
        RewardSourceError: neither or both of them are set.
        PoolClosedError: there is no such pool.
    """
    url, pool = os.environ.get(URL_VARIABLE), os.environ.get(POOL_VARIABLE)
    if bool(url) == bool(pool):
        found = "both" if url else "neither"
        raise RewardSourceError(
            f"{found} of {URL_VARIABLE} and {POOL_VARIABLE} are set; set {URL_VARIABLE} to the address of a rayward "
            f"endpoint, or {POOL_VARIABLE} to the name of a detached RewardActorPool, on every node"
        )
    if url:
        return as_reward_source(url)
    return pool_named(str(pool))


def pool_named(name: str) -> RewardSource:
    """The detached `RewardActorPool` of that name. Raises PoolClosedError where there is none."""
    from cluster.reward_pool.pool import RewardActorPool

    return RewardActorPool.attach(name)
