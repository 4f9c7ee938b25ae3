"""Sources of rewards: actors on Ray, a model in this process, or an endpoint over HTTP, behind one face."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

from cluster.rlhf.errors import RewardSourceError
from serve_app.client import RewardClient
from serve_app.client.errors import InvalidRequestError, RewardClientError
from serve_app.reward_model import ConversationError, RewardModel, ScoringError

URL_VARIABLE = "RAYWARD_URL"
POOL_VARIABLE = "RAYWARD_POOL"

Messages: TypeAlias = Sequence[Mapping[str, str]] | Mapping[str, Any]
"""A conversation: messages with `role` and `content`, the last one the response; or a mapping with such `messages` and
the `reference` that a POLAR model compares the response with.
"""
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


DEFAULT_TIMEOUT_S = 600.0
PLACE = re.compile(r"conversations\[(\d+)\]")


class HttpRewardSource:
    """Scores at the endpoint at `url`. Pickles; each process opens connections of its own at its first call.

    The API key is the environment's RAYWARD_API_KEY, so that it is in no pickle.

    Args:
        url: where the endpoint is, as in `http://127.0.0.1:8000`.
        model: which of the served models scores; the endpoint's first where it is None.
        timeout_s: how long one call may take in all.
    """

    def __init__(self, url: str, *, model: str | None = None, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        self._options: dict[str, Any] = {"model": model, "timeout_s": timeout_s}
        self._url = url
        self._client: RewardClient | None = self._connected()  # so that a wrong argument is an error here

    def __getstate__(self) -> dict[str, Any]:
        return {"_url": self._url, "_options": self._options, "_client": None}

    def score(self, conversations: Sequence[Messages], *, on_error: OnError = "raise") -> list[float | None]:
        """See `RewardSource.score`. With "null", what the endpoint refuses is left out and the rest sent again.

        Raises:
            ConversationError: the endpoint refuses a conversation, whose place is `error.index`.
            RewardSourceError: the endpoint cannot be reached in time, or wants another key.
        """
        rewards: list[float | None] = [None] * len(conversations)
        places = list(range(len(conversations)))
        while places:  # one less each time
            try:
                scores = self._opened().score([conversations[place] for place in places])
            except InvalidRequestError as error:
                refused = _refused(error, len(places))
                if on_error == "raise":
                    raise _conversation_error(error, places[refused]) from error
                del places[refused]
                continue
            except RewardClientError as error:
                raise RewardSourceError(f"{self._url} gives no rewards: {error}") from error
            for place, score in zip(places, scores, strict=True):
                rewards[place] = score.value
            break
        return rewards

    async def score_async(
        self, conversations: Sequence[Messages], *, on_error: OnError = "raise"
    ) -> list[float | None]:
        """See `RewardSource.score_async`."""
        return await asyncio.to_thread(self.score, conversations, on_error=on_error)

    def close(self) -> None:
        """Close this process's connections."""
        if self._client is not None:
            self._client.close()
            self._client = None

    def _connected(self) -> RewardClient:
        try:
            return RewardClient(self._url, **self._options)
        except (ValueError, RewardClientError) as error:
            raise RewardSourceError(f"{self._url!r} is no address of an endpoint: {error}") from error

    def _opened(self) -> RewardClient:
        if self._client is None:
            self._client = self._connected()
        return self._client


def _refused(error: InvalidRequestError, num_sent: int) -> int:
    """The place of the conversation that the endpoint refuses, among those sent."""
    match = PLACE.match(error.param or "")
    if match is not None and int(match[1]) < num_sent:
        return int(match[1])
    raise RewardSourceError(f"the endpoint refuses the request: {error}") from error


def _conversation_error(error: InvalidRequestError, index: int) -> ConversationError:
    refused = ConversationError(f"the endpoint refuses it: {error.message}")
    refused.index = index
    return refused
