"""The deployment that speaks HTTP: checks requests, tokenises them and asks the models' replicas."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle

from serve_app.config import ServiceConfig
from serve_app.model_handle import ModelHandle
from serve_app.replica import RewardReplica
from serve_app.reward_model import Conversation, ConversationError, ConversationLike, Score, TokenIdsError
from serve_app.reward_model.scores import StepScores
from serve_app.reward_model.tokenizer import Truncation
from serve_app.web.gate import http_app
from serve_app.web.security import Guard
from serve_app.web.service import ApiError, served_name


class ModelService:
    """`ScoringService` over the replicas of several models."""

    def __init__(self, handles: Sequence[ModelHandle]) -> None:
        self._handles = {handle.config.name: handle for handle in handles}

    @property
    def model_names(self) -> list[str]:
        return list(self._handles)

    def model_name(self, requested: str | None) -> str:
        return served_name(requested, {name: handle.config.model for name, handle in self._handles.items()})

    def max_tokens(self, model: str) -> int:
        return self._handles[model].max_tokens

    def read_text(self, model: str, text: str, *, prompt: str | None = None) -> Conversation:
        try:
            return self._handles[model].tokenizer.read_rendered(text, prompt=prompt)
        except ConversationError as error:
            raise ApiError(400, str(error), "unreadable_text") from None

    def decode(self, model: str, token_ids: Sequence[int]) -> str:
        try:
            return self._handles[model].tokenizer.text_of(token_ids)
        except TokenIdsError as error:
            raise ApiError(422, str(error), "invalid_token_ids") from None

    async def score(
        self,
        model: str,
        conversations: Sequence[ConversationLike],
        *,
        truncation: Truncation | None = None,
        max_tokens: int | None = None,
        params: Sequence[str] | None = None,
        strict: bool = False,
    ) -> list[Score]:
        if not conversations:
            return []
        return await self._handles[model].score(
            conversations, truncation=truncation, max_tokens=max_tokens, params=params, strict=strict
        )

    async def outcomes(
        self,
        model: str,
        conversations: Sequence[ConversationLike | ApiError],
        *,
        truncation: Truncation | None = None,
        max_tokens: int | None = None,
        params: Sequence[str] | None = None,
    ) -> list[Score | ApiError]:
        if not conversations:
            return []
        return await self._handles[model].outcomes(
            conversations, truncation=truncation, max_tokens=max_tokens, params=params
        )

    async def score_steps(
        self,
        model: str,
        prompts: Sequence[ConversationLike],
        steps: Sequence[Sequence[str]],
        *,
        strict: bool = False,
    ) -> list[StepScores]:
        return await self._handles[model].score_steps(prompts, steps, strict=strict) if prompts else []

    async def ready(self) -> dict[str, bool]:
        answers = await asyncio.gather(*(handle.ready() for handle in self._handles.values()))
        return dict(zip(self._handles, answers, strict=True))


@serve.ingress()
class Ingress:
    """The deployment's class. `replicas` are the handles of the models' deployments, in the configuration's order.

    `key_digests` are those of the API keys that were in the environment where the endpoint was started.
    """

    def __init__(
        self, config: ServiceConfig, key_digests: Sequence[bytes], *replicas: DeploymentHandle[RewardReplica]
    ) -> None:
        self._guard = Guard.from_config(config, key_digests)
        self._guard.check_host(_http_host())
        pool = ThreadPoolExecutor(max(2, (os.cpu_count() or 2) // 2), thread_name_prefix="tokenizer")
        handles = [ModelHandle(model, handle, pool) for model, handle in zip(config.models, replicas, strict=True)]
        self._service = ModelService(handles)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return http_app(self._service, self._guard)


def _http_host() -> str | None:
    """The address that Serve's proxies listen on."""
    from ray.serve.context import _get_global_client  # Serve has no public way to ask

    client = _get_global_client()
    return None if client is None else str(client.http_config.host)
