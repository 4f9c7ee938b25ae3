"""How much work may wait for a model: plain arithmetic on what waits, and the rate that real passes show."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

RATE_MEMORY = 0.9
"""The share of their weight that earlier passes keep, with each pass, in a measured rate."""


@dataclass(slots=True)
class _Rate:
    """Tokens a second of the last passes, each weighted by its length; 0 before the first."""

    tokens: float = 0.0
    seconds: float = 0.0

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds if self.seconds > 0 else 0.0

    def add(self, tokens: int, seconds: float) -> None:
        self.tokens = self.tokens * RATE_MEMORY + tokens
        self.seconds = self.seconds * RATE_MEMORY + seconds


@dataclass(slots=True)
class Admission:
    """Whether a request may join those that wait.

    One that finds nobody waiting always may. Otherwise up to `burst` sequences may wait, however long they take, and
    beyond them as much as is done in `max_wait_s`. A request with a deadline that the measured rate cannot meet is
    refused, since scoring it would help nobody.

    The rate is that of passes that left others waiting: those are as full as they get, while a lone request shows
    nothing of what a batch does. Until there was one, the higher of the guess and of all passes stands for it.

    Args:
        max_queued_tokens: a bound in tokens in place of `burst` and `max_wait_s`, every sequence counted whole.
        max_wait_s: seconds.
        burst: sequences.
        guessed_tokens_per_s: measured before the first request, perhaps on a machine busy with something else.
    """

    max_queued_tokens: int | None = None
    max_wait_s: float = 0.0
    burst: int = 0
    guessed_tokens_per_s: float = 0.0
    _full: _Rate = field(default_factory=_Rate, init=False)
    _any: _Rate = field(default_factory=_Rate, init=False)

    def __post_init__(self) -> None:
        if self.max_queued_tokens is not None and self.max_queued_tokens < 1:
            raise ValueError(f"max_queued_tokens is positive: {self.max_queued_tokens}")

    @property
    def tokens_per_s(self) -> float:
        """Tokens that the model does in a second, every sequence counted whole; 0 where nothing is known."""
        return self._full.tokens_per_s or max(self.guessed_tokens_per_s, self._any.tokens_per_s)

    def measure(self, num_tokens: int, seconds: float, *, is_full: bool) -> None:
        """Learn from a pass of `num_tokens` that took `seconds`; `is_full` says that it left others waiting."""
        self._any.add(num_tokens, seconds)
        if is_full:
            self._full.add(num_tokens, seconds)

    def seconds_for(self, num_tokens: int) -> float:
        """Seconds until so many tokens are done; 0 where no rate is known."""
        rate = self.tokens_per_s
        return num_tokens / rate if rate else 0.0

    def admits(
        self,
        *,
        waiting_sequences: int,
        waiting_tokens: int,
        ahead_tokens: int,
        sequences: int,
        tokens: int,
        seconds_left: float,
    ) -> bool:
        """Whether a request may wait.

        Args:
            waiting_sequences, waiting_tokens: those in the queue.
            ahead_tokens: those in the queue and in the pass that runs.
            sequences, tokens: those of the request.
            seconds_left: until the request's deadline; infinite where it has none.
        """
        if not waiting_sequences:
            return True
        if self.max_queued_tokens is not None:
            return waiting_tokens + tokens <= self.max_queued_tokens
        if seconds_left < math.inf and self._full.seconds and self.seconds_for(ahead_tokens) > seconds_left:
            return False
        is_in_burst = waiting_sequences + sequences <= self.burst
        return is_in_burst or waiting_tokens + tokens <= self.tokens_per_s * self.max_wait_s

    def retry_after_s(self, ahead_tokens: int) -> int:
        """Whole seconds until so many tokens are done, at least 1."""
        return max(1, math.ceil(self.seconds_for(ahead_tokens)))
