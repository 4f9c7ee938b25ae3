"""Requests and responses of rayward's own routes."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, JsonValue, PositiveInt

from serve_app.reward_model.tokenizer import Truncation

__all__ = [
    "ERRORS",
    "BestOfNRequest",
    "BestOfNResponse",
    "CompareRequest",
    "CompareResponse",
    "ErrorResponse",
    "Health",
    "ModelList",
    "RankRequest",
    "RankResponse",
    "ScoreRequest",
    "ScoreResponse",
]

QUESTION: dict[str, JsonValue] = {"role": "user", "content": "What is the capital of France?"}
GOOD: list[JsonValue] = [QUESTION, {"role": "assistant", "content": "Paris."}]
BAD: list[JsonValue] = [QUESTION, {"role": "assistant", "content": "I do not know."}]


class _Schema(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Message(_Schema):
    """One turn."""

    role: str = Field(description="user, assistant or system, as the model's chat template knows them")
    content: str


Conversation = Annotated[
    list[Message], Field(min_length=1, description="Messages; the last one is the response that is scored")
]
ModelName = Annotated[str | None, Field(description="A model of GET /v1/models; the first one by default")]
TruncationOption = Annotated[
    Truncation,
    Field(
        description="What to do with a conversation over the model's length: refuse it; keep its start (right); or "
        "drop its oldest turns (left)"
    ),
]


class _Request(_Schema):
    model: ModelName = None
    truncation: TruncationOption = "error"


class ScoreRequest(_Request):
    """Conversations to score."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"conversations": [GOOD, BAD]}]})

    conversations: list[Conversation]


class CompareRequest(_Request):
    """Two conversations to compare."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"first": GOOD, "second": BAD}]})

    first: Conversation
    second: Conversation


class RankRequest(_Request):
    """Conversations to rank among each other."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"conversations": [BAD, GOOD]}]})

    conversations: list[Conversation]


class BestOfNRequest(_Request):
    """Responses to one prompt, the best of which is wanted."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={"examples": [{"prompt": [QUESTION], "responses": ["Paris.", "I do not know."], "top_n": 1}]},
    )

    prompt: Conversation
    responses: list[str]
    top_n: PositiveInt | None = Field(None, description="How many to return; all by default")


class Usage(_Schema):
    prompt_tokens: int = Field(description="Tokens of all conversations; a shared prompt counts for each of them")


class _Response(_Schema):
    model: str
    usage: Usage


class ScoredConversation(_Schema):
    index: int = Field(description="Its place in the request")
    score: float = Field(description="The raw logit")
    num_tokens: int
    truncated: bool


class ScoreResponse(_Response):
    results: list[ScoredConversation] = Field(description="In the order of the request")


class CompareResponse(_Response):
    scores: list[float] = Field(description="Of the first and the second")
    first_is_better: bool = Field(description="Whether the first scores strictly higher")
    margin: float = Field(description="The first's score less the second's")
    probability: float = Field(description="That the first is preferred, by Bradley-Terry: the logistic of the margin")


class RankedConversation(_Schema):
    index: int
    score: float
    rank: int = Field(description="0 is the best; equal scores in the order of the request")


class RankResponse(_Response):
    results: list[RankedConversation] = Field(description="In the order of the request")
    order: list[int] = Field(description="Indices, the best first")


class RankedAnswer(_Schema):
    index: int
    response: str
    score: float


class BestOfNResponse(_Response):
    results: list[RankedAnswer] = Field(description="The best first")


class ModelEntry(_Schema):
    id: str
    object: str = "model"
    max_tokens: int = Field(description="The longest conversation, in tokens")


class ModelList(_Schema):
    object: str = "list"
    data: list[ModelEntry]


class Health(_Schema):
    status: str
    models: dict[str, bool] = Field(description="Whether each can score")


class ErrorBody(_Schema):
    message: str
    type: str
    param: str | None = Field(description="The field that is wrong")
    code: str | None


class ErrorResponse(_Schema):
    """Every error has this shape."""

    error: ErrorBody


ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse, "description": description}
    for status, description in {
        400: "A text cannot be read as a conversation",
        401: "The API key is missing or wrong",
        404: "There is no such model",
        408: "The deadline of the request passed",
        413: "The body is too large",
        422: "A field is wrong, or a conversation has no score; `param` names it",
        503: "Overloaded or not ready; see Retry-After",
    }.items()
}
