"""A request's body as it comes in: unpacked where it is compressed, and never larger than allowed."""

from __future__ import annotations

import importlib
import zlib
from collections.abc import Callable
from typing import Any, Protocol

from starlette.exceptions import HTTPException
from starlette.types import Message, Receive

from serve_app.web.service import ApiError


class BodyDecoder(Protocol):
    """Unpacks a body in pieces; `max_length` bounds one piece's output."""

    def decompress(self, data: bytes, max_length: int = ..., /) -> bytes:
        """The next bytes."""
        ...


def decoder_of(encoding: str) -> BodyDecoder | None:
    """What unpacks a body of that Content-Encoding; None for one that is not packed.

    Raises:
        ApiError: 415, it is none that can be unpacked here.
    """
    name = encoding.strip().lower()
    if name in ("", "identity"):
        return None
    if name in ("gzip", "x-gzip"):
        return zlib.decompressobj(16 + zlib.MAX_WBITS)
    if name == "deflate":
        return zlib.decompressobj()
    zstd = _zstd() if name == "zstd" else None
    if zstd is None:
        known = "gzip, deflate, zstd" if _zstd() else "gzip, deflate"
        text = f"the body's Content-Encoding is {name!r}; it may be {known}, or none"
        raise ApiError(415, text, "unsupported_content_encoding", "content-encoding")
    made: BodyDecoder = zstd()
    return made


def _zstd() -> Callable[[], Any] | None:
    """Python 3.14's own decompressor of Zstandard; older versions have none."""
    try:
        found: Callable[[], Any] = importlib.import_module("compression.zstd").ZstdDecompressor
    except ImportError:
        return None
    return found


class BoundedBody:
    """Receives a body of at most `max_bytes`, packed and unpacked, as an ASGI application does."""

    def __init__(self, receive: Receive, decoder: BodyDecoder | None, *, max_bytes: int) -> None:
        self._receive = receive
        self._decoder = decoder
        self._left = max_bytes

    async def __call__(self) -> Message:
        message = await self._receive()
        body = message.get("body", b"")
        if self._decoder is not None and body:
            try:
                body = self._decoder.decompress(body, self._left + 1)
            except Exception as error:  # zlib's and zstd's own
                # FastAPI, which reads the body, would make a 400 of any other error.
                raise HTTPException(415, "the body is not packed as its Content-Encoding says") from error
            message = {**message, "body": body}
        self._left -= len(body)
        if self._left < 0:
            raise HTTPException(413)
        return message
