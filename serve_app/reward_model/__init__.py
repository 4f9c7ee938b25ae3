"""The engine: conversations in, scores out. It imports torch, Transformers and numpy, and no Ray.

`RewardModel` brings torch when it is first asked for: who reads options, help or errors does not wait for it.

A conversation's path: `conversation.py` checks it, `tokenizer.py` makes token ids of it, `packing.py` lays it beside
others, `decoder.py` runs the model (`linear.py`, `attention.py`, `rotary.py`), and `model.py` is the front door.
`model_files.py` finds a model, `checkpoint.py` and `architecture.py` load it; `tiny.py` is the embedded one;
`token_budget.py` says how much one pass reads; `scores.py` has a score and the orders of several.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from serve_app.reward_model.conversation import Conversation, ConversationLike, Message
from serve_app.reward_model.errors import (
    CheckpointError,
    ConversationError,
    ConversationTooLongError,
    DeviceMemoryError,
    NonFiniteScoreError,
    RaywardError,
    ScoringError,
    TokenIdsError,
    UnsupportedArchitectureError,
    WeightError,
)
from serve_app.reward_model.scores import Score

if TYPE_CHECKING:
    from serve_app.reward_model.model import RewardModel

__all__ = [
    "CheckpointError",
    "Conversation",
    "ConversationError",
    "ConversationLike",
    "ConversationTooLongError",
    "DeviceMemoryError",
    "Message",
    "NonFiniteScoreError",
    "RaywardError",
    "RewardModel",
    "Score",
    "ScoringError",
    "TokenIdsError",
    "UnsupportedArchitectureError",
    "WeightError",
]


def __getattr__(name: str) -> Any:
    if name == "RewardModel":
        from serve_app.reward_model.model import RewardModel

        return RewardModel
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
