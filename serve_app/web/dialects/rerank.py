"""`POST /v1/rerank` and `/v2/rerank` in the form of Cohere's rerank API (v1 and v2), which Jina's follows.

The query is the user's turn, each document the assistant's: reranking is best-of-n with other words.
"""

from __future__ import annotations

from typing import Any
from uuid import uuid4

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field
from pydantic.config import JsonDict

from serve_app.reward_model import Message
from serve_app.reward_model.scores import order
from serve_app.web.dialects.openai_shape import TokenUsage, checked, text_params
from serve_app.web.service import ScoringService

EXAMPLE: JsonDict = {"query": "What is 2 + 2?", "documents": ["5", "4"], "top_n": 1}


class Document(BaseModel):
    """A document as an object."""

    text: str


class RerankRequest(BaseModel):
    """A query and the documents to order."""

    model: str | None = Field(default=None, description="Which of the served models; without it the first.")
    query: str
    documents: list[str | Document]
    top_n: int | None = Field(default=None, ge=1, description="How many of the best to return; without it all.")
    return_documents: bool | None = Field(default=None, description="Whether results repeat the documents; default no.")
    rank_fields: list[str] | None = Field(default=None, description="Ignored: a document's field is `text`.")
    max_tokens_per_doc: int | None = Field(default=None, description="Ignored: nothing is shortened.")
    max_chunks_per_doc: int | None = Field(default=None, description="Ignored: nothing is cut in pieces.")
    priority: int | None = Field(default=None, description="Ignored.")

    model_config = ConfigDict(extra="ignore", json_schema_extra={"examples": [EXAMPLE]})


class RerankResult(BaseModel):
    """One document, by its place in the request."""

    index: int
    relevance_score: float = Field(description="The raw logit: any real number, not one between 0 and 1.")
    document: Document | None = None


class RerankResponse(BaseModel):
    """Results from the best on; equal scores in input order."""

    id: str
    model: str
    results: list[RerankResult]
    meta: dict[str, Any]
    usage: TokenUsage


def routes(service: ScoringService) -> APIRouter:
    """`POST /v1/rerank` and `POST /v2/rerank`."""
    router = APIRouter(tags=["dialects"])

    async def rerank(body: RerankRequest, version: str) -> RerankResponse:
        model = service.model_name(body.model)
        texts = [document if isinstance(document, str) else document.text for document in body.documents]
        query = Message("user", body.query)
        conversations = [
            checked([query, Message("assistant", text)], field=f"documents[{at}]") for at, text in enumerate(texts)
        ]
        scores = await service.score(model, conversations, params=text_params(texts, field="documents"))
        best = order([score.value for score in scores])[: body.top_n]
        results = [
            RerankResult(
                index=at,
                relevance_score=scores[at].value,
                document=Document(text=texts[at]) if body.return_documents else None,
            )
            for at in best
        ]
        meta = {"api_version": {"version": version}}
        return RerankResponse(id=uuid4().hex, model=model, results=results, meta=meta, usage=TokenUsage.of(scores))

    @router.post(
        "/v1/rerank", response_model_exclude_none=True, summary="Documents ordered as Cohere's and Jina's v1 give them"
    )
    async def rerank_v1(body: RerankRequest) -> RerankResponse:
        """Orders documents by their score as the answer to the query. Scores are raw logits."""
        return await rerank(body, "1")

    @router.post("/v2/rerank", response_model_exclude_none=True, summary="Documents ordered as Cohere's v2 gives them")
    async def rerank_v2(body: RerankRequest) -> RerankResponse:
        """Orders documents by their score as the answer to the query. Scores are raw logits."""
        return await rerank(body, "2")

    return router
