"""Real models in this process behind the routes, without Ray."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from serve_app.reward_model import Conversation, ConversationLike, RewardModel, Score, ScoringError
from serve_app.reward_model.tokenizer import Truncation
from serve_app.web.service import ApiError


class EngineService:
    """`ScoringService` over models by name. It scores in the server's thread: one request at a time."""

    def __init__(self, models: Mapping[str, RewardModel]) -> None:
        self._models = models

    @property
    def model_names(self) -> list[str]:
        return list(self._models)

    def model_name(self, requested: str | None) -> str:
        if requested is None:
            return self.model_names[0]
        if requested not in self._models:
            raise ApiError(404, f"there is no model {requested!r}", "model_not_found", "model")
        return requested

    def max_tokens(self, model: str) -> int:
        return self._models[model].config.max_tokens

    def read_text(self, model: str, text: str) -> Conversation:
        return self._models[model].tokenizer.read_rendered(text)

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
        outcomes = self._models[model].outcomes(conversations, truncation=truncation, strict=strict)
        for place, outcome in enumerate(outcomes):
            if isinstance(outcome, ScoringError):
                where = params[place] if params else f"conversations[{place}]"
                raise ApiError(422, str(outcome), "invalid_conversation", where)
        return [outcome for outcome in outcomes if isinstance(outcome, Score)]

    async def ready(self) -> dict[str, bool]:
        return dict.fromkeys(self._models, True)
