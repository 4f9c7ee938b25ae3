"""An app of all dialects over a fake service: real reading of texts and real token ids, scores that can be foreseen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from fastapi.testclient import TestClient

from serve_app.reward_model import Conversation, ConversationLike, RewardModel, Score, ScoringError
from serve_app.reward_model.tokenizer import Tokenizer, Truncation
from serve_app.web.dialects import all_routes
from serve_app.web.service import ApiError

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
    limits: list[tuple[Truncation, int | None]] = field(default_factory=list)
    params: list[Sequence[str] | None] = field(default_factory=list)
    model_names: list[str] = field(default_factory=lambda: ["tiny", "large"])

    def model_name(self, requested: str | None) -> str:
        if requested is None:
            return self.model_names[0]
        if requested not in self.model_names:
            raise ApiError(404, f"no model {requested!r}", "model_not_found", "model")
        return requested

    def read_text(self, model: str, text: str) -> Conversation:
        try:
            return self.tokenizer.read_rendered(text)
        except ScoringError as error:
            raise ApiError(400, str(error), "unreadable_text") from error

    async def score(
        self,
        model: str,
        conversations: Sequence[ConversationLike],
        *,
        truncation: Truncation = "error",
        max_tokens: int | None = None,
        params: Sequence[str] | None = None,
        strict: bool = False,
    ) -> list[Score]:
        parsed = [Conversation.parse(conversation) for conversation in conversations]
        ids = [self.tokenizer.encode(item, truncation=truncation, max_tokens=max_tokens) for item in parsed]
        self.models.append(model)
        self.params.append(params)
        self.limits.append((truncation, max_tokens))
        self.conversations += parsed
        self.token_ids += ids
        return [
            Score(score_of(*(message.content for message in item.messages)), len(tokens))
            for item, tokens in zip(parsed, ids, strict=True)
        ]

    def max_tokens(self, model: str) -> int:
        return 1000

    async def ready(self) -> dict[str, bool]:
        return dict.fromkeys(self.model_names, True)


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
