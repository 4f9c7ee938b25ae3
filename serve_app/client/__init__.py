"""Calls rayward's endpoint from services and trainers. It imports httpx and the standard library, no torch and no Ray.

`RewardClient` is for threads, `AsyncRewardClient` for event loops; the methods are the same. `batches.py` cuts long
lists into requests, `transport.py` sends one and tries again, `answers.py` checks what comes back.
"""

from serve_app.client.answers import Comparison, ModelInfo, RankedConversation, RankedResponse, Ranking, Score
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
from serve_app.client.transport import Messages, Truncation

__all__ = [
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
    "TooLongError",
    "Truncation",
    "UnavailableError",
]
