"""Wire formats that existing clients of reward models speak, one file each, answered by the same scorer.

    classify         vLLM and SGLang          pooling        vLLM, XTuner, POLAR; LMDeploy's on request
    embeddings       SGLang                   openrlhf       OpenRLHF
    llamafactory     LLaMA-Factory            slime          slime
    rerank           Cohere and Jina          openai_shape   shared by those that look like OpenAI's API

Every score is the model's raw logit unless the request asks for an activation by name. Nothing is shortened unless
the request names a length. Requests come from other projects' code: fields that rayward has no use for are listed
where real clients send them, and unknown ones are ignored.
"""

from __future__ import annotations

from fastapi import APIRouter

from serve_app.web.dialects import classify, embeddings, llamafactory, openrlhf, pooling, rerank, slime
from serve_app.web.service import ScoringService


def all_routes(service: ScoringService) -> list[APIRouter]:
    """A router for each dialect, answered by `service`."""
    dialects = (classify, pooling, embeddings, openrlhf, llamafactory, slime, rerank)
    return [dialect.routes(service) for dialect in dialects]
