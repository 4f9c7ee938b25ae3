"""`POST /v1/score/evaluation` as LLaMA-Factory serves it and its PPO calls it (`reward_model_type: api`).

Its client always sends the model name "model", which stands for the default here. It checks no status.
"""

from __future__ import annotations

from typing import Literal
from uuid import uuid4

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field

from serve_app.web.dialects.openai_shape import EXAMPLE_TEXT, read_texts, text_params
from serve_app.web.service import ApiError, ScoringService

DEFAULT_MODEL = "model"


class ScoreEvaluationRequest(BaseModel):
    """Whole decoded texts."""

    model: str | None = Field(default=None, description='Which of the served models; "model" is the first.')
    messages: list[str] = Field(description="Whole rendered texts: ChatML or the model's own chat template.")
    max_length: int | None = Field(
        default=None,
        ge=2,
        description="Tokens. A longer text loses its oldest turns, then the oldest tokens of its prompt; its last "
        "message and the reward token stay. Without it nothing is shortened.",
    )

    model_config = ConfigDict(
        extra="ignore", json_schema_extra={"examples": [{"model": DEFAULT_MODEL, "messages": [EXAMPLE_TEXT]}]}
    )


class ScoreEvaluationResponse(BaseModel):
    """One score per text, in order: a raw logit."""

    id: str
    object: Literal["score.evaluation"] = "score.evaluation"
    model: str
    scores: list[float]


def routes(service: ScoringService) -> APIRouter:
    """`POST /v1/score/evaluation`."""
    router = APIRouter(tags=["dialects"])

    @router.post("/v1/score/evaluation", summary="Scores as LLaMA-Factory's API gives them")
    async def score_evaluation(body: ScoreEvaluationRequest) -> ScoreEvaluationResponse:
        """Scores whole rendered texts; none at all are a 400, as in LLaMA-Factory."""
        model = service.model_name(None if body.model == DEFAULT_MODEL else body.model)
        if not body.messages:
            raise ApiError(400, "'messages' is empty; send at least one text", "empty", "messages")
        scores = await service.score(
            model,
            read_texts(service, model, body.messages, field="messages"),
            truncation="error" if body.max_length is None else "left",
            max_tokens=body.max_length,
            params=text_params(body.messages, field="messages"),
        )
        return ScoreEvaluationResponse(
            id=f"scoreeval-{uuid4().hex}", model=model, scores=[score.value for score in scores]
        )

    return router
