"""minimind: a reward model for its PPO and GRPO scripts without the checkpoint's remote code. Read: master, 2026.

In `trainer/train_ppo.py` or `trainer/train_grpo.py`, after the imports:

    from cluster.rlhf.minimind import with_rayward

    LMForRewardModel = with_rayward(LMForRewardModel, source="http://127.0.0.1:8000")

minimind's class loads the model with `trust_remote_code=True`, folds the history into one user turn, asks the model
for `get_score(tokenizer, messages)` and clamps to [-3, 3]. `with_rayward` replaces the loading alone, so the numbers
are minimind's. Scripts that hold the model itself take a `RewardModelFacade` in its place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from cluster.rlhf.rollouts import RolloutScorer

CLAMP = 3.0
M = TypeVar("M", bound=type)


class RewardModelFacade:
    """The calls of the model card that trainers make of a loaded reward model, over any source of rewards."""

    def __init__(self, source: Any = None) -> None:
        self._scorer = RolloutScorer(source)

    def get_score(self, tokenizer: Any, conversation: Sequence[Mapping[str, str]]) -> float:
        """The raw logit of one conversation. `tokenizer` is not used: the reward model has its own."""
        return self.get_scores(tokenizer, [conversation])[0]

    def get_scores(self, tokenizer: Any, conversations: Sequence[Sequence[Mapping[str, str]]]) -> list[float]:
        """The raw logits of conversations: a list for any number of them."""
        return self._scorer.all_rewards_of([[dict(message) for message in messages] for messages in conversations])

    def to(self, *device: Any, **options: Any) -> RewardModelFacade:
        """Itself: the model is where its source has it."""
        return self

    def eval(self) -> RewardModelFacade:
        """Itself: it never trains."""
        return self

    def requires_grad_(self, requires_grad: bool = False) -> RewardModelFacade:
        """Itself: it has no gradients."""
        return self


class LMForRewardModel:
    """minimind's class without minimind: `get_score(messages, response)`, clamped. The history stays turns.

    Args:
        model_path, device, dtype: minimind's arguments; the model is the source's.
        source: see `RolloutScorer`.
    """

    def __init__(self, model_path: str = "", device: str = "", dtype: Any = None, *, source: Any = None) -> None:
        self.model = RewardModelFacade(source)
        self.tokenizer = None
        self.device = device

    def get_score(self, messages: Sequence[Mapping[str, str]], response: str) -> float:
        """The score of `response` to `messages`, not below -3 nor above 3."""
        conversation = [*messages, {"role": "assistant", "content": response}]
        return max(-CLAMP, min(CLAMP, self.model.get_score(None, conversation)))


def with_rayward(base: M, source: Any = None) -> M:
    """minimind's `LMForRewardModel` with rayward's scores: what it does to messages and scores stays its own."""

    class RaywardRewardModel(base):  # type: ignore[valid-type,misc]  # a class known at run time
        def __init__(self, model_path: str = "", device: str = "", dtype: Any = None) -> None:
            self.model = RewardModelFacade(source)
            self.tokenizer = None
            self.device = device

    made: Any = RaywardRewardModel
    return made  # type: ignore[no-any-return]
