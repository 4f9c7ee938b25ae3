"""Everything that routes need of the scorer behind them: how it is asked, by when, and how it refuses."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, Protocol

from serve_app.reward_model import Conversation, ConversationLike, Score
from serve_app.reward_model.scores import StepScores
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


def served_name(requested: str | None, served: Mapping[str, str]) -> str:
    """The name of the model that a request means.

    Args:
        requested: a name, the folder or Hugging Face id behind one, or the last part of either; None or an empty one
            means the first.
        served: the names of the models served, the first one the default, and the folder or id behind each.

    Raises:
        ApiError: 404, with the names that are served, where it is none of them, or the last part of several.
    """
    if not requested:
        return next(iter(served))
    if requested in served:
        return requested
    for spellings in (
        {name: {model} for name, model in served.items()},
        {n: _last_parts(n, served[n]) for n in served},
    ):
        fits = [name for name, known in spellings.items() if requested in known]
        if len(fits) == 1:
            return fits[0]
    names = ", ".join(map(repr, served))
    raise ApiError(404, f"there is no model {requested!r}; served: {names}", "model_not_found", "model")


def _last_parts(name: str, model: str) -> set[str]:
    return {PurePath(name).name, PurePath(model).name}


class ScoringService(Protocol):
    """Scores conversations with one of several models. Its methods raise `ApiError` for what a client did wrong."""

    @property
    def model_names(self) -> list[str]:
        """The models served, the default first."""
        ...

    def model_name(self, requested: str | None) -> str:
        """The model to use, as `served_name` has it. Raises `ApiError` 404 for one that is not served."""
        ...

    def read_text(self, model: str, text: str, *, prompt: str | None = None) -> Conversation:
        """A rendered text as a conversation; `prompt` is what it begins with, where that is known.

        Raises `ApiError` 400 for a text in no format that is read.
        """
        ...

    def decode(self, model: str, token_ids: Sequence[int]) -> str:
        """The text of token ids of the model's tokenizer. Raises `ApiError` 422 for one that it does not have."""
        ...

    async def score(
        self,
        model: str,
        conversations: Sequence[ConversationLike],
        *,
        truncation: Truncation | None = None,
        max_tokens: int | None = None,
        params: Sequence[str] | None = None,
        strict: bool = False,
    ) -> list[Score]:
        """The score of each conversation, in order, or `ApiError` for the first that has none.

        `truncation` and `max_tokens` are by default those of the model's configuration. `params` names each
        conversation in such an error; by default `conversations[0]` and so on. With `strict` what would be a warning of
        a score is an error.
        """
        ...

    async def outcomes(
        self,
        model: str,
        conversations: Sequence[ConversationLike | ApiError],
        *,
        truncation: Truncation | None = None,
        max_tokens: int | None = None,
        params: Sequence[str] | None = None,
    ) -> list[Score | ApiError]:
        """As `score`, with each conversation's own error in its place; an error among `conversations` stays.

        Raises `ApiError` for what keeps the whole request from being answered: overload, a deadline.
        """
        ...

    async def score_steps(
        self,
        model: str,
        prompts: Sequence[ConversationLike],
        steps: Sequence[Sequence[str]],
        *,
        strict: bool = False,
    ) -> list[StepScores]:
        """A process reward model's scores of each answer's steps, in order, or `ApiError` for the first that has none,
        also where the model scores no steps.
        """
        ...

    def max_tokens(self, model: str) -> int:
        """The longest conversation that the model reads, in tokens."""
        ...

    async def ready(self) -> dict[str, bool]:
        """Whether each model can score now."""
        ...
