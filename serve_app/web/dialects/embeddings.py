"""`POST /v1/embeddings` as SGLang serves a reward model under it, in the form of OpenAI's embeddings API.

verl's (0.10) SGLang reward path calls it and reads `data[-1].embedding[-1]`.
"""

from __future__ import annotations

from typing import Literal

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field

from serve_app.web.dialects.openai_shape import EXAMPLE_TEXT, Texts, TokenUsage, read_texts, text_params
from serve_app.web.service import ScoringService


class EmbeddingsRequest(BaseModel):
    """Whole rendered texts."""

    model: str | None = Field(default=None, description="Which of the served models; without it the first.")
    input: Texts = Field(
        description="Rendered text, or a list of them: ChatML or the model's own chat template, with or without its "
        "BOS and reward token."
    )
    encoding_format: Literal["float"] = Field(default="float", description="Only numbers are sent, never base64.")
    user: str | None = Field(default=None, description="Ignored.")

    model_config = ConfigDict(extra="ignore", json_schema_extra={"examples": [{"input": EXAMPLE_TEXT}]})


class Embedding(BaseModel):
    """One text's score, as an embedding of one dimension."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float]


class EmbeddingsResponse(BaseModel):
    """One entry per input, in order."""

    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: TokenUsage


def routes(service: ScoringService) -> APIRouter:
    """`POST /v1/embeddings`."""
    router = APIRouter(tags=["dialects"])

    @router.post("/v1/embeddings", summary="Scores as OpenAI's embeddings API would give them")
    async def embeddings(body: EmbeddingsRequest) -> EmbeddingsResponse:
        """Scores rendered texts: each embedding is the score alone, a raw logit."""
        model = service.model_name(body.model)
        texts = read_texts(service, model, body.input, field="input")
        scores = await service.score(model, texts, params=text_params(body.input, field="input"))
        data = [Embedding(index=at, embedding=[score.value]) for at, score in enumerate(scores)]
        return EmbeddingsResponse(data=data, model=model, usage=TokenUsage.of(scores))

    return router
