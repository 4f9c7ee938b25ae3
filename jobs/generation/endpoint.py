"""Candidates from an OpenAI-compatible endpoint: what is sent, what is read, what failures mean, and many prompts at a
time.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import random
import threading
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, TypeVar

from jobs.errors import GeneratorError
from jobs.generation.candidates import Candidate, Generation, Prompt
from jobs.generation.options import Sampling
from serve_app.reward_model.conversation import Message
from serve_app.reward_model.errors import RaywardError

if TYPE_CHECKING:
    import httpx

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


@dataclass(frozen=True, slots=True)
class ChatAnswer:
    """Candidates in the server's order, and how many more used up all their tokens before any text: on thinking."""

    candidates: list[Candidate]
    num_spent: int = 0


async def ask(
    http: httpx.AsyncClient, endpoint: Endpoint, prompt: Prompt, sampling: Sampling, *, seed: int | None
) -> ChatAnswer:
    """Ask once for `sampling.num_candidates`; between one and so many come back, those without text counted.

    Raises:
        PassingError: nothing of use came back, but may when asked again.
        RefusedError: the server refuses this prompt.
        GeneratorError: it refuses every prompt: the key, the address or the model's name is wrong.
    """
    import httpx

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
    return _answer(response.content, sampling.num_candidates)


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


def _answer(content: bytes, wanted: int) -> ChatAnswer:
    try:
        choices = json.loads(content)["choices"]
        found = [(choice["message"].get("content"), choice.get("finish_reason")) for choice in choices]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise PassingError(f"the answer is no chat completion: {type(error).__name__}") from error
    # A text of no characters that was cut off for its length: some servers write "" in place of null.
    is_spent = [reason == "length" and text in (None, "") for text, reason in found]
    usable = [
        Candidate(text, str(reason) if reason else None)
        for (text, reason), spent in zip(found, is_spent, strict=True)
        if not spent and _is_text(text)
    ][:wanted]
    num_spent = min(sum(is_spent), wanted - len(usable))
    if not usable and not num_spent:
        reasons = ", ".join(sorted({str(reason) for _, reason in found}))
        raise PassingError(f"the answer holds no text (choices: {len(found)}, finish_reason: {reasons or 'none'})")
    return ChatAnswer(usable, num_spent)


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


T = TypeVar("T")
FIRST_BACKOFF_S, LONGEST_BACKOFF_S = 0.5, 30.0
LONGEST_RETRY_AFTER_S = 600.0
CONNECT_TIMEOUT_S = 10.0
# So many prompts in a row without one candidate, though all were retried: the endpoint is down, no prompt is to blame.
OUTAGE_PROMPTS = 16


class HttpGenerator:
    """Asks an endpoint. Calls from several threads share its `concurrency`; HTTP runs on a thread of its own.

    What an endpoint answers cannot be repeated: most ignore the seed, and none promises the same bits in any batch.
    """

    def __init__(self, endpoint: Endpoint, sampling: Sampling, *, first_backoff_s: float = FIRST_BACKOFF_S) -> None:
        import httpx

        self._endpoint = endpoint
        self._sampling = sampling
        self._first_backoff_s = first_backoff_s
        self._slots = asyncio.Semaphore(endpoint.concurrency)
        self._barren: list[str] = []  # keys of prompts that came to nothing since the last candidate
        self._http = httpx.AsyncClient(
            headers=headers_of(endpoint),
            timeout=httpx.Timeout(None, connect=CONNECT_TIMEOUT_S),  # `ask` bounds the rest
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=endpoint.concurrency),
        )
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="http-generator", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Close the connections and end the thread."""
        self._run(self._http.aclose())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def check(self) -> None:
        """Ask for a single token, so that a wrong address, key, model or option shows before anything is begun.

        Raises:
            GeneratorError: the endpoint cannot be reached or refuses; the text says why.
        """
        prompt = Prompt((Message("user", "Hi"),), key="check")
        one = dataclasses.replace(self._sampling, num_candidates=1, max_new_tokens=1)
        try:
            self._run(ask(self._http, dataclasses.replace(self._endpoint, timeout_s=60.0), prompt, one, seed=None))
        except RefusedError as error:
            raise GeneratorError(
                f"{self._endpoint.url} refuses a trial request with these options: {error}; --top-k 0 and --top-p 1 "
                "leave fields out, --extra-body changes them"
            ) from error
        except PassingError as error:
            # An answer without text is what some give to one token, 429 that of a server that is busy.
            if not str(error).startswith(("the answer holds no text", "HTTP 429")):
                raise GeneratorError(f"{self._endpoint.url} does not answer a trial request: {error}") from error

    def generate(self, prompts: Sequence[Prompt]) -> list[Generation]:
        """The outcome of each prompt, in order.

        Raises:
            GeneratorError: the endpoint refuses every prompt, or is down.
        """
        return self._run(self._all(prompts))

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _all(self, prompts: Sequence[Prompt]) -> list[Generation]:
        tasks = [asyncio.ensure_future(self._generation(prompt)) for prompt in prompts]
        try:
            generations = await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
        if len(prompts) > 1 and all(prompt.key in self._barren for prompt in prompts):
            raise self._outage(generations[-1].failures[-1])
        return generations

    async def _generation(self, prompt: Prompt) -> Generation:
        """Ask until all candidates came, it is refused, or the retries are used up; what came is kept.

        A candidate whose tokens all went into thinking is not asked for again: most likely it would end the same way.
        """
        wanted = self._sampling.num_candidates
        came: list[Candidate] = []
        num_spent = 0
        failure: str | None = None
        num_failures = 0
        async with self._slots:  # kept while waiting to ask again: a server that is overloaded gets less to do
            while len(came) + num_spent < wanted and failure is None:
                try:
                    answer = await self._ask(prompt, len(came) + num_spent, num_failures)
                    came += answer.candidates
                    num_spent += answer.num_spent
                except RefusedError as error:
                    failure = str(error)
                except PassingError as error:
                    wait_s = self._wait_s(num_failures, error.retry_after_s)
                    num_failures += 1
                    if num_failures > self._endpoint.max_retries or error.retry_after_s > LONGEST_RETRY_AFTER_S:
                        failure = f"{error} (asked {num_failures} times)"
                        self._barren += [] if came or num_spent else [prompt.key]
                        if len(self._barren) >= OUTAGE_PROMPTS:
                            raise self._outage(failure) from error
                    else:
                        await asyncio.sleep(wait_s)
        failures = (self._spent,) * num_spent
        failures += (failure,) * (wanted - len(came) - num_spent) if failure else ()
        return Generation(tuple(came), failures)

    @property
    def _spent(self) -> str:
        """The reason of a candidate without text."""
        return (
            f"all {self._sampling.max_new_tokens} tokens went into thinking, none into the response "
            "(finish_reason: length); raise --max-new-tokens"
        )

    async def _ask(self, prompt: Prompt, num_came: int, num_failures: int) -> ChatAnswer:
        """Ask for the candidates that are still missing, with another seed than before."""
        rest = dataclasses.replace(self._sampling, num_candidates=self._sampling.num_candidates - num_came)
        seed = (
            self._sampling.seed_of(prompt.key, num_came, num_failures) % 2**31
            if self._sampling.seed is not None
            else None
        )
        answer = await ask(self._http, self._endpoint, prompt, rest, seed=seed)
        self._barren.clear()
        return answer

    def _outage(self, reason: str) -> GeneratorError:
        return GeneratorError(
            f"{self._endpoint.url} seems to be down: not one of the last {len(self._barren)} prompts was answered, "
            f"lately for {reason}; the same command goes on where this one stopped"
        )

    def _wait_s(self, num_failures: int, retry_after_s: float) -> float:
        """Doubled with each failure, random so that prompts do not come back at once, and never before Retry-After."""
        backoff_s = min(LONGEST_BACKOFF_S, self._first_backoff_s * 2.0 ** min(num_failures, 16))
        return retry_after_s + random.uniform(0.5, 1.0) * backoff_s


def only_model(url: str, api_key: str | None) -> str:
    """The model that an endpoint serves, where it lists exactly one.

    Raises:
        GeneratorError: it lists none or several, refuses the key, or cannot be reached.
    """
    import httpx

    endpoint = Endpoint(url, "", api_key)
    try:
        response = httpx.get(f"{url}/models", headers=headers_of(endpoint), timeout=CONNECT_TIMEOUT_S)
        response.raise_for_status()
        names = [str(model["id"]) for model in response.json()["data"]]
    except (httpx.TransportError, httpx.InvalidURL) as error:
        raise GeneratorError(
            f"{url} cannot be reached ({type(error).__name__}: {error}); is the server running, and is --generator its "
            "address up to /v1?"
        ) from error
    except (httpx.HTTPError, ValueError, KeyError, TypeError, RecursionError) as error:
        status = error.response.status_code if isinstance(error, httpx.HTTPStatusError) else 0
        if status in (401, 402, 403):
            raise GeneratorError(f"{url} refuses the API key, with HTTP {status}; see --api-key-env") from error
        if status in (408, 429) or status >= 500:
            raise GeneratorError(f"{url} does not answer, with HTTP {status}; is the server still starting?") from error
        raise GeneratorError(
            f"{url}/models does not list the models: {error}; name one with --generator-model"
        ) from error
    if len(names) != 1:
        raise GeneratorError(
            f"{url} serves {len(names)} models: {', '.join(names[:20])}; choose with --generator-model"
        )
    return names[0]
