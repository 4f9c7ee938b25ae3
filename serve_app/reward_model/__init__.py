"""The engine: conversations in, scores out. It imports torch, Transformers and numpy, and no Ray.

A conversation's path:

    conversation     messages, checked at the boundary
    tokenizer        conversation -> token ids, truncation; markup: typed special tokens kept as text
    rendered_text    the way back: rendered text -> conversation
    prefixes         sequences that begin alike, so that the model reads that once
    packing          sequences end to end under a token budget
    scorer           packed batches in turn; out of memory and not finite are met here
    decoder          packed batch -> scores, by linear (matrix products), attention and rotary
    scores           a score, orders and ranks

A model's path: spec names it, checkpoint finds and checks its files, architecture reads its shape, weights fuses and
parked_weights puts them away; invariance probes this machine; model is the front door, tiny the embedded model, errors
the exception tree.
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
