"""One request to an OpenAI-compatible endpoint: what is sent, what is read from the answer, what failures mean."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpx

from jobs.errors import GeneratorError
from jobs.generators.candidate import Candidate, Prompt
from jobs.generators.options import Sampling
from serve_app.reward_model.errors import RaywardError

__all__ = ["Endpoint", "PassingError", "RefusedError", "ask", "headers_of"]

MAX_REASON_CHARS = 300
NO_PROMPTS_FAULT = (401, 402, 403, 404, 405)


class PassingError(RaywardError):
    """A request failed in a way that may pass; the server asked for `retry_after_s` of patience."""

    def __init__(self, reason: str, retry_after_s: float = 0.0) -> None:
        super().__init__(reason)
        self.retry_after_s = retry_after_s


class RefusedError(RaywardError):
    """The server will not answer this prompt, however often it is asked."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """An OpenAI-compatible endpoint: its address up to /v1, the model's name there, and how it is asked."""

    url: str
    model: str
    api_key: str | None = field(default=None, repr=False)
    timeout_s: float = 600.0
    max_retries: int = 8
    concurrency: int = 32
    body_fields: Mapping[str, Any] = field(default_factory=dict)


def headers_of(endpoint: Endpoint) -> dict[str, str]:
    """The headers of every request."""
    key = {"Authorization": f"Bearer {endpoint.api_key}"} if endpoint.api_key else {}
    return {"User-Agent": "rayward", "Accept": "application/json", "Content-Type": "application/json", **key}


async def ask(
    http: httpx.AsyncClient, endpoint: Endpoint, prompt: Prompt, sampling: Sampling, *, seed: int | None
) -> list[Candidate]:
    """Ask once for `sampling.num_candidates`; between one and so many come back, in the server's order.

    Raises:
        PassingError: nothing of use came back, but may when asked again.
        RefusedError: the server refuses this prompt.
        GeneratorError: it refuses every prompt: the key, the address or the model's name is wrong.
    """
    body = _body(endpoint, prompt, sampling, seed)
    try:
        async with asyncio.timeout(endpoint.timeout_s):  # of the whole: a server that drips never times a read out
            response = await http.post(f"{endpoint.url}/chat/completions", content=body)
    except TimeoutError:
        raise PassingError(f"no answer within {endpoint.timeout_s:g} s") from None
    except httpx.HTTPError as error:
        raise PassingError(f"{type(error).__name__}: {error}") from error
    if response.status_code != 200:
        raise _failure(response, endpoint)
    return _candidates(response.content)[: sampling.num_candidates]


def _body(endpoint: Endpoint, prompt: Prompt, sampling: Sampling, seed: int | None) -> bytes:
    messages = [{"role": message.role, "content": message.content} for message in prompt.messages]
    fields: dict[str, Any] = {
        "model": endpoint.model,
        "messages": messages,
        "n": sampling.num_candidates,
        "max_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p if sampling.top_p < 1 else None,
        "top_k": sampling.top_k or None,
        "seed": seed,
    }
    fields |= endpoint.body_fields
    return json.dumps({name: value for name, value in fields.items() if value is not None}).encode()


def _candidates(content: bytes) -> list[Candidate]:
    try:
        choices = json.loads(content)["choices"]
        found = [(choice["message"].get("content"), choice.get("finish_reason")) for choice in choices]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise PassingError(f"the answer is no chat completion: {type(error).__name__}") from error
    usable = [Candidate(text, str(reason) if reason else None) for text, reason in found if _is_text(text)]
    if not usable:
        reasons = ", ".join(sorted({str(reason) for _, reason in found}))
        raise PassingError(f"the answer holds no text (choices: {len(found)}, finish_reason: {reasons or 'none'})")
    return usable


def _is_text(text: object) -> bool:
    """Whether it is a string that UTF-8 can hold: JSON's escapes can spell half a character."""
    try:
        return isinstance(text, str) and text.encode() is not None
    except UnicodeEncodeError:
        return False


def _failure(response: httpx.Response, endpoint: Endpoint) -> RaywardError:
    status = response.status_code
    reason = f"HTTP {status}: {_message(response)}"
    if status in (408, 429) or status >= 500:
        return PassingError(reason, _retry_after_s(response.headers.get("Retry-After")))
    if status in NO_PROMPTS_FAULT or status < 400:
        return GeneratorError(
            f"{endpoint.url} refuses requests for the model {endpoint.model!r}, with {reason}; check --generator, "
            "--generator-model and the API key"
        )
    return RefusedError(reason)


def _message(response: httpx.Response) -> str:
    """The server's own words, where it has any; a gateway in front of it may answer HTML."""
    try:
        answer = json.loads(response.content)
        error = answer.get("error", answer)
        message = error.get("message", error) if isinstance(error, dict) else error
    except (ValueError, AttributeError, RecursionError):
        message = response.reason_phrase
    text = " ".join(str(message).encode(errors="replace").decode().split())
    return text if len(text) <= MAX_REASON_CHARS else text[:MAX_REASON_CHARS] + "..."


def _retry_after_s(header: str | None) -> float:
    """Seconds that a Retry-After header asks for, which is a number of them or a date (RFC 9110, section 10.2.3)."""
    if header is None:
        return 0.0
    if header.strip().isdigit():
        return float(header)
    try:
        until = parsedate_to_datetime(header)
    except ValueError:
        return 0.0
    until = until if until.tzinfo else until.replace(tzinfo=UTC)
    return max(0.0, (until - datetime.now(UTC)).total_seconds())
