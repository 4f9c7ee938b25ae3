"""`POST /pooling` as vLLM (0.32) answers it for a reward model and XTuner and POLAR read it: `data[i].data[-1][0]`.

LMDeploy serves the same path with the bare number in `data[i].data`; `"format": "scalar"` asks for that.
"""

from __future__ import annotations

import time
from typing import Literal
from uuid import uuid4

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field

from serve_app.web.dialects.openai_shape import (
    EXAMPLE_TEXT,
    InputOrMessages,
    TokenUsage,
    activated,
    input_params,
    text_or_messages,
)
from serve_app.web.service import ScoringService


class PoolingRequest(InputOrMessages):
    """vLLM's body, and the choice of LMDeploy's answer."""

    format: Literal["rows", "scalar"] = Field(
        default="rows", description='"rows": `[[score]]`, as vLLM; "scalar": the bare number, as LMDeploy.'
    )
    encoding_format: Literal["float"] = Field(default="float", description="Only numbers are sent, never base64.")
    task: str | None = Field(default=None, description="Ignored.")

    model_config = ConfigDict(extra="ignore", json_schema_extra={"examples": [{"input": [EXAMPLE_TEXT]}]})


class Pooled(BaseModel):
    """One text's score."""

    index: int
    object: Literal["pooling"] = "pooling"
    data: list[list[float]] | float = Field(description="One row with the score, that of the last token.")


class PoolingResponse(BaseModel):
    """One entry per input, in order."""

    id: str
    object: Literal["list"] = "list"
    created: int = Field(description="Unix time in seconds.")
    model: str
    data: list[Pooled]
    usage: TokenUsage


def routes(service: ScoringService) -> APIRouter:
    """`POST /pooling`."""
    router = APIRouter(tags=["dialects"])

    @router.post("/pooling", summary="Scores as vLLM's pooling API or LMDeploy gives them")
    async def pooling(body: PoolingRequest) -> PoolingResponse:
        """Scores rendered texts or one conversation. Scores are raw logits unless `use_activation` is true.

        Where vLLM sends one row per token, this service sends the last token's alone: the only one that is a score.
        """
        model = service.model_name(body.model)
        scores = await service.score(model, text_or_messages(service, model, body), params=input_params(body))
        values = [activated(score, body.use_activation) for score in scores]
        scalar = body.format == "scalar"
        return PoolingResponse(
            id=f"pool-{uuid4().hex}",
            created=int(time.time()),
            model=model,
            data=[Pooled(index=at, data=value if scalar else [[value]]) for at, value in enumerate(values)],
            usage=TokenUsage.of(scores),
        )

    return router
