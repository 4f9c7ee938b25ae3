"""A rayward endpoint as a source of rewards: for trainers whose processes are no part of the reward model's cluster."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from typing import Any

from cluster.rlhf.errors import RewardSourceError
from cluster.rlhf.reward_source import Messages, OnError
from serve_app.client import RewardClient
from serve_app.client.errors import InvalidRequestError, RewardClientError
from serve_app.reward_model import ConversationError

__all__ = ["HttpRewardSource"]

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
