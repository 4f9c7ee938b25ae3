"""What a client did wrong or may try again, as the HTTP answer it gets: OpenAI's error shape."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["ApiError"]


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
