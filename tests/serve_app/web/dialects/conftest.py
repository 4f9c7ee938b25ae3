"""An app of all dialects over a fake service: real reading of texts and real token ids, scores that can be foreseen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from fastapi.testclient import TestClient

from serve_app.reward_model import Conversation, ConversationLike, RewardModel, Score, ScoringError
from serve_app.reward_model.scores import StepScores
from serve_app.reward_model.tokenizer import Tokenizer, Truncation
from serve_app.web.dialects import all_routes
from serve_app.web.service import ApiError, served_name

USER, ASSISTANT = "<|im_start|>user\n{}<|im_end|>\n", "<|im_start|>assistant\n{}<|im_end|>\n"


def rendered(*contents: str) -> str:
    """ChatML of `contents`, user and assistant in turn, without BOS and reward token: as verl strips the BOS."""
    turns = (USER, ASSISTANT)
    return "".join(turns[place % 2].format(content) for place, content in enumerate(contents))


def score_of(*contents: str) -> float:
    """What the fake gives a conversation of these contents: negative, a fraction, and other for another order."""
    return -sum((place + 1) * len(content) for place, content in enumerate(contents)) / 8


@dataclass
class FakeService:
    tokenizer: Tokenizer
    conversations: list[Conversation] = field(default_factory=list)
    token_ids: list[list[int]] = field(default_factory=list)
    models: list[str] = field(default_factory=list)
    limits: list[tuple[Truncation | None, int | None]] = field(default_factory=list)
    params: list[Sequence[str] | None] = field(default_factory=list)
    is_ready: bool = True
    model_names: list[str] = field(default_factory=lambda: ["tiny", "large"])

    def model_name(self, requested: str | None) -> str:
        return served_name(requested, {name: f"org/{name}" for name in self.model_names})

    def read_text(self, model: str, text: str, *, prompt: str | None = None) -> Conversation:
        try:
            return self.tokenizer.read_rendered(text, prompt=prompt)
        except ScoringError as error:
            raise ApiError(400, str(error), "unreadable_text") from error

    def decode(self, model: str, token_ids: Sequence[int]) -> str:
        try:
            return self.tokenizer.text_of(token_ids)
        except ScoringError as error:
            raise ApiError(422, str(error), "invalid_token_ids") from error

    async def outcomes(
        self,
        model: str,
        conversations: Sequence[ConversationLike | ApiError],
        *,
        truncation: Truncation | None = None,
        max_tokens: int | None = None,
        params: Sequence[str] | None = None,
    ) -> list[Score | ApiError]:
        """As the endpoint does: a conversation's own error stays in its place."""
        names = params or [""] * len(conversations)
        found: list[Score | ApiError] = []
        self.params.append(params)
        for conversation, name in zip(conversations, names, strict=True):
            if isinstance(conversation, ApiError):
                found.append(conversation)
                continue
            try:
                found += await self.score(model, [conversation], truncation=truncation, max_tokens=max_tokens)
            except ScoringError as error:
                found.append(ApiError(422, str(error), "context_length_exceeded", name))
        return found

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
        parsed = [Conversation.parse(conversation) for conversation in conversations]
        ids = [self.tokenizer.encode(item, truncation=truncation or "error", max_tokens=max_tokens) for item in parsed]
        self.models.append(model)
        self.limits.append((truncation, max_tokens))
        self.conversations += parsed
        self.token_ids += ids
        return [
            Score(score_of(*(message.content for message in item.messages)), len(tokens))
            for item, tokens in zip(parsed, ids, strict=True)
        ]

    async def score_steps(
        self,
        model: str,
        prompts: Sequence[ConversationLike],
        steps: Sequence[Sequence[str]],
        *,
        strict: bool = False,
    ) -> list[StepScores]:
        """As an endpoint of `tiny` does."""
        raise ApiError(422, f"{model} scores conversations, and no steps", "no_steps", "model")

    def max_tokens(self, model: str) -> int:
        return 1000

    async def ready(self) -> dict[str, bool]:
        return dict.fromkeys(self.model_names, self.is_ready)


@pytest.fixture
def service(tiny: RewardModel) -> FakeService:
    return FakeService(tiny.tokenizer)


@pytest.fixture
def client(service: FakeService) -> Iterator[TestClient]:
    app = FastAPI()
    for router in all_routes(service):
        app.include_router(router)

    @app.exception_handler(ApiError)
    def answer(request: Request, error: ApiError) -> JSONResponse:
        return JSONResponse(error.body, status_code=error.status, headers=error.headers)

    with TestClient(app) as client:
        yield client
