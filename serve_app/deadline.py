"""A request's deadline, from the header `X-Request-Timeout-S`, for the code that serves the request."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from serve_app.api_error import ApiError

__all__ = ["HEADER", "deadline_in", "parse_timeout", "seconds_left"]

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
