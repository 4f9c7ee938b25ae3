"""Why a batcher returns no scores.

    RaywardError
    |- QueueFullError         too many tokens wait already: try again later
    |- DeadlineExceededError  the request's deadline passed while it waited
    |- ForwardError           the forward pass failed for this request, also alone
    |- BatcherClosedError     the batcher takes no more work
    `- BatcherStalledError    the batcher makes no progress: its replica should be replaced

A malformed or unscorable sequence is none of these: it is a `ScoringError` in its place among the results. The
arguments of each error are those of its constructor, which is how exceptions pickle.
"""

from __future__ import annotations

from serve_app.reward_model.errors import RaywardError


class QueueFullError(RaywardError):
    """`queued_tokens` wait already; they are estimated to be worked off in `retry_after_s` whole seconds."""

    def __init__(self, queued_tokens: int, retry_after_s: int) -> None:
        super().__init__(queued_tokens, retry_after_s)
        self.queued_tokens = queued_tokens
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return f"{self.queued_tokens} tokens wait already; try again in {self.retry_after_s} s"


class DeadlineExceededError(RaywardError):
    """The deadline passed before the forward pass began; the request had waited for `waited_s` seconds."""

    def __init__(self, waited_s: float) -> None:
        super().__init__(waited_s)
        self.waited_s = waited_s

    def __str__(self) -> str:
        return f"the deadline passed after {self.waited_s:.3f} s of waiting"


class ForwardError(RaywardError):
    """The forward pass raised an exception of class `cause_type` with the message `reason`.

    The exception itself is left out: it need not pickle, and its traceback holds on to the forward pass's tensors.
    """

    def __init__(self, cause_type: str, reason: str) -> None:
        super().__init__(cause_type, reason)
        self.cause_type = cause_type
        self.reason = reason

    def __str__(self) -> str:
        return f"the forward pass failed: {self.cause_type}: {self.reason}"


class BatcherClosedError(RaywardError):
    """The batcher is closed and scores no more requests."""

    def __str__(self) -> str:
        return "the batcher is closed and takes no requests"


class BatcherStalledError(RaywardError):
    """The batcher makes no progress; the message says how."""
