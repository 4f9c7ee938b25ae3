"""Requests on their way: lists of conversations cut into JSON bodies of bounded size, each sent, and sent again where
that can help.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
from asyncio import sleep
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import httpx

from serve_app.client.answers import read_json
from serve_app.client.errors import (
    InvalidRequestError,
    MalformedAnswerError,
    RewardClientError,
    UnavailableError,
    error_of_answer,
)

Messages: TypeAlias = Sequence[Mapping[str, Any]] | Mapping[str, Any]
"""Messages of one conversation, each `{"role": str, "content": str}`; the last one is the response that is scored. For
a POLAR model it is a mapping with such `messages` and a `reference`.
"""
Truncation: TypeAlias = Literal["error", "right", "left"]
Aggregate: TypeAlias = Literal["product", "minimum", "last"]
"""What makes one score of an answer's steps."""


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """The most one request holds; a conversation over `num_bytes` of JSON goes alone."""

    num_conversations: int
    num_bytes: int

    def hold(self, num_conversations: int, num_bytes: int) -> bool:
        return num_conversations <= self.num_conversations and num_bytes <= self.num_bytes


@dataclass(slots=True)
class Batch:
    """Conversations `start`, `start + 1`, ... of a list, each as JSON."""

    start: int
    conversations: list[bytes] = field(default_factory=list)
    num_bytes: int = 0

    def __len__(self) -> int:
        return len(self.conversations)

    def add(self, conversations: list[bytes]) -> None:
        self.conversations += conversations
        self.num_bytes += _size(conversations)

    def globalise(self, error: RewardClientError) -> None:
        """Make `conversations[3]` in an error of this batch name the conversation's place in the whole list."""
        here = re.match(r"conversations\[(\d+)\]", error.param or "")
        if here is None or error.param is None:
            return
        there = f"conversations[{self.start + int(here[1])}]"
        error.param = there + error.param[here.end() :]
        error.message = error.message.replace(here[0], there)


def cut(conversations: Sequence[Messages], limits: BatchLimits) -> Iterator[Batch]:
    """Cut a list into batches, in order; neighbours that differ in the last message alone share one, if it holds them.

    A batch is encoded when it is asked for, so that a long list is never in memory twice.

    Raises:
        InvalidRequestError: a conversation is no list of messages or has no JSON form.
    """
    batch = Batch(start=0)
    for group in _groups(conversations, limits):
        if batch and not limits.hold(len(batch) + len(group), batch.num_bytes + _size(group)):
            yield batch
            batch = Batch(start=batch.start + len(batch))
        batch.add(group)
    if batch:
        yield batch


def _groups(conversations: Sequence[Messages], limits: BatchLimits) -> Iterator[list[bytes]]:
    """Runs of conversations with one prompt, each within `limits` unless it is a single conversation."""
    group: list[bytes] = []
    size = 0
    for index, conversation in enumerate(conversations):
        encoded = encode_messages(conversation, f"conversations[{index}]")
        size += _size([encoded])
        same_prompt = index > 0 and _prompt_of(conversation) == _prompt_of(conversations[index - 1])
        if group and not (same_prompt and limits.hold(len(group) + 1, size)):
            yield group
            group, size = [], _size([encoded])
        group.append(encoded)
    if group:
        yield group


def _prompt_of(conversation: Messages) -> object:
    return conversation if isinstance(conversation, Mapping) else conversation[:-1]


def _size(encoded: list[bytes]) -> int:
    return sum(len(item) + 1 for item in encoded)  # a comma each


def encode_messages(messages: Messages, param: str) -> bytes:
    """Messages as JSON; whether each has a role and a content is the server's to judge.

    Raises:
        InvalidRequestError: it is no list of objects, or holds what JSON cannot say; `param` names it.
    """
    if isinstance(messages, Mapping) and "messages" in messages:
        return encode(dict(messages), param)
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes):
        raise InvalidRequestError(
            f"a list of messages, each with 'role' and 'content', is needed, not {type(messages).__name__}", param=param
        )
    return encode(list(messages), param)


def encode(value: object, param: str) -> bytes:
    """`value` as JSON in UTF-8.

    Raises:
        InvalidRequestError: JSON cannot say it: another type, NaN, a lone surrogate; `param` names it.
    """
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequestError(f"{param} has no JSON form: {error}", param=param) from error


def json_object(fields: Mapping[str, object], **encoded: bytes | list[bytes]) -> bytes:
    """A JSON object of `fields` that are not None and of members that are JSON already."""
    members = [(name, encode(value, name)) for name, value in fields.items() if value is not None]
    for name, value in encoded.items():
        members.append((name, value if isinstance(value, bytes) else b"[" + b",".join(value) + b"]"))
    return b"{" + b",".join(f'"{name}":'.encode() + value for name, value in members) + b"}"


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
        self._may_recover = False  # until something else than a refused connection was met
        self._slots = asyncio.Semaphore(max_concurrency)
        self._http = httpx.AsyncClient(
            base_url=url,
            headers=headers,
            timeout=httpx.Timeout(None, connect=CONNECT_TIMEOUT_S),  # the callers' deadlines bound the rest
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=max_concurrency),
        )

    async def aclose(self) -> None:
        await self._http.aclose()

    async def failure_of(self, path: str) -> str | None:
        """Why GET `path` is not answered with 200 now, None if it is; it waits for no slot and is tried once."""
        try:
            response = await self._http.get(path)
        except httpx.HTTPError as error:
            return f"no answer from {self._http.base_url}: {error!r}"
        self._may_recover = True
        return None if response.status_code == 200 else f"{path} was answered with {response.status_code}"

    async def request(self, method: str, path: str, body: bytes | None, *, ends_at: float) -> Any:
        """The JSON of a 200 answer.

        A server that cannot be connected to and never was is an error at once: most likely nothing listens there. One
        that was may be about to come back. So is a proxy of Serve's that knows no route, as one does that has just
        started.

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
                    is_final = error.status == 429 or not self._may_recover  # 429 is the client's doing, as every 4xx
                    if is_final or attempt >= self._max_retries or wait_s >= left_s:
                        error.num_tries = attempt + 1
                        raise
                attempt += 1
                await sleep(wait_s)

    async def _attempt(self, method: str, path: str, body: bytes | None, *, left_s: float) -> Any:
        headers = {"X-Request-Timeout-S": f"{min(left_s, MAX_TIMEOUT_S):.3f}"}
        if body is not None:
            headers["Content-Type"] = "application/json"
        try:
            response = await self._http.request(method, path, content=body, headers=headers)
        except httpx.ConnectError as error:
            raise UnavailableError(
                f"nothing listens at {self._http.base_url}, or it cannot be reached: {error!r}; wait_until_ready waits "
                "for a server that is being started"
            ) from error
        except LOST as error:
            self._may_recover = True
            raise UnavailableError(f"no answer from {self._http.base_url}: {error!r}") from error
        except httpx.DecodingError as error:
            raise MalformedAnswerError(f"the answer cannot be decompressed: {error}") from error
        except httpx.HTTPError as error:
            raise RewardClientError(f"the request could not be sent: {error!r}") from error
        if _is_without_route(response):
            raise UnavailableError(
                f"a Ray Serve proxy at {self._http.base_url} has no route to a rayward endpoint: it has just started, "
                "or the address is another one",
                status=404,
            )
        self._may_recover = True
        if response.status_code == 200:
            return read_json(response.content)
        raise error_of_answer(response.status_code, response.headers, _json_or_none(response))


def _is_without_route(response: httpx.Response) -> bool:
    """Whether a proxy of Serve's says that it knows no application for this path."""
    is_text = response.headers.get("content-type", "").startswith("text/plain")
    return response.status_code == 404 and is_text and "/-/routes" in response.text


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
