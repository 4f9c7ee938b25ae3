"""What a call of the endpoint can end in, as one tree.

    RewardClientError
    |- AuthenticationError     the key is missing or wrong (401, 403)
    |- InvalidRequestError     the request is wrong; `param` names the field (400, 404, 422)
    |  `- TooLongError         a conversation is over the model's length (422) or a body over the server's limit (413)
    |- UnavailableError        no answer: the connection was refused or lost, or what stands before the server says so
    |  |                       (502, 503, 504, or a 500 that is none of the server's own)
    |  `- OverloadedError      the server has more to do than it takes on (503 with Retry-After, 429)
    |- DeadlineError           the call's time ran out, here or at the server (408)
    `- MalformedAnswerError    the answer is not what the route promises

Every class pickles, so that errors cross process borders whole.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from time import time

TOO_LONG_CODES = frozenset({"context_length_exceeded", "conversation_too_long"})
"""The `code` of a 422 that says a conversation is over the model's length; the first is OpenAI's word."""


class RewardClientError(Exception):
    """Base of every error of a call.

    `status` is the HTTP status, None where no answer came; `code` is the server's stable word for the error and
    `param` the field that is wrong, as in `conversations[3][0].role`, with the place in the list the caller gave.
    """

    def __init__(
        self, message: str, *, status: int | None = None, code: str | None = None, param: str | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.code = code
        self.param = param

    def __str__(self) -> str:
        told = {"status": self.status, "code": self.code, "param": self.param}
        details = ", ".join(f"{name} {value}" for name, value in told.items() if value is not None)
        return f"{self.message} ({details})" if details else self.message


class AuthenticationError(RewardClientError):
    """The server wants another API key than it got."""


class InvalidRequestError(RewardClientError):
    """The request is wrong and would be again; `status` is None where it was found before sending."""


class TooLongError(InvalidRequestError):
    """A conversation has more tokens than the model reads, or a request more bytes than the server takes."""


class UnavailableError(RewardClientError):
    """No answer came, after as many tries as are allowed."""

    retry_after_s: float | None = None
    """How long the server asks to be left alone, in seconds."""
    num_tries: int = 1
    """How often the request was sent."""

    def __str__(self) -> str:
        return super().__str__() + (f" after {self.num_tries} tries" if self.num_tries > 1 else "")


class OverloadedError(UnavailableError):
    """The server has more to do than it takes on, after as many tries as are allowed."""


class DeadlineError(RewardClientError):
    """The call's time ran out."""


class MalformedAnswerError(RewardClientError):
    """The answer is not JSON, or not of the route's shape; none of it is used."""


def error_of_answer(status: int, headers: Mapping[str, str], answer: object) -> RewardClientError:
    """The error that an answer other than 200 tells of; `answer` is its JSON, None where it is none."""
    error = answer.get("error") if isinstance(answer, dict) else None
    told = {name: value for name, value in error.items() if isinstance(value, str)} if isinstance(error, dict) else {}
    retry_after_s = _retry_after_s(headers.get("Retry-After"))
    kind = _error_class(status, told.get("code"), has_retry_after=retry_after_s is not None)
    if status == 500 and not told:
        kind = UnavailableError  # Serve's proxy says so in plain text of a process that died; a live one says why
    result = kind(
        told.get("message") or f"the server answered {status} without a reason",
        status=status,
        code=told.get("code"),
        param=told.get("param"),
    )
    if isinstance(result, UnavailableError):
        result.retry_after_s = retry_after_s
    return result


def _error_class(status: int, code: str | None, *, has_retry_after: bool) -> type[RewardClientError]:
    by_status: dict[int, type[RewardClientError]] = {
        401: AuthenticationError,
        403: AuthenticationError,
        408: DeadlineError,
        413: TooLongError,
        429: OverloadedError,
        502: UnavailableError,
        503: OverloadedError if has_retry_after else UnavailableError,
        504: UnavailableError,
    }
    if status in by_status:
        return by_status[status]
    if 400 <= status < 500:
        return TooLongError if code in TOO_LONG_CODES else InvalidRequestError
    return RewardClientError


def _retry_after_s(value: str | None) -> float | None:
    """Seconds from now: the header holds a number of them or a date (RFC 9110, 10.2.3). None where it is neither."""
    if value is None:
        return None
    if re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", value.strip()):
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time())
    except (ValueError, OverflowError):
        return None
