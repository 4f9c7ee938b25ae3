"""The engine: conversations in, scores out. It imports torch, Transformers and numpy, and no Ray.

A conversation's path: `conversation.py` checks it, `tokenizer.py` makes token ids of it, `packing.py` lays it beside
others, `decoder.py` runs the model (`linear.py`, `attention.py`, `rotary.py`), and `model.py` is the front door.
`checkpoint.py` and `architecture.py` load a model, which `spec.py` names; `tiny.py` is the embedded one; `scores.py`
has a score and the orders of several.
"""

from serve_app.reward_model.conversation import Conversation, ConversationLike, Message
from serve_app.reward_model.errors import (
    ChangedFilesError,
    CheckpointError,
    ConversationError,
    ConversationTooLongError,
    DeviceMemoryError,
    NonFiniteScoreError,
    RaywardError,
    ScoringError,
    TokenIdsError,
    UnsupportedArchitectureError,
    UnsupportedDeviceError,
    WeightError,
)
from serve_app.reward_model.model import RewardModel
from serve_app.reward_model.scores import Score
from serve_app.reward_model.spec import ModelSpec

__all__ = [
    "ChangedFilesError",
    "CheckpointError",
    "Conversation",
    "ConversationError",
    "ConversationLike",
    "ConversationTooLongError",
    "DeviceMemoryError",
    "Message",
    "ModelSpec",
    "NonFiniteScoreError",
    "RaywardError",
    "RewardModel",
    "Score",
    "ScoringError",
    "TokenIdsError",
    "UnsupportedArchitectureError",
    "UnsupportedDeviceError",
    "WeightError",
]
