"""AsyncRewardClient for one event loop and many tasks, and RewardClient, the same calls for threads."""

from __future__ import annotations

import asyncio
import concurrent.futures
import math
import os
import threading
import weakref
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from types import TracebackType
from typing import Any, TypeVar

from serve_app.client.answers import (
    Comparison,
    ModelInfo,
    RankedResponse,
    Ranking,
    Score,
    StepwiseScore,
    TurnScores,
    read_best_of_n,
    read_comparison,
    read_model,
    read_models,
    read_ranking,
    read_scores,
    read_step_scores,
    read_turn_scores,
)
from serve_app.client.errors import DeadlineError, InvalidRequestError, RewardClientError, UnavailableError
from serve_app.client.transport import (
    Aggregate,
    Batch,
    BatchLimits,
    Messages,
    Transport,
    Truncation,
    cut,
    encode,
    encode_messages,
    json_object,
)

DEFAULT_TIMEOUT_S = 600.0
DEFAULT_MAX_RETRIES = 12
HEALTH_TIMEOUT_S = 5.0
READY_PAUSE_S = 0.25
T = TypeVar("T")


class AsyncRewardClient:
    """Scores at a rayward endpoint. Its connections belong to the event loop of its first call.

    Args:
        base_url: where the server is, as in `http://127.0.0.1:8000`.
        api_key: the bearer token; the environment's RAYWARD_API_KEY where it is None, and none where that is empty.
        model: which of the served models scores; the server's default where it is None.
        timeout_s: how long a call may take in all, tries and pauses included; calls may name another.
        max_retries: how often a request is sent again after 502, 503, 504, a 500 without rayward's JSON, or a lost
            connection. The pauses between so many tries make 48 s on average: Serve may take 35 s to replace a proxy.
            A server that this client never reached is an error at once: see `wait_until_ready`.
        max_concurrency: the most requests in flight, over all calls.
        max_conversations_per_request, max_bytes_per_request: longer lists are cut into several requests.

    Raises:
        ValueError: an argument is out of its range.

    Every call but `is_healthy` raises `RewardClientError`, one of the classes of `errors.py`. Empty lists have empty
    results, and nothing is sent.
    """

    def __init__(
        self,
        base_url: str,
        api_key: str | None = None,
        *,
        model: str | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        max_retries: int = DEFAULT_MAX_RETRIES,
        max_concurrency: int = 8,
        max_conversations_per_request: int = 256,
        max_bytes_per_request: int = 8 * 2**20,  # a quarter of what the server takes
    ) -> None:
        at_least_one = {
            "max_concurrency": max_concurrency,
            "max_conversations_per_request": max_conversations_per_request,
            "max_bytes_per_request": max_bytes_per_request,
        }
        for name, value in at_least_one.items():
            if value < 1:
                raise ValueError(f"{name} is at least 1, not {value}")
        if max_retries < 0:
            raise ValueError(f"max_retries is at least 0, not {max_retries}")
        self._timeout_s = _checked_timeout(timeout_s)
        self._model = model
        self._max_concurrency = max_concurrency
        self._limits = BatchLimits(max_conversations_per_request, max_bytes_per_request)
        self._transport = Transport(
            base_url,
            os.environ.get("RAYWARD_API_KEY") if api_key is None else api_key,
            max_retries=max_retries,
            max_concurrency=max_concurrency,
        )

    async def aclose(self) -> None:
        """Close the connections."""
        await self._transport.aclose()

    async def __aenter__(self) -> AsyncRewardClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def score(
        self,
        conversations: Sequence[Messages],
        *,
        truncation: Truncation | None = None,
        strict: bool = False,
        timeout_s: float | None = None,
    ) -> list[Score]:
        """One score per conversation, in order.

        Args:
            truncation: what the server does with a conversation over the model's length: refuse it (`"error"`, which
                raises `TooLongError`), keep its start (`"right"`) or drop its oldest turns (`"left"`). By default the
                server's own option says, which is `"error"` unless it was set.
            strict: an unknown role, a last message that is not the assistant's, an empty response and a chat template's
                markup spelled in a message are errors, not `warnings` of a score.
        """
        batches = cut(_checked_conversations(conversations), self._limits)
        fields = {"truncation": truncation, "strict": strict or None}
        return await self._within(timeout_s, lambda ends_at: self._score(batches, fields, ends_at, read_scores))

    async def score_turns(
        self,
        conversations: Sequence[Messages],
        *,
        truncation: Truncation | None = None,
        strict: bool = False,
        timeout_s: float | None = None,
    ) -> list[TurnScores]:
        """The scores of each conversation after each message of the assistant, in order; the options are `score`'s.

        Each score has the bits that `score` gives the conversation cut behind that message. A conversation without such
        a message is an `InvalidRequestError`.
        """
        batches = cut(_checked_conversations(conversations), self._limits)
        fields = {"truncation": truncation, "strict": strict or None, "every_turn": True}
        return await self._within(timeout_s, lambda ends_at: self._score(batches, fields, ends_at, read_turn_scores))

    async def score_steps(
        self,
        conversations: Sequence[Messages],
        steps: Sequence[Sequence[str]],
        *,
        aggregate: Aggregate | None = None,
        strict: bool = False,
        timeout_s: float | None = None,
    ) -> list[StepwiseScore]:
        """The scores of the steps of answers, in order, by a process reward model.

        Args:
            conversations: the messages before each answer.
            steps: each answer's steps.
            aggregate: also one score for each answer: the product of its steps' scores, the minimum or the last.
            strict: as `score` has it.
        """
        prompts = _checked_conversations(conversations)
        if len(prompts) != len(_checked_list(steps, "steps")):
            raise InvalidRequestError(f"{len(prompts)} conversations have {len(steps)} lists of steps", param="steps")
        answers = [{"messages": prompt, "steps": list(own)} for prompt, own in zip(prompts, steps, strict=True)]
        fields = {"aggregate": aggregate, "strict": strict or None}
        return await self._within(
            timeout_s,
            lambda ends_at: self._score(cut(answers, self._limits), fields, ends_at, read_step_scores, "/v1/steps"),
        )

    async def compare(
        self, first: Messages, second: Messages, *, strict: bool = False, timeout_s: float | None = None
    ) -> Comparison:
        """Which of two conversations is better, and how sure the model is of it."""
        body = json_object(
            {"model": self._model, "strict": strict or None},
            first=encode_messages(first, "first"),
            second=encode_messages(second, "second"),
        )
        return read_comparison(await self._within(timeout_s, lambda ends_at: self._post("/v1/compare", body, ends_at)))

    async def rank(
        self, conversations: Sequence[Messages], *, strict: bool = False, timeout_s: float | None = None
    ) -> Ranking:
        """The conversations' order from the best to the worst; equal scores keep their input order."""
        batches = cut(_checked_conversations(conversations), self._limits)
        return await self._within(timeout_s, lambda ends_at: self._rank(batches, {"strict": strict or None}, ends_at))

    async def best_of_n(
        self,
        prompt: str | Messages,
        responses: Sequence[str],
        top_n: int | None = None,
        *,
        reference: str | Messages | None = None,
        strict: bool = False,
        timeout_s: float | None = None,
    ) -> list[RankedResponse]:
        """The responses to `prompt` from the best to the worst, the first `top_n` of them where that is given.

        A prompt of text is one message of the user's. A POLAR model compares each response with the `reference`.
        """
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        responses = list(_checked_list(responses, "responses"))
        if top_n is not None and top_n < 1:
            raise InvalidRequestError(f"top_n is at least 1, not {top_n}", param="top_n")
        if not responses:
            return []
        asked = _BestOfN(prompt, responses, top_n, reference, {"strict": strict or None})
        return await self._within(timeout_s, lambda ends_at: self._best_of_n(asked, ends_at))

    async def models(self, *, timeout_s: float | None = None) -> list[ModelInfo]:
        """The models served, the default first."""
        ask = self._transport.request
        return read_models(
            await self._within(timeout_s, lambda ends_at: ask("GET", "/v1/models", None, ends_at=ends_at))
        )

    async def is_healthy(self, *, timeout_s: float = HEALTH_TIMEOUT_S) -> bool:
        """Whether every model can score now: asked once, and False where no answer comes in time."""
        try:
            return await self._within(timeout_s, lambda _: self._transport.failure_of("/health")) is None
        except DeadlineError:
            return False

    async def wait_until_ready(self, timeout_s: float | None = None) -> None:
        """Wait until every model can score: where a server is being started, and nothing listens yet.

        Raises:
            UnavailableError: it was not ready in `timeout_s` seconds, by default the client's; the message says what
                the last answer was.
        """
        limit_s = self._timeout_s if timeout_s is None else _checked_timeout(timeout_s)
        ends_at = asyncio.get_running_loop().time() + limit_s
        failure: str | None = "no answer"
        try:
            async with asyncio.timeout_at(ends_at):
                while (failure := await self._transport.failure_of("/health")) is not None:
                    await asyncio.sleep(READY_PAUSE_S)
        except TimeoutError:
            raise UnavailableError(f"the server was not ready within {limit_s:g} s: {failure}") from None

    async def _within(self, timeout_s: float | None, call: Callable[[float], Awaitable[T]]) -> T:
        """`call` with its end on the event loop's clock, and a `DeadlineError` once that has come."""
        limit_s = self._timeout_s if timeout_s is None else _checked_timeout(timeout_s)
        ends_at = asyncio.get_running_loop().time() + limit_s
        try:
            async with asyncio.timeout_at(ends_at):
                return await call(ends_at)
        except TimeoutError:
            raise DeadlineError(f"the call was not done within {limit_s:g} s") from None

    async def _post(self, path: str, body: bytes, ends_at: float) -> Any:
        return await self._transport.request("POST", path, body, ends_at=ends_at)

    async def _score(
        self,
        batches: Iterator[Batch],
        fields: Mapping[str, Any],
        ends_at: float,
        read: Callable[[object, int], list[T]],
        path: str = "/v1/score",
    ) -> list[T]:
        """What `read` makes of the answers to batches of conversations, in order."""
        results: dict[int, list[T]] = {}
        models: set[str] = set()

        async def score_batches() -> None:
            for batch in batches:  # the workers share the iterator, so each takes the next when it is free
                body = json_object({"model": self._model, **fields}, conversations=batch.conversations)
                try:
                    answer = await self._post(path, body, ends_at)
                except RewardClientError as error:
                    batch.globalise(error)
                    raise
                results[batch.start] = read(answer, len(batch))
                models.add(read_model(answer))

        await _run_until_one_fails([score_batches] * self._max_concurrency)
        if len(models) > 1:
            raise RewardClientError(
                f"the server's default model changed during the call: {sorted(models)} scored parts of the list, and "
                "their scores do not compare; name one with model="
            )
        return [score for start in sorted(results) for score in results[start]]

    async def _rank(self, batches: Iterator[Batch], fields: Mapping[str, Any], ends_at: float) -> Ranking:
        first, second = next(batches, None), next(batches, None)
        if first is None:
            return Ranking.of([])
        if second is None:
            body = json_object({"model": self._model, **fields}, conversations=first.conversations)
            return read_ranking(await self._post("/v1/rank", body, ends_at), len(first))
        scores = await self._score(chain([first, second], batches), fields, ends_at, read_scores)
        return Ranking.of([score.value for score in scores])

    async def _best_of_n(self, asked: _BestOfN, ends_at: float) -> list[RankedResponse]:
        responses, top_n = asked.responses, asked.top_n
        encoded_prompt = encode_messages(asked.prompt, "prompt")
        encoded = [_encode_response(response, index) for index, response in enumerate(responses)]
        num_bytes = len(encoded_prompt) + sum(len(response) + 1 for response in encoded)
        if self._limits.hold(len(responses), num_bytes):
            fields = {"model": self._model, "top_n": top_n, "reference": asked.reference, **asked.fields}
            body = json_object(fields, prompt=encoded_prompt, responses=encoded)
            return read_best_of_n(await self._post("/v1/best_of_n", body, ends_at), responses, top_n)
        try:
            scores = await self._score(cut(asked.conversations(), self._limits), asked.fields, ends_at, read_scores)
        except RewardClientError as error:
            if error.param is not None:  # of `/v1/score`, which the caller did not ask for
                error.param = error.param.replace("conversations[", "responses[", 1)
            raise
        order = Ranking.of([score.value for score in scores]).order[:top_n]
        return [RankedResponse(index, responses[index], scores[index].value) for index in order]


@dataclass(frozen=True, slots=True)
class _BestOfN:
    """What a call of `best_of_n` asks for; `fields` are more of its request."""

    prompt: Messages
    responses: list[str]
    top_n: int | None
    reference: str | Messages | None
    fields: Mapping[str, Any]

    def conversations(self) -> list[Messages]:
        """The responses, each as a conversation of its own."""
        answered = [[*self.prompt, {"role": "assistant", "content": response}] for response in self.responses]
        if self.reference is None:
            return [*answered]
        return [{"messages": messages, "reference": self.reference} for messages in answered]


async def _run_until_one_fails(workers: Sequence[Callable[[], Awaitable[None]]]) -> None:
    """Run them at once; the first error cancels the others and is raised as it is."""
    tasks = [asyncio.ensure_future(worker()) for worker in workers]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _encode_response(response: str, index: int) -> bytes:
    if not isinstance(response, str):
        raise InvalidRequestError(f"a response is text, not {type(response).__name__}", param=f"responses[{index}]")
    return encode(response, f"responses[{index}]")


def _checked_list(items: Sequence[T], param: str) -> Sequence[T]:
    if not isinstance(items, Sequence) or isinstance(items, str | bytes):
        raise InvalidRequestError(f"{param} is a list, not {type(items).__name__}", param=param)
    return items


def _checked_conversations(conversations: Sequence[Messages]) -> Sequence[Messages]:
    first = conversations[0] if isinstance(conversations, Sequence) and conversations else conversations
    if isinstance(first, Mapping) and "messages" not in first and "role" in first:
        raise InvalidRequestError(
            "conversations is one conversation, not a list of them: put it into a list", param="conversations"
        )
    return _checked_list(conversations, "conversations")


def _checked_timeout(timeout_s: float) -> float:
    if not 0.0 < timeout_s < math.inf:
        raise ValueError(f"timeout_s is a number of seconds above 0, not {timeout_s}")
    return timeout_s


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
        max_retries: int = DEFAULT_MAX_RETRIES,
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
        self,
        conversations: Sequence[Messages],
        *,
        truncation: Truncation | None = None,
        strict: bool = False,
        timeout_s: float | None = None,
    ) -> list[Score]:
        """See `AsyncRewardClient.score`."""
        return self._call(
            lambda client: client.score(conversations, truncation=truncation, strict=strict, timeout_s=timeout_s)
        )

    def score_turns(
        self,
        conversations: Sequence[Messages],
        *,
        truncation: Truncation | None = None,
        strict: bool = False,
        timeout_s: float | None = None,
    ) -> list[TurnScores]:
        """See `AsyncRewardClient.score_turns`."""
        return self._call(
            lambda client: client.score_turns(conversations, truncation=truncation, strict=strict, timeout_s=timeout_s)
        )

    def score_steps(
        self,
        conversations: Sequence[Messages],
        steps: Sequence[Sequence[str]],
        *,
        aggregate: Aggregate | None = None,
        strict: bool = False,
        timeout_s: float | None = None,
    ) -> list[StepwiseScore]:
        """See `AsyncRewardClient.score_steps`."""
        return self._call(
            lambda client: client.score_steps(
                conversations, steps, aggregate=aggregate, strict=strict, timeout_s=timeout_s
            )
        )

    def compare(
        self, first: Messages, second: Messages, *, strict: bool = False, timeout_s: float | None = None
    ) -> Comparison:
        """See `AsyncRewardClient.compare`."""
        return self._call(lambda client: client.compare(first, second, strict=strict, timeout_s=timeout_s))

    def rank(
        self, conversations: Sequence[Messages], *, strict: bool = False, timeout_s: float | None = None
    ) -> Ranking:
        """See `AsyncRewardClient.rank`."""
        return self._call(lambda client: client.rank(conversations, strict=strict, timeout_s=timeout_s))

    def best_of_n(
        self,
        prompt: str | Messages,
        responses: Sequence[str],
        top_n: int | None = None,
        *,
        reference: str | Messages | None = None,
        strict: bool = False,
        timeout_s: float | None = None,
    ) -> list[RankedResponse]:
        """See `AsyncRewardClient.best_of_n`."""
        return self._call(
            lambda client: client.best_of_n(
                prompt, responses, top_n, reference=reference, strict=strict, timeout_s=timeout_s
            )
        )

    def models(self, *, timeout_s: float | None = None) -> list[ModelInfo]:
        """See `AsyncRewardClient.models`."""
        return self._call(lambda client: client.models(timeout_s=timeout_s))

    def is_healthy(self, *, timeout_s: float = HEALTH_TIMEOUT_S) -> bool:
        """See `AsyncRewardClient.is_healthy`."""
        return self._call(lambda client: client.is_healthy(timeout_s=timeout_s))

    def wait_until_ready(self, timeout_s: float | None = None) -> None:
        """See `AsyncRewardClient.wait_until_ready`."""
        self._call(lambda client: client.wait_until_ready(timeout_s))

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
