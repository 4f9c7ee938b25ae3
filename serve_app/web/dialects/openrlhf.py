"""`POST /get_reward` as OpenRLHF (0.11) calls a remote reward model (`--remote_rm_url`).

`query` is prompt and response decoded with the policy's special tokens. With several URLs the first gets the sample
and the others an empty `query`, to which anything but 200 and empty lists ends the training.
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field

from serve_app.web.dialects.openai_shape import EXAMPLE_TEXT, read_texts, text_params
from serve_app.web.service import ScoringService


class GetRewardRequest(BaseModel):
    """One entry per sample in each list."""

    query: list[str] = Field(description="Whole rendered texts: ChatML or the model's own chat template.")
    prompts: list[Any] | None = Field(default=None, description="Ignored: `query` holds them.")
    labels: list[Any] | None = Field(default=None, description="Ignored.")

    model_config = ConfigDict(
        extra="ignore", json_schema_extra={"examples": [{"query": [EXAMPLE_TEXT], "prompts": [""], "labels": [""]}]}
    )


class GetRewardResponse(BaseModel):
    """One entry per query, in order."""

    rewards: list[float] = Field(description="Raw logits; OpenRLHF normalises and clips them itself where it is told.")
    scores: list[float] = Field(description="The same; OpenRLHF filters samples by them.")
    extra_logs: dict[str, list[float]] = Field(default_factory=dict, description="Nothing.")


def routes(service: ScoringService) -> APIRouter:
    """`POST /get_reward`."""
    router = APIRouter(tags=["dialects"])

    @router.post("/get_reward", summary="Rewards as OpenRLHF's remote reward model gives them")
    async def get_reward(body: GetRewardRequest) -> GetRewardResponse:
        """Scores whole rendered texts with the first of the served models. Empty lists are answered with such."""
        model = service.model_name(None)
        texts = read_texts(service, model, body.query, field="query")
        scores = await service.score(model, texts, params=text_params(body.query, field="query"))
        values = [score.value for score in scores]
        return GetRewardResponse(rewards=values, scores=values)

    return router
