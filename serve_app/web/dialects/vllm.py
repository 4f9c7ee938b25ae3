"""vLLM (0.32): `/classify` and `/v1/classify`, `/pooling`, `/score`; and `/v1/embeddings`, which SGLang serves as well.

verl (0.10) calls `/classify` and reads `data[-1].probs[-1]`, or by SGLang `/v1/embeddings` and
`data[-1].embedding[-1]`; OpenAI's SDK asks for embeddings in base64. XTuner and POLAR read `/pooling` as
`data[i].data[-1][0]`. LMDeploy serves that path with the bare number in `data[i].data`, and its clients' requests look
the same: they find it below `/lmdeploy`, or ask with `"format": "scalar"`.
"""

from __future__ import annotations

import base64
import math
import struct
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from serve_app.reward_model import Message
from serve_app.reward_model.tokenizer import Truncation
from serve_app.web.dialects.dialect import (
    EXAMPLE_TEXT,
    Answered,
    Asked,
    Body,
    ChatMessage,
    Dialect,
    Reader,
    Texts,
    checked,
)
from serve_app.web.service import ApiError


class PoolingOptions(Body):
    """Options that vLLM's pooling routes share."""

    use_activation: bool | None = Field(
        default=None,
        description="true: the logistic sigmoid of the score. Off by default, unlike in vLLM: scores are raw logits.",
    )
    activation: bool | None = Field(default=None, description="The old name of `use_activation`.")
    softmax: bool | None = Field(
        default=None, description="An old name; true is refused, since a softmax over one class is always 1."
    )
    truncate_prompt_tokens: int | None = Field(
        default=None,
        ge=-1,
        description="The most tokens of a conversation, special ones included; -1 is the model's own limit.",
    )
    truncation_side: Literal["left", "right"] = Field(
        default="left",
        description="With `truncate_prompt_tokens`, left: drop the oldest turns and keep the response; right: keep the "
        "start.",
    )
    user: str | None = Field(default=None, description="Ignored.")
    priority: int | None = Field(default=None, description="Ignored.")
    request_id: Any = Field(default=None, description="Ignored.")

    @property
    def wants_activation(self) -> bool:
        if self.softmax:
            text = "'softmax' over one class is always 1; send 'use_activation' for the sigmoid"
            raise ApiError(422, text, "unsupported_option", "softmax")
        named = {value for value in (self.use_activation, self.activation) if value is not None}
        if len(named) == 2:
            raise ApiError(422, "'activation' and 'use_activation' differ", "unsupported_option", "activation")
        return named == {True}

    @property
    def limits(self) -> tuple[Truncation | None, int | None]:
        length = self.truncate_prompt_tokens
        if length is None:
            return None, None
        if length in (0, 1):
            text = "'truncate_prompt_tokens' is at least 2 (BOS and the reward token), or -1 for the model's length"
            raise ApiError(422, text, "invalid_request", "truncate_prompt_tokens")
        return self.truncation_side, None if length == -1 else length


class InputOrMessages(PoolingOptions):
    """A request with either whole rendered texts or one conversation."""

    input: Texts | None = Field(
        default=None,
        description="Rendered text, its token ids, or a list of either: ChatML, a known template or the model's own, "
        "with or without its BOS and reward token.",
    )
    messages: list[ChatMessage] | None = Field(
        default=None, description="One conversation instead of `input`; its last message is the one scored."
    )
    encoding_format: Literal["float", "base64"] = Field(
        default="float", description="base64: float32, little-endian, where the answer is no list of classes."
    )
    add_special_tokens: bool | None = Field(default=None, description="Ignored: there is always one BOS.")
    add_generation_prompt: bool | None = Field(default=None, description="Ignored: the last message is scored.")
    chat_template: str | None = Field(default=None, description="Refused: the model's own is used.")
    tools: list[Any] | None = Field(default=None, description="Refused: tools cannot be rendered.")

    model_config = ConfigDict(extra="ignore", json_schema_extra={"examples": [{"input": [EXAMPLE_TEXT]}]})


class TokenUsage(BaseModel):
    """Tokens read, BOS and reward token included; a reward model writes none."""

    prompt_tokens: int
    total_tokens: int
    completion_tokens: int = 0


class ItemError(BaseModel):
    """Why one conversation has no score."""

    index: int
    message: str
    type: str
    param: str | None
    code: str | None


class Listed(BaseModel):
    """One entry per input, in order."""

    id: str
    object: Literal["list"] = "list"
    created: int = Field(description="Unix time in seconds.")
    model: str
    usage: TokenUsage
    errors: list[ItemError] | None = Field(default=None, description="Only where a conversation has no score.")


class Classification(BaseModel):
    """One text's score, as the only class of a classifier."""

    index: int
    label: str = "LABEL_0"
    probs: list[float | None] = Field(description="The score alone: a raw logit unless `use_activation` is true.")
    num_classes: int = 1


class Classifications(Listed):
    """Scores as classes."""

    data: list[Classification]


class Pooled(BaseModel):
    """One text's score."""

    index: int
    object: Literal["pooling"] = "pooling"
    data: list[list[float | None]] | float | str | None = Field(description="One row with the score.")


class PoolingRequest(InputOrMessages):
    """vLLM's body, and the choice of LMDeploy's answer."""

    format: Literal["rows", "scalar"] = Field(
        default="rows", description='"rows": `[[score]]`, as vLLM; "scalar": the bare number, as LMDeploy.'
    )
    task: str | None = Field(default=None, description="Ignored.")


class PoolingResponse(Listed):
    """Scores as pooled rows."""

    data: list[Pooled]


class EmbeddingsRequest(InputOrMessages):
    """Whole rendered texts, or one conversation."""

    dimensions: int | None = Field(default=None, description="1 or none: a score is one number.")
    normalize: bool | None = Field(default=None, description="true is refused: a lone number would become 1 or -1.")


class Embedding(BaseModel):
    """One text's score, as an embedding of one dimension."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float | None] | str


class EmbeddingsResponse(BaseModel):
    """One entry per input, in order."""

    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: TokenUsage
    errors: list[ItemError] | None = None


class PairsRequest(PoolingOptions):
    """Pairs of a prompt and a response: one with each of several, or as many of both."""

    model_config = ConfigDict(
        extra="ignore", json_schema_extra={"examples": [{"text_1": "What is 2 + 2?", "text_2": ["4", "5"]}]}
    )

    text_1: str | list[str] | None = Field(default=None, description="The user's turn; `queries` is the same.")
    text_2: str | list[str] | None = Field(default=None, description="The response; `documents` is the same.")
    queries: str | list[str] | None = None
    documents: str | list[str] | None = None


class PairScore(BaseModel):
    """One pair's score."""

    index: int
    object: Literal["score"] = "score"
    score: float | None = Field(description="The raw logit unless `use_activation` is true.")


class PairScores(Listed):
    """One entry per pair."""

    data: list[PairScore]


def text_or_messages(reader: Reader, body: InputOrMessages) -> Asked:
    """The conversations of a request. Raises `ApiError` 422 unless it has exactly one of `input` and `messages`."""
    body.wants_activation  # noqa: B018  # refused before anything is scored
    for name in ("chat_template", "tools"):
        if getattr(body, name):
            raise ApiError(422, f"{name!r} cannot be honoured: the model's own template is used", "unsupported", name)
    if (body.input is None) == (body.messages is None):
        raise ApiError(422, "send exactly one of 'input' and 'messages'", "exactly_one_field", "input")
    if body.messages is not None:
        return reader.messages(body.messages, field="messages").with_limits(*body.limits)
    assert body.input is not None
    return reader.texts(body.input, field="input").with_limits(*body.limits)


def as_classes(body: PoolingOptions, answered: Answered) -> dict[str, Any]:
    """vLLM's answer: each score is the only class of a classifier."""
    return answered.listed(
        "classify",
        [
            {"index": at, "label": "LABEL_0", "probs": [value], "num_classes": 1}
            for at, value in enumerate(answered.values(body.wants_activation))
        ],
    )


def _as_rows(body: PoolingRequest, answered: Answered) -> dict[str, Any]:
    values = answered.values(body.wants_activation)
    rows: Sequence[Any] = [[[value]] for value in values]
    if body.format == "scalar":
        rows = values
    elif body.encoding_format == "base64":
        rows = [_base64(value) for value in values]
    return answered.listed("pool", [{"index": at, "object": "pooling", "data": row} for at, row in enumerate(rows)])


def _as_scalars(body: PoolingRequest, answered: Answered) -> dict[str, Any]:
    return _as_rows(body.model_copy(update={"format": "scalar"}), answered)


def _ask_embeddings(reader: Reader, body: EmbeddingsRequest) -> Asked:
    if body.normalize or body.dimensions not in (None, 1):
        name = "normalize" if body.normalize else "dimensions"
        raise ApiError(422, f"{name!r} cannot be honoured: the score is one number", "unsupported", name)
    return text_or_messages(reader, body)


def _as_embeddings(body: EmbeddingsRequest, answered: Answered) -> dict[str, Any]:
    values = answered.values(body.wants_activation)
    numbers = [_base64(value) if body.encoding_format == "base64" else [value] for value in values]
    data = [{"object": "embedding", "index": at, "embedding": number} for at, number in enumerate(numbers)]
    return {"object": "list", "data": data, "model": answered.model, "usage": answered.usage, **answered.errors}


def _base64(value: float | None) -> str:
    """The bytes of a float32, little-endian; NaN where there is no score."""
    return base64.b64encode(struct.pack("<f", math.nan if value is None else value)).decode("ascii")


def _ask_pairs(reader: Reader, body: PairsRequest) -> Asked:
    body.wants_activation  # noqa: B018
    (first, prompts), (second, responses) = (
        _named(body, "text_1", "queries"),
        _named(body, "text_2", "documents"),
    )
    if len(prompts) == 1:
        prompts = prompts * len(responses)
    if len(prompts) != len(responses):
        text = f"{first!r} holds one text, or as many as {second!r}: {len(prompts)} and {len(responses)}"
        raise ApiError(422, text, "invalid_request", first)
    params = [second if isinstance(getattr(body, second), str) else f"{second}[{at}]" for at in range(len(responses))]
    pairs = zip(prompts, responses, params, strict=True)
    read = [checked([Message("user", one), Message("assistant", two)], field=param) for one, two, param in pairs]
    return Asked(read, params).with_limits(*body.limits)


def _named(body: PairsRequest, name: str, other: str) -> tuple[str, list[str]]:
    given = [each for each in (name, other) if getattr(body, each) is not None]
    if len(given) != 1:
        raise ApiError(422, f"send exactly one of {name!r} and {other!r}", "exactly_one_field", name)
    value = getattr(body, given[0])
    return given[0], [value] if isinstance(value, str) else value


def _as_pairs(body: PairsRequest, answered: Answered) -> dict[str, Any]:
    values = answered.values(body.wants_activation)
    return answered.listed("score", [{"index": at, "object": "score", "score": each} for at, each in enumerate(values)])


RAW = "Scores are raw logits unless `use_activation` is true."
CLASSIFY = Dialect(
    paths=["/v1/classify"],
    summary="Scores as vLLM's or SGLang's classification API gives them",
    description=f"Scores rendered texts or one conversation. {RAW}",
    body=InputOrMessages,
    answers=Classifications,
    ask=text_or_messages,
    answer=as_classes,
)
POOLING = Dialect(
    paths=["/pooling"],
    summary="Scores as vLLM's pooling API or LMDeploy gives them",
    description=f"Scores rendered texts or one conversation. {RAW} Where vLLM sends one row per token, this service "
    "sends the last token's alone: the only one that is a score.",
    body=PoolingRequest,
    answers=PoolingResponse,
    ask=text_or_messages,
    answer=_as_rows,
)
LMDEPLOY = Dialect(
    paths=["/lmdeploy/pooling"],
    summary="Scores as LMDeploy's pooling API gives them",
    description="As `/pooling` with the bare number in `data[i].data`: for clients of LMDeploy, whose address is then "
    "`HOST:PORT/lmdeploy`.",
    body=PoolingRequest,
    answers=PoolingResponse,
    ask=text_or_messages,
    answer=_as_scalars,
)
EMBEDDINGS = Dialect(
    paths=["/v1/embeddings"],
    summary="Scores as OpenAI's embeddings API would give them",
    description="Scores rendered texts or one conversation: each embedding is the score alone, a raw logit, as a "
    "number or as the base64 of a float32, which OpenAI's SDK asks for.",
    body=EmbeddingsRequest,
    answers=EmbeddingsResponse,
    ask=_ask_embeddings,
    answer=_as_embeddings,
    ignores_model=lambda body: True,
)
SCORE = Dialect(
    paths=["/score"],
    summary="Scores of pairs as vLLM's score API gives them",
    description=f"Each pair is a user's turn and the response to it. {RAW}",
    body=PairsRequest,
    answers=PairScores,
    ask=_ask_pairs,
    answer=_as_pairs,
)
DIALECTS = (CLASSIFY, POOLING, LMDEPLOY, EMBEDDINGS, SCORE)
