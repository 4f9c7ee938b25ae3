"""rayward's own routes, their requests and responses: score, compare, rank, best of n, and what is served."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse
from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, JsonValue, PositiveInt, Tag
from pydantic_core import PydanticCustomError

from serve_app import reward_model
from serve_app.reward_model import Score
from serve_app.reward_model.scores import Aggregate, StepScores, order, ranks
from serve_app.reward_model.tokenizer import Truncation
from serve_app.reward_model.turn_list import TurnList
from serve_app.web.service import ApiError, ScoringService

QUESTION: dict[str, JsonValue] = {"role": "user", "content": "What is the capital of France?"}
GOOD: list[JsonValue] = [QUESTION, {"role": "assistant", "content": "Paris."}]
BAD: list[JsonValue] = [QUESTION, {"role": "assistant", "content": "I do not know."}]


class _Schema(BaseModel):
    model_config = ConfigDict(extra="forbid")


class MessageBody(_Schema):
    """One turn."""

    role: str = Field(description="user, assistant or system, as the model's chat template knows them")
    content: str


Messages = Annotated[
    list[MessageBody], Field(min_length=1, description="Messages; the last one is the response that is scored")
]
Reference = Annotated[
    str | list[MessageBody],
    Field(description="The answer that the response is compared with: POLAR's models need it, others take none"),
]


class ConversationWithReference(_Schema):
    """A conversation for a model that compares its response with a reference."""

    messages: Messages
    reference: Reference


def _kind(value: object) -> str:
    is_object = isinstance(value, ConversationWithReference) or (isinstance(value, dict) and "messages" in value)
    return "ConversationWithReference" if is_object else "Messages"


def _refuse_one_conversation(value: object) -> object:
    first = value[0] if isinstance(value, list) and value else value
    if isinstance(first, dict) and not {"messages", "reference"} & first.keys() and {"role", "content"} & first.keys():
        raise PydanticCustomError(
            "one_conversation", "this is one conversation; the field holds a list of them: send [[...]]"
        )
    return value


def _prompt_kind(value: object) -> str:
    return "Text" if isinstance(value, str) else "Messages"


# The tags are spelled as types are: `gate.py` leaves those out where it names the field that is wrong.
Conversation = Annotated[
    Annotated[Messages, Tag("Messages")] | Annotated[ConversationWithReference, Tag("ConversationWithReference")],
    Discriminator(_kind),
]
ModelName = Annotated[
    str | None,
    Field(
        description="A model of GET /v1/models, the folder or id behind it, or the last part of either; the first one "
        "by default"
    ),
]
TruncationOption = Annotated[
    Truncation | None,
    Field(
        description="What to do with a conversation over the model's length: refuse it (error); keep its start "
        "(right); or drop its oldest turns (left). By default the endpoint's option says, which is error unless set"
    ),
]
Conversations = Annotated[list[Conversation], BeforeValidator(_refuse_one_conversation)]


class _Request(_Schema):
    model: ModelName = None
    truncation: TruncationOption = None
    strict: bool = Field(
        False,
        description="Refuse what is a warning otherwise: an unknown role, a last message that is not the assistant's, "
        "an empty response, a chat template's markup spelled in a message",
    )


class ScoreRequest(_Request):
    """Conversations to score."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"conversations": [GOOD, BAD]}]})

    conversations: Conversations
    every_turn: bool = Field(
        False,
        description="Also give the score after each message of the assistant, which takes little longer than the last "
        "one alone; a conversation without such a message is an error",
    )


class ConversationInSteps(_Schema):
    """A conversation up to an answer, and the answer in steps."""

    messages: Annotated[list[MessageBody], Field(min_length=1, description="Messages before the answer")]
    steps: list[str] = Field(min_length=1, description="The answer's steps, in order")


class StepsRequest(_Schema):
    """Answers in steps to score, for a process reward model."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [{"conversations": [{"messages": [QUESTION], "steps": ["It is in the north.", "Paris."]}]}]
        },
    )

    model: ModelName = None
    conversations: list[ConversationInSteps]
    aggregate: Aggregate | None = Field(
        None, description="Also give one score for each answer: the product of its steps' scores, the minimum, the last"
    )
    strict: bool = Field(False, description="Refuse what is a warning otherwise, as /v1/score has it")


class CompareRequest(_Request):
    """Two conversations to compare."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"first": GOOD, "second": BAD}]})

    first: Conversation
    second: Conversation


class RankRequest(_Request):
    """Conversations to rank among each other."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"conversations": [BAD, GOOD]}]})

    conversations: Conversations


class BestOfNRequest(_Request):
    """Responses to one prompt, the best of which is wanted."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={"examples": [{"prompt": [QUESTION], "responses": ["Paris.", "I do not know."], "top_n": 1}]},
    )

    prompt: Annotated[str, Tag("Text")] | Annotated[Messages, Tag("Messages")] = Field(
        description="Messages, or the text of the user's only one", discriminator=Discriminator(_prompt_kind)
    )
    responses: list[str]
    reference: Reference | None = Field(None, description="For POLAR's models: what the responses are compared with")
    top_n: PositiveInt | None = Field(None, description="How many to return; all by default")


class Usage(_Schema):
    prompt_tokens: int = Field(description="Tokens of all conversations; a shared prompt counts for each of them")


class _Response(_Schema):
    model: str
    usage: Usage
    warnings: list[str] = Field(
        description="What looks wrong in conversations that were scored all the same: the field, the kind, the text"
    )


class ScoredConversation(_Schema):
    index: int = Field(description="Its place in the request")
    score: float = Field(description="The raw logit")
    num_tokens: int
    truncated: bool
    attributes: dict[str, float] | None = Field(
        None, description="What a gating head weighs to make the score, by name; left out for models without"
    )
    turn_scores: list[float] | None = Field(
        None, description="With every_turn: the score of the conversation up to each message of the assistant, in order"
    )
    turn_tokens: list[int] | None = Field(None, description="With every_turn: the tokens up to each of these messages")


class ScoreResponse(_Response):
    results: list[ScoredConversation] = Field(description="In the order of the request")


class ScoredSteps(_Schema):
    index: int = Field(description="Its place in the request")
    step_scores: list[float] = Field(description="The probability that each step is good, in order")
    score: float | None = Field(None, description="What the aggregate makes of them, where one was named")
    num_tokens: int = Field(description="Tokens up to where the last step is read")


class StepsResponse(_Response):
    results: list[ScoredSteps] = Field(description="In the order of the request")


class CompareResponse(_Response):
    scores: list[float] = Field(description="Of the first and the second")
    first_is_better: bool = Field(description="Whether the first scores strictly higher")
    margin: float = Field(description="The first's score less the second's")
    probability: float = Field(description="That the first is preferred, by Bradley-Terry: the logistic of the margin")


class RankedItem(_Schema):
    index: int
    score: float
    rank: int = Field(description="0 is the best; equal scores in the order of the request")


class RankResponse(_Response):
    results: list[RankedItem] = Field(description="In the order of the request")
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
    created: int = Field(default=0, description="Always 0: clients of OpenAI's API want a number")
    owned_by: str = "rayward"
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


def routes(service: ScoringService) -> APIRouter:
    """The routes, answered by `service`."""
    router = APIRouter(tags=["rayward"])

    @router.post("/v1/score", summary="Score conversations", response_model_exclude_none=True)
    async def score(request: ScoreRequest) -> ScoreResponse:
        model = service.model_name(request.model)
        if request.every_turn:
            return await _every_turn(service, model, request)
        scores = await service.score(
            model, _messages(request.conversations), truncation=request.truncation, strict=request.strict
        )
        results = [_scored(index, score) for index, score in enumerate(scores)]
        return ScoreResponse(model=model, results=results, usage=_usage(scores), warnings=_warnings(scores))

    @router.post("/v1/steps", summary="Score the steps of answers", response_model_exclude_none=True)
    async def steps(request: StepsRequest) -> StepsResponse:
        model = service.model_name(request.model)
        prompts: list[reward_model.ConversationLike] = [
            [message.model_dump() for message in each.messages] for each in request.conversations
        ]
        found = await service.score_steps(
            model, prompts, [each.steps for each in request.conversations], strict=request.strict
        )
        results = [
            ScoredSteps(
                index=index,
                step_scores=list(scores.values),
                score=None if request.aggregate is None else scores.aggregate(request.aggregate),
                num_tokens=scores.num_tokens,
            )
            for index, scores in enumerate(found)
        ]
        return StepsResponse(model=model, results=results, usage=_usage(found), warnings=_warnings(found))

    @router.post("/v1/compare", summary="Compare two conversations")
    async def compare(request: CompareRequest) -> CompareResponse:
        model = service.model_name(request.model)
        pair = _messages([request.first, request.second])
        params = ("first", "second")
        scores = await service.score(model, pair, truncation=request.truncation, params=params, strict=request.strict)
        first, second = (score.value for score in scores)
        return CompareResponse(
            model=model,
            scores=[first, second],
            first_is_better=first > second,
            margin=first - second,
            probability=_logistic(first - second),
            usage=_usage(scores),
            warnings=_warnings(scores, params),
        )

    @router.post("/v1/rank", summary="Rank conversations among each other")
    async def rank(request: RankRequest) -> RankResponse:
        model = service.model_name(request.model)
        scores = await service.score(
            model, _messages(request.conversations), truncation=request.truncation, strict=request.strict
        )
        values = [score.value for score in scores]
        places = ranks(values)
        results = [
            RankedItem(index=index, score=value, rank=rank)
            for index, (value, rank) in enumerate(zip(values, places, strict=True))
        ]
        return RankResponse(
            model=model, results=results, order=order(values), usage=_usage(scores), warnings=_warnings(scores)
        )

    @router.post("/v1/best_of_n", summary="Sort the responses to one prompt, the best first")
    async def best_of_n(request: BestOfNRequest) -> BestOfNResponse:
        model = service.model_name(request.model)
        prompt = _plain(request.prompt)
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        try:
            reward_model.Conversation.parse(prompt)
        except reward_model.ConversationError as error:  # it would be blamed on every response
            raise ApiError(422, str(error), "invalid_conversation", "prompt") from None
        answered = [[*prompt, {"role": "assistant", "content": response}] for response in request.responses]
        conversations: list[reward_model.ConversationLike] = [*answered]
        if request.reference is not None:
            reference = _plain(request.reference)
            conversations = [{"messages": messages, "reference": reference} for messages in answered]
        params = tuple(f"responses[{place}]" for place in range(len(conversations)))
        scores = await service.score(
            model, conversations, truncation=request.truncation, params=params, strict=request.strict
        )
        best_first = order([score.value for score in scores])[: request.top_n]
        results = [
            RankedAnswer(index=place, response=request.responses[place], score=scores[place].value)
            for place in best_first
        ]
        return BestOfNResponse(model=model, results=results, usage=_usage(scores), warnings=_warnings(scores, params))

    _add_status(router, service)
    return router


async def _every_turn(service: ScoringService, model: str, request: ScoreRequest) -> ScoreResponse:
    """The response with the score after each answer, beside that of each conversation as a whole."""
    turns = TurnList.of([_parsed(each) for each in _messages(request.conversations)], with_whole=True)
    wholes: list[int] = []
    for place, part in enumerate(turns.parts):
        if isinstance(part, reward_model.ScoringError):
            raise ApiError(422, str(part), "invalid_conversation", f"conversations[{place}]")
        wholes.append(part[-1])
    params = [
        f"conversations[{owner}]" if at == wholes[owner] else _message_path(request.conversations[owner], owner, length)
        for at, (owner, length) in enumerate(zip(turns.owners, turns.lengths, strict=True))
    ]
    scores = await service.score(model, turns.flat, truncation=request.truncation, params=params, strict=request.strict)
    results = []
    for index, own in enumerate(turns.scored(scores)):
        assert isinstance(own, list), "service.score raises errors"
        result = _scored(index, own[-1])
        result.truncated = any(score.truncated for score in own)
        result.turn_scores = [score.value for score in own[:-1]]
        result.turn_tokens = [score.num_tokens for score in own[:-1]]
        results.append(result)
    found: dict[tuple[int, str], str] = {}
    for at in (*wholes, *range(len(scores))):  # what is told of the whole is not told again of its turns
        for warning in scores[at].warnings:
            found.setdefault((turns.owners[at], warning), params[at])
    warnings = [f"{param}: {warning}" for (_, warning), param in sorted(found.items(), key=lambda item: item[0][0])]
    usage = _usage([scores[at] for at in wholes])
    return ScoreResponse(model=model, results=results, usage=usage, warnings=warnings)


def _message_path(conversation: Conversation, owner: int, length: int) -> str:
    """The field of a conversation's message that is the last of so many."""
    messages = ".messages" if isinstance(conversation, ConversationWithReference) else ""
    return f"conversations[{owner}]{messages}[{length - 1}]"


def _parsed(
    conversation: reward_model.ConversationLike,
) -> reward_model.Conversation | reward_model.ConversationError:
    try:
        return reward_model.Conversation.parse(conversation)
    except reward_model.ConversationError as error:
        return error


def _scored(index: int, score: Score) -> ScoredConversation:
    return ScoredConversation(
        index=index,
        score=score.value,
        num_tokens=score.num_tokens,
        truncated=score.truncated,
        attributes=dict(score.attributes) or None,
        turn_scores=None,
        turn_tokens=None,
    )


def _add_status(router: APIRouter, service: ScoringService) -> None:
    def entry(name: str) -> ModelEntry:
        return ModelEntry(id=name, max_tokens=service.max_tokens(name))

    @router.get("/v1/models", summary="The models served, the default first")
    async def models() -> ModelList:
        return ModelList(data=[entry(name) for name in service.model_names])

    @router.get("/v1/models/{model:path}", summary="One of the models served")
    async def one_model(model: str) -> ModelEntry:
        return entry(service.model_name(model))

    @router.head("/health", include_in_schema=False)
    @router.get("/health", summary="Whether every model can score", responses={503: {"model": Health}})
    async def health() -> JSONResponse:
        ready = await service.ready()
        body = Health(status="ok" if all(ready.values()) else "starting", models=ready)
        return JSONResponse(body.model_dump(), status_code=200 if all(ready.values()) else 503)


def _messages(conversations: Sequence[Conversation]) -> list[reward_model.ConversationLike]:
    return [
        {"messages": _plain(each.messages), "reference": _plain(each.reference)}
        if isinstance(each, ConversationWithReference)
        else [message.model_dump() for message in each]
        for each in conversations
    ]


def _plain(value: str | list[MessageBody]) -> str | list[dict[str, str]]:
    return value if isinstance(value, str) else [message.model_dump() for message in value]


def _warnings(scores: Sequence[Score | StepScores], params: Sequence[str] | None = None) -> list[str]:
    """The warnings of all scores, each with the field that it is about in front."""
    return [
        f"{params[place] if params else f'conversations[{place}]'}: {warning}"
        for place, score in enumerate(scores)
        for warning in score.warnings
    ]


def _usage(scores: Sequence[Score | StepScores]) -> Usage:
    return Usage(prompt_tokens=sum(score.num_tokens for score in scores))


def _logistic(margin: float) -> float:
    """1 / (1 + e^-margin), without overflow."""
    return 1 / (1 + math.exp(-margin)) if margin >= 0 else math.exp(margin) / (1 + math.exp(margin))
