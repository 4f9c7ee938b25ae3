"""Wire formats that existing clients of reward models speak, one row of a table each, answered by the same scorer.

    dialect             a row: a body, how it asks, how it is answered; and the one route that all of them are
    vllm                vLLM: classify, pooling (LMDeploy's below /lmdeploy), score; OpenAI's embeddings
    sglang              SGLang's native API, and its rerank below /sglang
    rerank              Cohere, Jina, vLLM
    chat_completions    ms-swift
    trainers            OpenRLHF, LLaMA-Factory, slime
    status              what clients ask a server before they send anything

Every score is the model's raw logit unless the request asks for an activation by name. What is over the model's length
is shortened only where the request or the endpoint's `truncation` says so. Requests come from other projects' code:
unknown fields are ignored, but those that would change a score are honoured or refused.
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from serve_app.web.dialects import chat_completions, rerank, sglang, status, trainers, vllm
from serve_app.web.dialects.dialect import Dialect, add_route
from serve_app.web.service import ScoringService

DIALECTS: tuple[Dialect[Any], ...] = (
    *sglang.DIALECTS,
    *vllm.DIALECTS,
    *rerank.DIALECTS,
    *chat_completions.DIALECTS,
    *trainers.DIALECTS,
)


def all_routes(service: ScoringService) -> list[APIRouter]:
    """Routers for all dialects, answered by `service`."""
    router = APIRouter(tags=["dialects"])
    for dialect in DIALECTS:
        add_route(router, service, dialect)
    return [router, status.routes(service)]
