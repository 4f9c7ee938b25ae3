"""Everything that routes need of the scorer behind them: how it is asked, by when, and how it refuses."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

from serve_app.reward_model import Conversation, ConversationLike, Score
from serve_app.reward_model.tokenizer import Truncation


@dataclass(eq=False)
class ApiError(Exception):
    """An error with a status, answered as `{"error": {"message", "type", "param", "code"}}`.

    `param` names the field that is wrong, as in `conversations[3][0].role`; `code` is a short stable word.
    """

    status: int
    message: str
    code: str
    param: str | None = None
    retry_after_s: int | None = None

    def __post_init__(self) -> None:
        super().__init__(self.message)

    @property
    def body(self) -> dict[str, Any]:
        if self.status >= 500:
            kind = "server_error"
        elif self.status == 401:
            kind = "authentication_error"
        else:
            kind = "invalid_request_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.retry_after_s is None else {"Retry-After": str(self.retry_after_s)}


HEADER = "x-request-timeout-s"
MAX_SECONDS = 86_400.0
_deadline: ContextVar[float | None] = ContextVar("deadline", default=None)


def parse_timeout(value: str) -> float:
    """The header's seconds. Raises `ApiError` 422 for anything but a positive number."""
    try:
        seconds = float(value)
    except ValueError:
        seconds = float("nan")
    if not 0 < seconds <= MAX_SECONDS:
        raise ApiError(
            422, f"{HEADER} is a number of seconds above 0, up to {MAX_SECONDS:.0f}", "invalid_header", HEADER
        )
    return seconds


@contextmanager
def deadline_in(seconds: float | None) -> Iterator[None]:
    """Within it, `seconds_left` counts down from `seconds`."""
    token = _deadline.set(None if seconds is None else time.monotonic() + seconds)
    try:
        yield
    finally:
        _deadline.reset(token)


def seconds_left() -> float | None:
    """Seconds until the deadline of the request being served, at least 0; None where it has none."""
    deadline = _deadline.get()
    return None if deadline is None else max(0.0, deadline - time.monotonic())


class ScoringService(Protocol):
    """Scores conversations with one of several models. Its methods raise `ApiError` for what a client did wrong."""

    @property
    def model_names(self) -> list[str]:
        """The models served, the default first."""
        ...

    def model_name(self, requested: str | None) -> str:
        """The model to use; the default for None. Raises `ApiError` 404 for one that is not served."""
        ...

    def read_text(self, model: str, text: str) -> Conversation:
        """A rendered text (ChatML or the model's own template) as a conversation. Raises `ApiError` 400."""
        ...

    async def score(
        self,
        model: str,
        conversations: Sequence[ConversationLike],
        *,
        truncation: Truncation = "error",
        max_tokens: int | None = None,
        params: Sequence[str] | None = None,
        strict: bool = False,
    ) -> list[Score]:
        """The score of each conversation, in order, or `ApiError` for the first that has none.

        `params` names each conversation in such an error; by default `conversations[0]` and so on. With `strict` what
        would be a warning of a score is an error.
        """
        ...

    def max_tokens(self, model: str) -> int:
        """The longest conversation that the model reads, in tokens."""
        ...

    async def ready(self) -> dict[str, bool]:
        """Whether each model can score now."""
        ...
