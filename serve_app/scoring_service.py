"""What the HTTP routes, rayward's own and the dialects', need of the scorer behind them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from serve_app.reward_model import Conversation, ConversationLike, Score
from serve_app.reward_model.tokenizer import Truncation

__all__ = ["ScoringService"]


class ScoringService(Protocol):
    """Scores conversations with one of several models. Its methods raise `ApiError` for what a client did wrong."""

    @property
    def model_names(self) -> list[str]:
        """The models served, the default first."""
        ...

    def model_name(self, requested: str | None) -> str:
        """The model to use; the default for None. Raises `ApiError` 404 for one that is not served."""
        ...

    def read_text(self, model: str, text: str) -> Conversation:
        """A rendered text (ChatML or the model's own template) as a conversation. Raises `ApiError` 400."""
        ...

    async def score(
        self,
        model: str,
        conversations: Sequence[ConversationLike],
        *,
        truncation: Truncation = "error",
        max_tokens: int | None = None,
        params: Sequence[str] | None = None,
    ) -> list[Score]:
        """The score of each conversation, in order, or `ApiError` for the first that has none.

        `params` names each conversation in such an error; by default `conversations[0]` and so on.
        """
        ...

    def max_tokens(self, model: str) -> int:
        """The longest conversation that the model reads, in tokens."""
        ...

    async def ready(self) -> dict[str, bool]:
        """Whether each model can score now."""
        ...
