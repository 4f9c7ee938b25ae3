"""The engine: conversations in, scores out. It imports torch, Transformers and numpy, and no Ray.

A conversation's path: `conversation.py` checks it, `tokenizer.py` makes token ids of it, `packing.py` lays it beside
others, `decoder.py` runs the model (`linear.py`, `attention.py`, `rotary.py`), and `model.py` is the front door.
`checkpoint.py` and `architecture.py` load a model; `tiny.py` is the embedded one; `scores.py` orders scores.
"""

from serve_app.reward_model.conversation import Conversation, ConversationLike, Message
from serve_app.reward_model.errors import (
    CheckpointError,
    ConversationError,
    ConversationTooLongError,
    DeviceError,
    DeviceMemoryError,
    MalformedConversationError,
    NonFiniteScoreError,
    RaywardError,
    ScoringError,
    TokenIdsError,
    UnsupportedArchitectureError,
    WeightError,
)
from serve_app.reward_model.model import RewardModel, Score

__all__ = [
    "CheckpointError",
    "Conversation",
    "ConversationError",
    "ConversationLike",
    "ConversationTooLongError",
    "DeviceError",
    "DeviceMemoryError",
    "MalformedConversationError",
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
