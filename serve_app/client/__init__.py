"""Clients of rayward's endpoint, for services and trainers: httpx and the standard library, no torch and no Ray.

`RewardClient` is for threads, `AsyncRewardClient` for event loops; the methods are the same (clients). transport cuts
long lists into requests, sends them and tries again; answers checks what comes back; errors is the exception tree.
"""

from serve_app.client.answers import (
    Comparison,
    ModelInfo,
    RankedConversation,
    RankedResponse,
    Ranking,
    Score,
    StepwiseScore,
    TurnScores,
)
from serve_app.client.clients import AsyncRewardClient, RewardClient
from serve_app.client.errors import (
    AuthenticationError,
    DeadlineError,
    InvalidRequestError,
    MalformedAnswerError,
    OverloadedError,
    RewardClientError,
    TooLongError,
    UnavailableError,
)
from serve_app.client.transport import Aggregate, Messages, Truncation

__all__ = [
    "Aggregate",
    "AsyncRewardClient",
    "AuthenticationError",
    "Comparison",
    "DeadlineError",
    "InvalidRequestError",
    "MalformedAnswerError",
    "Messages",
    "ModelInfo",
    "OverloadedError",
    "RankedConversation",
    "RankedResponse",
    "Ranking",
    "RewardClient",
    "RewardClientError",
    "Score",
    "StepwiseScore",
    "TooLongError",
    "Truncation",
    "TurnScores",
    "UnavailableError",
]
