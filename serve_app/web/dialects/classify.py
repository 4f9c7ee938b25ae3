"""`POST /classify` in two wire formats that share the path; the key of the body tells them apart.

`input` or `messages`: vLLM (0.32, its classification API), which verl's (0.10) vLLM reward path calls and reads
`data[-1].probs[-1]` of. `text`: SGLang's native API, which POLAR and XTuner call and read `[i].embedding[0]` of.
"""

from __future__ import annotations

import time
from typing import Any, Literal
from uuid import uuid4

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field

from serve_app.reward_model import Score
from serve_app.web.dialects.openai_shape import (
    EXAMPLE_TEXT,
    InputOrMessages,
    Texts,
    TokenUsage,
    activated,
    input_params,
    read_texts,
    text_or_messages,
    text_params,
)
from serve_app.web.service import ApiError, ScoringService


class ClassifyRequest(InputOrMessages):
    """vLLM's body with `input` or `messages`, or SGLang's with `text`."""

    text: Texts | None = Field(default=None, description="SGLang's name for `input`; the answer is then SGLang's.")
    rid: Any = Field(default=None, description="SGLang's request id; ignored.")
    sampling_params: Any = Field(default=None, description="SGLang's; ignored.")

    model_config = ConfigDict(
        extra="ignore",
        json_schema_extra={"examples": [{"input": [EXAMPLE_TEXT]}, {"text": [EXAMPLE_TEXT]}]},
    )


class Classification(BaseModel):
    """One text's score, as the only class of a classifier."""

    index: int
    label: str = "LABEL_0"
    probs: list[float] = Field(description="The score alone: a raw logit unless `use_activation` is true.")
    num_classes: int = 1


class VllmClassifications(BaseModel):
    """vLLM's answer, one entry per input, in order."""

    id: str
    object: Literal["list"] = "list"
    created: int = Field(description="Unix time in seconds.")
    model: str
    data: list[Classification]
    usage: TokenUsage


class MetaInfo(BaseModel):
    """Tokens read for one text."""

    id: str
    prompt_tokens: int


class SglangEmbedding(BaseModel):
    """One text's score, as an embedding of one dimension."""

    embedding: list[float]
    meta_info: MetaInfo


def routes(service: ScoringService) -> APIRouter:
    """`POST /classify`."""
    router = APIRouter(tags=["dialects"])

    @router.post("/classify", summary="Scores as vLLM or SGLang give them")
    async def classify(body: ClassifyRequest) -> VllmClassifications | list[SglangEmbedding]:
        """Scores rendered texts or one conversation. Scores are raw logits.

        With `input` or `messages` the answer has vLLM's form; there `use_activation: true` asks for the sigmoid,
        which vLLM applies by default and this service does not. With `text` it has SGLang's: a list, also for a lone
        string.
        """
        model = service.model_name(body.model)
        if body.text is None:
            scores = await service.score(model, text_or_messages(service, model, body), params=input_params(body))
            return _as_vllm(model, scores, body.use_activation)
        if body.input is not None or body.messages is not None:
            raise ApiError(
                422, "send 'text' (SGLang) or one of 'input' and 'messages' (vLLM)", "exactly_one_field", "text"
            )
        texts = read_texts(service, model, body.text, field="text")
        scores = await service.score(model, texts, params=text_params(body.text, field="text"))
        return _as_sglang(scores)

    return router


def _as_vllm(model: str, scores: list[Score], use_activation: bool | None) -> VllmClassifications:
    data = [Classification(index=at, probs=[activated(score, use_activation)]) for at, score in enumerate(scores)]
    return VllmClassifications(
        id=f"classify-{uuid4().hex}", created=int(time.time()), model=model, data=data, usage=TokenUsage.of(scores)
    )


def _as_sglang(scores: list[Score]) -> list[SglangEmbedding]:
    return [
        SglangEmbedding(embedding=[score.value], meta_info=MetaInfo(id=uuid4().hex, prompt_tokens=score.num_tokens))
        for score in scores
    ]
