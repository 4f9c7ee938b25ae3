"""`/v1/rerank` and `/v2/rerank` in the form of Cohere's rerank API, which Jina's follows; `/rerank` as vLLM serves it.

The query is the user's turn, each document the assistant's: reranking is best-of-n with other words.
"""

from __future__ import annotations

from functools import partial
from typing import Any
from uuid import uuid4

from pydantic import BaseModel, ConfigDict, Field
from pydantic.config import JsonDict

from serve_app.reward_model import Message
from serve_app.reward_model.scores import order
from serve_app.web.dialects.dialect import Answered, Asked, Dialect, Reader, checked
from serve_app.web.dialects.vllm import ItemError, PoolingOptions, TokenUsage

EXAMPLE: JsonDict = {"query": "What is 2 + 2?", "documents": ["5", "4"], "top_n": 1}


class Document(BaseModel):
    """A document as an object."""

    text: str


class RerankRequest(PoolingOptions):
    """A query and the documents to order."""

    query: str
    documents: list[str | Document]
    top_n: int | None = Field(
        default=None, ge=0, description="How many of the best to return; without it, or with vLLM's 0, all."
    )
    return_documents: bool | None = Field(default=None, description="Whether results repeat the documents; default no.")
    rank_fields: list[str] | None = Field(default=None, description="Ignored: a document's field is `text`.")
    max_tokens_per_doc: int | None = Field(default=None, description="Ignored: nothing is shortened by documents.")
    max_chunks_per_doc: int | None = Field(default=None, description="Ignored: nothing is cut in pieces.")

    model_config = ConfigDict(extra="ignore", json_schema_extra={"examples": [EXAMPLE]})

    @property
    def texts(self) -> list[str]:
        return [document if isinstance(document, str) else document.text for document in self.documents]


class RerankResult(BaseModel):
    """One document, by its place in the request."""

    index: int
    relevance_score: float = Field(description="The raw logit: any real number, not one between 0 and 1.")
    document: Document | None = None


class RerankResponse(BaseModel):
    """Results from the best on; equal scores in input order. A document without a score is in `errors` alone."""

    id: str
    model: str
    results: list[RerankResult]
    meta: dict[str, Any]
    usage: TokenUsage
    errors: list[ItemError] | None = None


def ask_rerank(reader: Reader, body: RerankRequest) -> Asked:
    """Each document as the answer to the query."""
    body.wants_activation  # noqa: B018  # refused before anything is scored
    query = Message("user", body.query)
    params = [f"documents[{at}]" for at in range(len(body.documents))]
    read = [
        checked([query, Message("assistant", text)], field=param)
        for text, param in zip(body.texts, params, strict=True)
    ]
    return Asked(read, params).with_limits(*body.limits)


def _as_results(body: RerankRequest, answered: Answered, *, version: str) -> dict[str, Any]:
    values = answered.values(body.wants_activation)
    scored = [at for at, value in enumerate(values) if value is not None]
    best = order([value for value in values if value is not None])[: body.top_n or None]
    results: list[dict[str, Any]] = []
    for at in (scored[place] for place in best):
        document = {"document": {"text": body.texts[at]}} if body.return_documents else {}
        results.append({"index": at, "relevance_score": values[at], **document})
    meta = {"api_version": {"version": version}}
    head = {"id": uuid4().hex, "model": answered.model}
    return {**head, "results": results, "meta": meta, "usage": answered.usage, **answered.errors}


def _version(number: str, *paths: str) -> Dialect[RerankRequest]:
    return Dialect(
        paths=paths,
        summary=f"Documents ordered as Cohere's v{number} gives them",
        description="Orders documents by their score as the answer to the query. Scores are raw logits unless "
        "`use_activation` is true.",
        body=RerankRequest,
        answers=RerankResponse,
        ask=ask_rerank,
        answer=partial(_as_results, version=number),
    )


DIALECTS = (_version("1", "/rerank", "/v1/rerank"), _version("2", "/v2/rerank"))
