"""The engine: conversations in, scores out. It imports torch, Transformers and numpy, and no Ray.

A conversation's path:

    conversation     messages, checked at the boundary; turn_list: a score after each answer
    steps            answers in steps, for process reward models
    tokenizer        conversation -> token ids, truncation; markup: typed special tokens kept as text;
                     chat_template: a template checked; polar: the form of POLAR's models
    rendered_text    the way back: rendered text -> conversation
    turn_formats     how families of chat templates write turns, a table
    prefixes         sequences that begin alike, so that the model reads that once
    prefix_cache     keys and values of prefixes that were read, for the calls after it
    packing          sequences end to end under a token budget
    scorer           packed batches in turn; out of memory and not finite are met here
    decoder          packed batch -> hidden states, by linear (matrix products; onednn: on CPUs), attention and rotary;
                     row_kernels: what is done row by row, for CUDA; handover: between devices that share the layers
    heads            hidden states -> scores
    scores           a score, orders and ranks

A model's path: spec names it, model_files finds it, checkpoint loads it. families is the table of architectures,
architecture reads a configuration, adapter_config an adapter's; weight_files, weights and head_weights place tensors by
name, adapters and fp8_weights change them on the way; device_map spreads layers over devices, parked_weights puts them
away. token_budget says how much one pass reads, invariance probes this machine, processor names it; model is the front
door, tiny the embedded models and lessons what one of them was taught, errors the exception tree.

`RewardModel` brings torch when it is first asked for: who reads options, help or errors does not wait for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from serve_app.reward_model.conversation import Conversation, ConversationLike, Message
from serve_app.reward_model.errors import (
    ChangedFilesError,
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
    UnsupportedDeviceError,
    WeightError,
)
from serve_app.reward_model.scores import Score
from serve_app.reward_model.spec import ModelSpec

if TYPE_CHECKING:
    from serve_app.reward_model.model import RewardModel

__all__ = [
    "ChangedFilesError",
    "CheckpointError",
    "Conversation",
    "ConversationError",
    "ConversationLike",
    "ConversationTooLongError",
    "DeviceError",
    "DeviceMemoryError",
    "MalformedConversationError",
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


def __getattr__(name: str) -> Any:
    if name == "RewardModel":
        from serve_app.reward_model.model import RewardModel

        return RewardModel
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
