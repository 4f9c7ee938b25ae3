"""A scorer without a model, for tests of what is around it: a conversation's score is the length of its response."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from serve_app.reward_model import Conversation, ConversationError, ConversationLike, Score
from serve_app.reward_model.conversation import warnings_of
from serve_app.reward_model.scores import StepScores
from serve_app.reward_model.tokenizer import Truncation
from serve_app.web.service import ApiError, served_name


class FakeService:
    """`ScoringService` that notes what it is asked and fails as it is told."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.fails: Exception | None = None
        self.delay_s = 0.0
        self.cancelled = 0
        self.is_ready = True
        self.attributes: dict[str, float] = {}

    @property
    def model_names(self) -> list[str]:
        return ["first", "second"]

    def model_name(self, requested: str | None) -> str:
        return served_name(requested, {name: name for name in self.model_names})

    def max_tokens(self, model: str) -> int:
        return 1000

    def read_text(self, model: str, text: str, *, prompt: str | None = None) -> Conversation:
        return Conversation.parse([{"role": "user", "content": text}])

    def decode(self, model: str, token_ids: Sequence[int]) -> str:
        return "".join(map(chr, token_ids))

    async def outcomes(
        self,
        model: str,
        conversations: Sequence[ConversationLike | ApiError],
        *,
        truncation: Truncation | None = None,
        max_tokens: int | None = None,
        params: Sequence[str] | None = None,
    ) -> list[Score | ApiError]:
        good = [each for each in conversations if not isinstance(each, ApiError)]
        scores = iter(await self.score(model, good, truncation=truncation, params=params))
        return [each if isinstance(each, ApiError) else next(scores) for each in conversations]

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
        self.asked.append({"model": model, "conversations": conversations, "truncation": truncation, "strict": strict})
        try:
            await asyncio.sleep(self.delay_s)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self.fails is not None:
            raise self.fails
        scores = []
        for place, conversation in enumerate(conversations):
            try:
                parsed = Conversation.parse(conversation)
            except ConversationError as error:
                where = params[place] if params else f"conversations[{place}]"
                raise ApiError(422, str(error), "invalid_conversation", where) from None
            length = len(parsed.response.content)
            warnings = warnings_of(parsed)
            scores.append(Score(float(length), length + 1, warnings=warnings, attributes=self.attributes))
        return scores

    async def score_steps(
        self,
        model: str,
        prompts: Sequence[ConversationLike],
        steps: Sequence[Sequence[str]],
        *,
        strict: bool = False,
    ) -> list[StepScores]:
        """A step's score is its length."""
        self.asked.append({"model": model, "prompts": prompts, "steps": steps, "strict": strict})
        return [StepScores(tuple(float(len(step)) for step in own), len(own)) for own in steps]

    async def ready(self) -> dict[str, bool]:
        return {"first": True, "second": self.is_ready}
