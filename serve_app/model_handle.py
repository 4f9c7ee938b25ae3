"""One model's replicas as the ingress sees them: conversations in, scores out, over as many replicas as it takes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RequestCancelledError
from ray.serve.handle import DeploymentHandle

from serve_app.batching.parts import conversation_order, cut
from serve_app.batching.wire import Refusal, ScoreReply, TokenBatch
from serve_app.config import ModelConfig
from serve_app.replica import RewardReplica
from serve_app.reward_model import (
    Conversation,
    ConversationError,
    ConversationLike,
    ConversationTooLongError,
    DeviceMemoryError,
    NonFiniteScoreError,
    Score,
    ScoringError,
)
from serve_app.reward_model.scores import Outputs, StepScores
from serve_app.reward_model.steps import StepEncoder, sequences_of, stepped_answers, with_scores
from serve_app.reward_model.tokenizer import EncodedConversation, Truncation
from serve_app.score_calls import ScoreCalls
from serve_app.web.service import ApiError, seconds_left

S = TypeVar("S")
T = TypeVar("T")
logger = logging.getLogger("ray.serve")  # the one whose lines Serve keeps

ENCODED_AHEAD = 256
"""Conversations of a request that are tokenised at once; those after them are tokenised while they are scored."""
PART_TOKENS = 8192
"""A request for more is cut into parts of at most this many tokens, shared ones counted once, which replicas share."""
PARTS_AT_ONCE = 8
"""Parts of one request that replicas have at once: a huge request leaves room for others, and for its own parts."""
MAX_REFUSALS = 60
MAX_PART_RETRIES = 2
RETRY_PAUSE_S = 0.2
READY_TIMEOUT_S = 2.0
REPLY_TIMEOUT_S = 600.0


class ModelHandle:
    """Tokenises, asks the replicas and reads their answers. Errors are `ApiError`."""

    def __init__(
        self, config: ModelConfig, replicas: DeploymentHandle[RewardReplica], pool: ThreadPoolExecutor
    ) -> None:
        self.config = config
        self._replicas = replicas
        self._calls = ScoreCalls(replicas)
        self._pool = pool
        self._decoder_config, self.tokenizer = config.spec().read()
        scores_steps = self._decoder_config.head.steps is not None
        self._steps = StepEncoder.of(self._decoder_config, self.tokenizer) if scores_steps else None

    @property
    def max_tokens(self) -> int:
        return min(self._decoder_config.max_tokens, self.config.max_tokens or self._decoder_config.max_tokens)

    async def score(
        self,
        conversations: Sequence[ConversationLike],
        *,
        truncation: Truncation | None,
        max_tokens: int | None,
        params: Sequence[str] | None,
        strict: bool = False,
    ) -> list[Score]:
        """The score of each conversation, in order. Raises `ApiError` for the first that has none."""
        outcomes = await self._outcomes(
            conversations, truncation=truncation, max_tokens=max_tokens, params=params, strict=strict, raises=True
        )
        return [outcome for outcome in outcomes if isinstance(outcome, Score)]

    async def outcomes(
        self,
        conversations: Sequence[ConversationLike | ApiError],
        *,
        truncation: Truncation | None,
        max_tokens: int | None,
        params: Sequence[str] | None,
    ) -> list[Score | ApiError]:
        """The score of each conversation, in order, or the error that keeps it from having one."""
        return await self._outcomes(conversations, truncation=truncation, max_tokens=max_tokens, params=params)

    async def _outcomes(
        self,
        conversations: Sequence[ConversationLike | ApiError],
        *,
        truncation: Truncation | None,
        max_tokens: int | None,
        params: Sequence[str] | None,
        strict: bool = False,
        raises: bool = False,
    ) -> list[Score | ApiError]:
        """`outcomes`; where it `raises`, an error ends the scoring of those encoded before it."""

        failures = _Failures(params)
        parsed = failures.sort_out((place, _parsed(each)) for place, each in enumerate(conversations))
        if raises:
            failures.raise_first()
        encode = partial(
            self.tokenizer.encode_batch,
            truncation=truncation or self.config.truncation,
            max_tokens=min(filter(None, (max_tokens, self.config.max_tokens)), default=None),
            strict=strict,
        )
        found: dict[int, Score | ApiError] = {}
        progress = _Progress()

        async def score(encoded: dict[int, EncodedConversation]) -> None:
            places, names = list(encoded), self._decoder_config.head.attributes
            ids = [each.token_ids for each in encoded.values()]
            found.update(
                failures.sort_out(
                    (places[at], encoded[places[at]].scored(outputs, names))
                    for at, outputs in await self._outputs(ids, progress)
                )
            )

        try:
            async with asyncio.TaskGroup() as group:
                for places in _slices(parsed):
                    encoding = await self._in_pool(encode, [parsed[place] for place in places])
                    encoded = failures.sort_out(zip(places, encoding, strict=True))
                    if encoded and not (raises and failures.errors):
                        group.create_task(score(encoded))
                if raises:
                    failures.raise_first()
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
        if raises:
            failures.raise_first()
        found |= failures.errors
        return [found[place] for place in range(len(conversations))]

    async def _in_pool(self, encode: Callable[[Sequence[S]], T], items: Sequence[S]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, encode, items)

    async def _outputs(self, ids: Sequence[list[int]], progress: _Progress) -> list[tuple[int, Outputs | ScoringError]]:
        """What replicas say of each sequence, with its place; those that begin alike stand together."""
        parts = cut(ids, max_tokens=PART_TOKENS)
        replies = await self._score_parts([TokenBatch.of([ids[at] for at in part]) for part in parts], progress)
        return [
            found
            for part, reply in zip(parts, replies, strict=True)
            for found in zip(part, reply.outputs(), strict=True)
        ]

    async def score_steps(
        self, prompts: Sequence[ConversationLike], steps: Sequence[Sequence[str]], *, strict: bool = False
    ) -> list[StepScores]:
        """The scores of each answer's steps, in order. Raises `ApiError` for the first answer that has none."""
        if self._steps is None:
            text = f"{self.config.name} scores conversations, and no steps: ask for /v1/score"
            raise ApiError(422, text, "no_steps", "model")
        encode = partial(self._steps.encode_batch, max_tokens=self.config.max_tokens, strict=strict)
        answers = stepped_answers(prompts, steps)
        encoded = await self._in_pool(encode, answers)
        _raise_first(encoded)
        sequences = sequences_of(encoded)
        found: list[float | ScoringError] = [0.0] * len(sequences)
        for at, outputs in await self._outputs(sequences, _Progress()):
            found[at] = outputs if isinstance(outputs, ScoringError) else outputs[0]
        return _raise_first(with_scores(encoded, found))

    async def ready(self) -> bool:
        """Whether a replica answers. One that may sleep counts as ready: a request wakes it."""
        if self.config.may_sleep:
            return True
        try:
            async with asyncio.timeout(READY_TIMEOUT_S):
                return bool(await self._replicas.ready.remote())
        except (TimeoutError, RayError, DeploymentUnavailableError, BackPressureError):
            return False

    async def _score_parts(self, parts: Sequence[TokenBatch], progress: _Progress) -> list[ScoreReply]:
        """The replies to some of a request's parts, a few of which are under way at once.

        Where the request's first part is refused for overload, the request is. Once that is taken on, the others wait.
        """

        async def reply_to(part: TokenBatch) -> ScoreReply:
            async with progress.window:
                is_first, progress.has_begun = not progress.has_begun, True
                return await (self._score_part if is_first else self._score_patiently)(part)

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(reply_to(part)) for part in parts]
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
        return [task.result() for task in tasks]

    async def _score_patiently(self, part: TokenBatch) -> ScoreReply:
        for _ in range(MAX_REFUSALS):
            try:
                return await self._score_part(part)
            except ApiError as error:
                if error.code != "overloaded":
                    raise
                await asyncio.sleep(error.retry_after_s or 1)
        return await self._score_part(part)

    async def _score_part(self, part: TokenBatch) -> ScoreReply:
        """One replica's scores. Scoring changes nothing, so a part whose replica died is asked for elsewhere."""
        has_failed = False
        for attempt in range(MAX_PART_RETRIES + 1):
            try:
                reply = await self._ask(part, alone=attempt > 0)
            except BackPressureError:
                raise self._refused(Refusal("overloaded")) from None
            except (RayError, DeploymentUnavailableError, TimeoutError) as error:
                logger.warning("a replica of %s failed: %s", self.config.name, type(error).__name__)
            else:
                if reply.refusal is None and reply.failure is None:
                    return reply
                if reply.refusal is not None and reply.refusal.reason != "unavailable":
                    raise self._refused(reply.refusal)
                has_failed = reply.failure is not None
            await asyncio.sleep(RETRY_PAUSE_S * 2**attempt)
        if has_failed:
            raise ApiError(503, "the model failed on this request", "forward_failed", retry_after_s=5)
        raise ApiError(503, f"no replica of {self.config.name} could answer", "unavailable", retry_after_s=5)

    async def _ask(self, part: TokenBatch, *, alone: bool) -> ScoreReply:
        """One replica's reply. What failed before goes `alone`, so that it takes no other request down with it."""
        try:
            async with asyncio.timeout(REPLY_TIMEOUT_S):
                return await self._calls.score(part, timeout_s=seconds_left(), alone=alone)
        except RequestCancelledError as error:
            raise asyncio.CancelledError from error

    def _refused(self, refusal: Refusal) -> ApiError:
        if refusal.reason == "deadline":
            return ApiError(408, "the deadline of the request passed while it waited", "deadline_exceeded")
        text = f"{self.config.name} has more work than it can do soon"
        return ApiError(503, text, "overloaded", retry_after_s=refusal.retry_after_s)


@dataclass(slots=True)
class _Progress:
    """What the parts of one request share: how many replicas have at once, and whether any has been sent."""

    window: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(PARTS_AT_ONCE))
    has_begun: bool = False


def _slices(parsed: Mapping[int, Conversation]) -> Iterator[list[int]]:
    """The places of conversations in slices, of which one is encoded while those before it are scored; those that begin
    with the same messages stand together.
    """
    places = list(parsed)
    if len(places) > ENCODED_AHEAD:
        places = [places[at] for at in conversation_order(list(parsed.values()))]
    return (places[at : at + ENCODED_AHEAD] for at in range(0, len(places), ENCODED_AHEAD))


class _Failures:
    """The conversations of one request that have no score, by place."""

    def __init__(self, params: Sequence[str] | None) -> None:
        self._params = params
        self.errors: dict[int, ApiError] = {}

    def sort_out(self, outcomes: Iterable[tuple[int, T | ScoringError | ApiError]]) -> dict[int, T]:
        """Those of `outcomes` that are no errors, by place; the errors are kept."""
        good: dict[int, T] = {}
        for place, outcome in outcomes:
            if isinstance(outcome, ApiError):
                self.errors[place] = outcome
            elif isinstance(outcome, ScoringError):
                param = f"conversations[{place}]" if self._params is None else self._params[place]
                self.errors[place] = _api_error(outcome, param)
            else:
                good[place] = outcome
        return good

    def raise_first(self) -> None:
        """Raise the error of the first of them, where there is any."""
        if self.errors:
            raise self.errors[min(self.errors)]


def _raise_first(outcomes: Sequence[T | ScoringError]) -> list[T]:
    """The outcomes of answers in steps. Raises `ApiError` for the first that is an error, and names its step."""
    good: list[T] = []
    for place, outcome in enumerate(outcomes):
        if isinstance(outcome, ScoringError):
            step = "" if outcome.index is None else f".steps[{outcome.index}]"
            raise _api_error(outcome, f"conversations[{place}]{step}")
        good.append(outcome)
    return good


def _parsed(conversation: ConversationLike | ApiError) -> Conversation | ConversationError | ApiError:
    try:
        return conversation if isinstance(conversation, ApiError) else Conversation.parse(conversation)
    except ConversationError as error:
        return error


def _api_error(error: ScoringError, param: str) -> ApiError:
    error.__dict__.pop("index", None)  # its place in a part means nothing to the client
    text = str(error)
    if isinstance(error, ConversationTooLongError):
        return ApiError(422, text, "context_length_exceeded", param)
    if isinstance(error, ConversationError):
        return ApiError(422, text, "invalid_conversation", param)
    if isinstance(error, NonFiniteScoreError):
        return ApiError(422, text, "score_not_finite", param)
    if isinstance(error, DeviceMemoryError):
        return ApiError(422, text, "does_not_fit_in_memory", param)
    return ApiError(422, text, "no_score", param)
