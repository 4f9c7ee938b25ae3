"""A dialect of another server: a body, how it asks, how it is answered; and the one route that all of them are.

A conversation that has no score (a text that cannot be read, one over the model's length) costs its own alone: its
place holds null, and `errors` says why where the answer is an object. A request none of whose conversations has a score
is an error, in the dialects whose clients tell an error from an answer.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, Self, TypeAlias, TypeVar
from uuid import uuid4

from fastapi import APIRouter
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from serve_app.reward_model import Conversation, ConversationError, Message, Score
from serve_app.reward_model.tokenizer import Truncation
from serve_app.web.service import ApiError, ScoringService

logger = logging.getLogger("ray.serve")  # the one whose lines Serve keeps

EXAMPLE_TEXT = "<|im_start|>user\nWhat is 2 + 2?<|im_end|>\n<|im_start|>assistant\n4<|im_end|>\n"

TokenIds: TypeAlias = list[int]
Texts: TypeAlias = str | list[str] | TokenIds | list[TokenIds]
"""One text or several, rendered, or their token ids in the reward model's vocabulary."""


class Body(BaseModel):
    """A request of other projects' code: fields that rayward has no use for are ignored."""

    model_config = ConfigDict(extra="ignore")

    model: str | None = Field(default=None, description="Which of the served models; without it the first.")


class ContentPart(BaseModel):
    """A piece of a message's content; only `type` `"text"` can be scored."""

    type: str
    text: str | None = None


class ChatMessage(BaseModel):
    """A message as OpenAI's chat API has it. `name` is ignored, as the models' templates do."""

    role: str
    content: str | list[ContentPart]
    name: str | None = None
    tool_calls: list[Any] | None = None


@dataclass(frozen=True, slots=True)
class Asked:
    """Conversations to score, or why one cannot be read; `params` names each as the client's body does."""

    conversations: Sequence[Conversation | ApiError]
    params: Sequence[str]
    truncation: Truncation | None = None
    max_tokens: int | None = None

    def with_limits(self, truncation: Truncation | None, max_tokens: int | None) -> Self:
        return replace(self, truncation=truncation, max_tokens=max_tokens)


class Reader:
    """What bodies hold -> conversations for one model."""

    def __init__(self, service: ScoringService, model: str) -> None:
        self._service = service
        self._model = model

    def texts(self, texts: Texts, *, field: str, prompts: Sequence[object] | None = None) -> Asked:
        """Each rendered text as a conversation; `prompts` hold what each begins with, where that is known."""
        each = _each(texts)
        params = [field] if is_lone(texts) else [f"{field}[{place}]" for place in range(len(each))]
        known = prompts if prompts is not None and len(prompts) == len(each) else [None] * len(each)
        read = [self._text(text, param, prompt) for text, param, prompt in zip(each, params, known, strict=True)]
        return Asked(read, params)

    def messages(self, messages: Sequence[ChatMessage], *, field: str) -> Asked:
        """One conversation of messages."""
        try:
            return Asked([checked(parse_messages(messages, field=field), field=field)], [field])
        except ApiError as error:
            return Asked([error], [field])

    def answered(self, prompt: str, response: str, *, field: str) -> Asked:
        """A rendered or plain prompt and the response to it. Raises `ApiError` where the prompt cannot be read."""
        if not prompt:
            return Asked([checked([Message("assistant", response)], field=field)], ["response"])
        try:
            read = self._service.read_text(self._model, prompt + response, prompt=prompt)
        except ApiError as error:
            raise replace(error, param=field) from error
        return Asked([read], ["response"])

    def _text(self, text: str | TokenIds, param: str, prompt: object) -> Conversation | ApiError:
        try:
            whole = text if isinstance(text, str) else self._service.decode(self._model, text)
            return self._service.read_text(self._model, whole, prompt=prompt if isinstance(prompt, str) else None)
        except ApiError as error:
            return replace(error, param=param)


def is_lone(texts: Texts) -> bool:
    """Whether `texts` is one text, or the ids of one, and no list of them."""
    return isinstance(texts, str) or (bool(texts) and isinstance(texts[0], int))


def _each(texts: Texts) -> list[str | TokenIds]:
    return [texts] if is_lone(texts) else list(texts)  # type: ignore[list-item, arg-type]


@dataclass(frozen=True, slots=True)
class Answered:
    """What a model said to a request, each conversation's in its place."""

    model: str
    outcomes: Sequence[Score | ApiError]

    def values(self, activation: bool = False) -> list[float | None]:
        """Each score as it is, or its logistic sigmoid; null where there is none."""
        return [
            None if isinstance(each, ApiError) else _sigmoid(each.value) if activation else each.value
            for each in self.outcomes
        ]

    @property
    def num_tokens(self) -> list[int]:
        return [0 if isinstance(each, ApiError) else each.num_tokens for each in self.outcomes]

    @property
    def usage(self) -> dict[str, int]:
        """Tokens read, BOS and reward token included; a reward model writes none."""
        total = sum(self.num_tokens)
        return {"prompt_tokens": total, "total_tokens": total, "completion_tokens": 0}

    @property
    def errors(self) -> dict[str, Any]:
        """A key `errors` with what is wrong at each place without a score, or nothing."""
        found = [
            {"index": place, **each.body["error"]}
            for place, each in enumerate(self.outcomes)
            if isinstance(each, ApiError)
        ]
        return {"errors": found} if found else {}

    def listed(self, kind: str, data: list[Any]) -> dict[str, Any]:
        """An answer in the form of OpenAI's lists; `kind` begins its id."""
        head = {"id": f"{kind}-{uuid4().hex}", "object": "list", "created": int(time.time()), "model": self.model}
        return {**head, "data": data, "usage": self.usage, **self.errors}


B = TypeVar("B", bound=Body)


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialect(Generic[B]):
    """One request of another server and its answer.

    Args:
        paths: where it is served.
        summary, description: for `/docs`.
        body: the request.
        answers: the answer's type, for `/docs`.
        ask: what a body asks for.
        answer: the JSON that the client reads.
        ignores_model: whether the server takes any name for its only model in such a request.
        always_answers: whether a request none of whose conversations has a score is answered with nulls.
    """

    paths: Sequence[str]
    summary: str
    description: str
    body: type[B]
    answers: Any
    ask: Callable[[Reader, B], Asked]
    answer: Callable[[B, Answered], Any]
    ignores_model: Callable[[B], bool] = lambda body: False
    always_answers: bool = False


def add_route(router: APIRouter, service: ScoringService, dialect: Dialect[B]) -> None:
    """Serve `dialect` at its paths, answered by `service`."""

    async def endpoint(body: B) -> JSONResponse:
        is_ignored = len(service.model_names) == 1 and dialect.ignores_model(body)
        model = service.model_name(None if is_ignored else body.model)
        asked = dialect.ask(Reader(service, model), body)
        outcomes = await service.outcomes(
            model,
            asked.conversations,
            truncation=asked.truncation,
            max_tokens=asked.max_tokens,
            params=asked.params,
        )
        errors = [outcome for outcome in outcomes if isinstance(outcome, ApiError)]
        if errors and len(errors) == len(outcomes) and not dialect.always_answers:
            raise errors[0]
        if errors:
            count = f"{len(errors)} of {len(outcomes)}"
            logger.warning("%s: %s have no score; %s: %s", dialect.paths[0], count, errors[0].param, errors[0].message)
        return JSONResponse(dialect.answer(body, Answered(model, outcomes)))

    endpoint.__annotations__["body"] = dialect.body
    for path in dialect.paths:
        router.add_api_route(
            path,
            endpoint,
            methods=["POST"],
            summary=dialect.summary,
            description=dialect.description,
            response_model=dialect.answers,
            operation_id=path.strip("/").replace("/", "_"),
        )


def parse_messages(messages: Sequence[ChatMessage], *, field: str) -> list[Message]:
    """Messages with their content as one string. Raises `ApiError` 422 for what has no place in a rendered text."""
    return [Message(message.role, _content(message, f"{field}[{at}]")) for at, message in enumerate(messages)]


def _content(message: ChatMessage, path: str) -> str:
    if message.tool_calls:
        raise ApiError(422, "tool calls cannot be scored", "unsupported_content", f"{path}.tool_calls")
    if isinstance(message.content, str):
        return message.content
    for at, part in enumerate(message.content):
        if part.type != "text" or part.text is None:
            part_path = f"{path}.content[{at}]"
            raise ApiError(422, f"{part_path} is no text part; only text is scored", "unsupported_content", part_path)
    return "".join(part.text or "" for part in message.content)


def checked(messages: Sequence[Message], *, field: str) -> Conversation | ApiError:
    """A conversation of `messages`, or a 422 if it is empty or has text that is not valid Unicode."""
    try:
        return Conversation.parse(messages)
    except ConversationError as error:
        return ApiError(422, f"{field}: {error}", "invalid_conversation", field)


def _sigmoid(score: float) -> float:
    """1 / (1 + e^-score), without overflow."""
    return 1 / (1 + math.exp(-score)) if score >= 0 else math.exp(score) / (1 + math.exp(score))
