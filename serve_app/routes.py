"""rayward's own routes: score, compare, rank, best of n, and what is served."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fastapi import APIRouter
from fastapi.responses import JSONResponse

from serve_app import reward_model
from serve_app.api_error import ApiError
from serve_app.reward_model import Score, ranking
from serve_app.schemas import (
    BestOfNRequest,
    BestOfNResponse,
    CompareRequest,
    CompareResponse,
    Conversation,
    Health,
    ModelEntry,
    ModelList,
    RankedAnswer,
    RankedConversation,
    RankRequest,
    RankResponse,
    ScoredConversation,
    ScoreRequest,
    ScoreResponse,
    Usage,
)
from serve_app.scoring_service import ScoringService

__all__ = ["routes"]


def routes(service: ScoringService) -> APIRouter:
    """The routes, answered by `service`."""
    router = APIRouter(tags=["rayward"])

    @router.post("/v1/score", summary="Score conversations")
    async def score(request: ScoreRequest) -> ScoreResponse:
        model = service.model_name(request.model)
        scores = await service.score(model, _messages(request.conversations), truncation=request.truncation)
        results = [
            ScoredConversation(index=index, score=score.value, num_tokens=score.num_tokens, truncated=score.truncated)
            for index, score in enumerate(scores)
        ]
        return ScoreResponse(model=model, results=results, usage=_usage(scores))

    @router.post("/v1/compare", summary="Compare two conversations")
    async def compare(request: CompareRequest) -> CompareResponse:
        model = service.model_name(request.model)
        pair = _messages([request.first, request.second])
        scores = await service.score(model, pair, truncation=request.truncation, params=("first", "second"))
        first, second = (score.value for score in scores)
        return CompareResponse(
            model=model,
            scores=[first, second],
            first_is_better=first > second,
            margin=first - second,
            probability=_logistic(first - second),
            usage=_usage(scores),
        )

    @router.post("/v1/rank", summary="Rank conversations among each other")
    async def rank(request: RankRequest) -> RankResponse:
        model = service.model_name(request.model)
        scores = await service.score(model, _messages(request.conversations), truncation=request.truncation)
        values = [score.value for score in scores]
        ranks = ranking.ranks(values)
        results = [
            RankedConversation(index=index, score=value, rank=rank)
            for index, (value, rank) in enumerate(zip(values, ranks, strict=True))
        ]
        return RankResponse(model=model, results=results, order=ranking.order(values), usage=_usage(scores))

    @router.post("/v1/best_of_n", summary="Sort the responses to one prompt, the best first")
    async def best_of_n(request: BestOfNRequest) -> BestOfNResponse:
        model = service.model_name(request.model)
        (prompt,) = _messages([request.prompt])
        try:
            reward_model.Conversation.parse(prompt)
        except reward_model.ConversationError as error:  # it would be blamed on every response
            raise ApiError(422, str(error), "invalid_conversation", "prompt") from None
        conversations = [[*prompt, {"role": "assistant", "content": response}] for response in request.responses]
        params = tuple(f"responses[{place}]" for place in range(len(conversations)))
        scores = await service.score(model, conversations, truncation=request.truncation, params=params)
        order = ranking.order([score.value for score in scores])[: request.top_n]
        results = [
            RankedAnswer(index=place, response=request.responses[place], score=scores[place].value) for place in order
        ]
        return BestOfNResponse(model=model, results=results, usage=_usage(scores))

    @router.get("/v1/models", summary="The models served, the default first")
    async def models() -> ModelList:
        entries = [ModelEntry(id=name, max_tokens=service.max_tokens(name)) for name in service.model_names]
        return ModelList(data=entries)

    @router.get("/health", summary="Whether every model can score", responses={503: {"model": Health}})
    async def health() -> JSONResponse:
        ready = await service.ready()
        body = Health(status="ok" if all(ready.values()) else "starting", models=ready)
        return JSONResponse(body.model_dump(), status_code=200 if all(ready.values()) else 503)

    return router


def _messages(conversations: Sequence[Conversation]) -> list[list[dict[str, str]]]:
    return [[{"role": m.role, "content": m.content} for m in conversation] for conversation in conversations]


def _usage(scores: Sequence[Score]) -> Usage:
    return Usage(prompt_tokens=sum(score.num_tokens for score in scores))


def _logistic(margin: float) -> float:
    """1 / (1 + e^-margin), without overflow."""
    return 1 / (1 + math.exp(-margin)) if margin >= 0 else math.exp(margin) / (1 + math.exp(margin))
