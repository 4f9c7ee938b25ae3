"""The engine: conversations in, scores out. It imports torch, Transformers and numpy, and no Ray.

A conversation's path: `conversation.py` checks it, `tokenizer.py` makes token ids of it, `packing.py` lays it beside
others, `decoder.py` runs the model (`linear.py`, `attention.py`, `rotary.py`), and `model.py` is the front door.
`checkpoint.py` loads a model: `families.py` is the table of architectures, `architecture.py` reads a configuration,
`weight_files.py`, `weights.py` and `head_weights.py` place tensors by name, `adapters.py` changes them on the way.
`heads.py` makes scores of hidden states; `tiny.py` is the embedded model; `scores.py` orders scores.
"""

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
from serve_app.reward_model.model import RewardModel, Score

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
