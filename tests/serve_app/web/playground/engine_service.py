"""Real models in this process behind the routes, without Ray."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from serve_app.reward_model import Conversation, ConversationLike, RewardModel, Score, ScoringError
from serve_app.reward_model.scores import StepScores
from serve_app.reward_model.tokenizer import Truncation
from serve_app.web.service import ApiError, served_name


class EngineService:
    """`ScoringService` over models by name. It scores in the server's thread: one request at a time."""

    def __init__(self, models: Mapping[str, RewardModel]) -> None:
        self._models = models

    @property
    def model_names(self) -> list[str]:
        return list(self._models)

    def model_name(self, requested: str | None) -> str:
        return served_name(requested, {name: name for name in self._models})

    def max_tokens(self, model: str) -> int:
        return self._models[model].config.max_tokens

    def read_text(self, model: str, text: str, *, prompt: str | None = None) -> Conversation:
        return self._models[model].tokenizer.read_rendered(text, prompt=prompt)

    def decode(self, model: str, token_ids: Sequence[int]) -> str:
        return self._models[model].tokenizer.text_of(token_ids)

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
        scores = iter(await self.score(model, good, truncation=truncation))
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
        outcomes = self._models[model].outcomes(conversations, truncation=truncation or "error", strict=strict)
        for place, outcome in enumerate(outcomes):
            if isinstance(outcome, ScoringError):
                where = params[place] if params else f"conversations[{place}]"
                raise ApiError(422, str(outcome), "invalid_conversation", where)
        return [outcome for outcome in outcomes if isinstance(outcome, Score)]

    async def score_steps(
        self,
        model: str,
        prompts: Sequence[ConversationLike],
        steps: Sequence[Sequence[str]],
        *,
        strict: bool = False,
    ) -> list[StepScores]:
        outcomes = self._models[model].step_outcomes(prompts, steps, strict=strict)
        return [outcome for outcome in outcomes if isinstance(outcome, StepScores)]

    async def ready(self) -> dict[str, bool]:
        return dict.fromkeys(self._models, True)
