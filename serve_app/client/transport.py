"""One request, tried again where that can help. It knows HTTP and nothing of scores."""

from __future__ import annotations

import asyncio
import random
from asyncio import sleep
from typing import Any

import httpx

from serve_app.client.answers import read_json
from serve_app.client.errors import (
    MalformedAnswerError,
    RewardClientError,
    UnavailableError,
    error_of_answer,
)

__all__ = ["Transport"]

FIRST_BACKOFF_S = 0.25
LONGEST_BACKOFF_S = 8.0
CONNECT_TIMEOUT_S = 10.0
MAX_TIMEOUT_S = 86_400.0  # the longest that the server takes
LOST = (httpx.NetworkError, httpx.RemoteProtocolError, httpx.TimeoutException, httpx.ProxyError)
"""The server was not reached or its answer broke off: the same request may do better."""


class Transport:
    """HTTP to one server, with at most `max_concurrency` requests in flight. It belongs to one event loop.

    Every request may be repeated: scoring changes nothing at the server.
    """

    def __init__(self, base_url: str, api_key: str | None, *, max_retries: int, max_concurrency: int) -> None:
        url = httpx.URL(base_url)
        if url.scheme not in ("http", "https") or not url.host:
            raise ValueError(f"base_url begins with http:// or https:// and a host; got {base_url!r}")
        headers = {"User-Agent": "rayward-client", "Accept": "application/json"}
        if api_key:
            if not (api_key.isascii() and api_key.isprintable()) or api_key != api_key.strip():
                raise ValueError(
                    "api_key holds a character that no HTTP header may carry, or begins or ends in a space"
                )
            headers["Authorization"] = f"Bearer {api_key}"
        self._max_retries = max_retries
        self._slots = asyncio.Semaphore(max_concurrency)
        self._http = httpx.AsyncClient(
            base_url=url,
            headers=headers,
            timeout=httpx.Timeout(None, connect=CONNECT_TIMEOUT_S),  # the callers' deadlines bound the rest
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=max_concurrency),
        )

    async def aclose(self) -> None:
        await self._http.aclose()

    async def is_ok(self, path: str) -> bool:
        """Whether GET `path` is answered with 200 now; it waits for no slot and is tried once."""
        try:
            return (await self._http.get(path)).status_code == 200
        except httpx.HTTPError:
            return False

    async def request(self, method: str, path: str, body: bytes | None, *, ends_at: float) -> Any:
        """The JSON of a 200 answer.

        Args:
            ends_at: when the caller stops waiting, on the event loop's clock; the server is told how long that is.

        Raises:
            RewardClientError: there was none, after `max_retries` more tries where those can help.
        """
        async with self._slots:  # kept while waiting to try again: a server that is overloaded gets less to do
            attempt = 0
            while True:
                left_s = ends_at - asyncio.get_running_loop().time()
                try:
                    return await self._attempt(method, path, body, left_s=max(left_s, 0.001))
                except UnavailableError as error:
                    wait_s = _backoff_s(attempt) + (error.retry_after_s or 0.0)
                    left_s = ends_at - asyncio.get_running_loop().time()
                    is_final = error.status == 429  # the client's own doing, as every 4xx
                    if is_final or attempt >= self._max_retries or wait_s >= left_s:
                        raise
                attempt += 1
                await sleep(wait_s)

    async def _attempt(self, method: str, path: str, body: bytes | None, *, left_s: float) -> Any:
        headers = {"X-Request-Timeout-S": f"{min(left_s, MAX_TIMEOUT_S):.3f}"}
        if body is not None:
            headers["Content-Type"] = "application/json"
        try:
            response = await self._http.request(method, path, content=body, headers=headers)
        except LOST as error:
            raise UnavailableError(f"no answer from {self._http.base_url}: {error!r}") from error
        except httpx.DecodingError as error:
            raise MalformedAnswerError(f"the answer cannot be decompressed: {error}") from error
        except httpx.HTTPError as error:
            raise RewardClientError(f"the request could not be sent: {error!r}") from error
        if response.status_code == 200:
            return read_json(response.content)
        raise error_of_answer(response.status_code, response.headers, _json_or_none(response))


def _json_or_none(response: httpx.Response) -> Any:
    """The body of an error: a gateway in front of the server may answer HTML."""
    try:
        return read_json(response.content)
    except MalformedAnswerError:
        return None


def _backoff_s(attempt: int) -> float:
    """Seconds to wait after try number `attempt`: doubled each time, and random so that clients do not come at once."""
    longest = min(LONGEST_BACKOFF_S, FIRST_BACKOFF_S * 2.0 ** min(attempt, 16))
    return random.uniform(0.5, 1.0) * longest
