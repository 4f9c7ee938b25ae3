"""The HTTP application: routes, and what every request meets before and after them."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import traceback
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.web.api import ERRORS, routes
from serve_app.web.body import BoundedBody, decoder_of
from serve_app.web.dialects import all_routes
from serve_app.web.playground.page import playground
from serve_app.web.reference import reference
from serve_app.web.security import OPEN_PATHS, Guard
from serve_app.web.service import HEADER, ApiError, ScoringService, deadline_in, parse_timeout

logger = logging.getLogger("ray.serve")  # the one whose lines Serve keeps

MAX_BODY_BYTES = 32 * 2**20
MAX_IN_FLIGHT = 8192
"""Requests that one ingress process works on. More only wait for each other: their replicas bound tokens, not this."""
DESCRIPTION = """Scores of reward models: one raw logit for a conversation, the same bits whatever is asked beside it.

The routes under *rayward* are its own; the others answer what clients of other servers send. Send an API key as
`Authorization: Bearer KEY` or `X-API-Key: KEY` where the server has keys, and a deadline in seconds as
`X-Request-Timeout-S` if you like.
"""


def http_app(service: ScoringService, guard: Guard) -> FastAPI:
    """The application that answers with `service` whom `guard` lets pass."""
    app = FastAPI(title="rayward", description=DESCRIPTION, docs_url=None, redoc_url=None)
    app.include_router(routes(service), responses=ERRORS)
    for router in all_routes(service):
        app.include_router(router, responses=ERRORS)
    app.include_router(playground())
    app.include_router(reference(app))
    app.add_exception_handler(ApiError, _on_api_error)
    app.add_exception_handler(RequestValidationError, _on_invalid_request)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_middleware(Gate, guard=guard)
    return app


class Gate:
    """What comes before the routes: who asks, how much is asked already, and by when the answer is wanted."""

    def __init__(self, app: ASGIApp, guard: Guard) -> None:
        self._app = app
        self._guard = guard
        self._in_flight = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        sender = _Sender(send)
        scope = _plain_path(scope)
        try:
            await self._pass(scope, receive, sender)
        except ApiError as error:
            await _answer(error, scope, receive, sender)
        except Exception as error:
            # Where it happened, without the error's text: that may hold a conversation's, which is never logged.
            place = "".join(traceback.format_tb(error.__traceback__))
            logger.error("a request to %s failed with %s:\n%s", scope["path"], type(error).__name__, place)
            await _answer(ApiError(500, "something is wrong with the server", "internal_error"), scope, receive, sender)

    async def _pass(self, scope: Scope, receive: Receive, sender: _Sender) -> None:
        headers = {key.decode("latin-1").lower(): value.decode("latin-1") for key, value in scope["headers"]}
        client = scope.get("client")
        path = scope["path"].removeprefix(scope.get("root_path", "")) or "/"
        self._guard.check(
            path, headers.get("authorization"), client[0] if client else None, api_key=headers.get("x-api-key")
        )
        if scope["method"] == "POST":
            scope = _json_scope(scope, headers)
        length = headers.get("content-length", "0")
        if length.isdecimal() and (len(length) > 12 or int(length) > MAX_BODY_BYTES):
            raise _too_large()
        timeout = parse_timeout(headers[HEADER]) if HEADER in headers else None
        if self._in_flight >= MAX_IN_FLIGHT and path not in OPEN_PATHS:
            raise ApiError(503, f"{MAX_IN_FLIGHT} requests are under way already", "overloaded", retry_after_s=1)
        body = BoundedBody(receive, decoder_of(headers.get("content-encoding", "")), max_bytes=MAX_BODY_BYTES)
        self._in_flight += 1
        scope.setdefault("state", {})["in_flight"] = self._in_flight
        try:
            with deadline_in(timeout):
                async with asyncio.timeout(timeout):
                    await self._app(scope, body, sender)
        except TimeoutError:
            raise ApiError(408, f"no answer within {timeout} s", "deadline_exceeded") from None
        finally:
            self._in_flight -= 1


def _plain_path(scope: Scope) -> Scope:
    """The scope without doubled and trailing slashes in its path, as they stand where an address and a route meet.

    The slash right behind a prefix stays: the page there is found by it.
    """
    path = re.sub("/{2,}", "/", scope["path"])
    root = scope.get("root_path", "") if path.startswith(scope.get("root_path", "")) else ""
    rest = path.removeprefix(root)
    path = root + (rest.rstrip("/") or rest[:1])
    return scope if path == scope["path"] else {**scope, "path": path, "raw_path": path.encode("utf-8")}


def _json_scope(scope: Scope, headers: dict[str, str]) -> Scope:
    """The scope of a request with a JSON body, which may leave its content type out.

    Raises:
        ApiError: 415, it names another type.
    """
    given = headers.get("content-type", "").partition(";")[0].strip().lower()
    if given in ("", "application/json") or (given.startswith("application/") and given.endswith("+json")):
        others = [(key, value) for key, value in scope["headers"] if key.lower() != b"content-type"]
        return {**scope, "headers": [*others, (b"content-type", b"application/json")]}
    text = f"the body is JSON: send the header 'Content-Type: application/json', not {given!r}"
    raise ApiError(415, text, "unsupported_media_type", "content-type")


class _Sender:
    """Remembers whether an answer was begun."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.started = False

    async def __call__(self, message: Message) -> None:
        self.started = self.started or message["type"] == "http.response.start"
        await self._send(message)


async def _answer(error: ApiError, scope: Scope, receive: Receive, sender: _Sender) -> None:
    if not sender.started:
        await _response(error)(scope, receive, sender)


def _response(error: ApiError) -> Response:
    # ASCII, since a message may quote a name that is no valid Unicode.
    body = json.dumps(error.body, ensure_ascii=True).encode()
    return Response(body, error.status, error.headers, media_type="application/json")


def _too_large() -> ApiError:
    return ApiError(413, f"the body is larger than {MAX_BODY_BYTES // 2**20} MiB; split the list", "body_too_large")


async def _on_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return _response(error)


async def _on_invalid_request(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    # Where a field may be of several types, each has its error: the one that got furthest names the fault.
    first: dict[str, Any] = max(error.errors(), key=lambda each: len(each["loc"]))
    place = [part for part in first["loc"] if not _is_type(part)]
    if first["type"] == "json_invalid":
        return _response(_invalid_json())
    return _response(ApiError(422, first["msg"], "invalid_request", _path(place) or None))


def _is_type(part: str | int) -> bool:
    """Whether part of an error's place is no field, but `body` or the name of a type that was tried."""
    return isinstance(part, str) and (part in ("body", "str") or "[" in part or part[:1].isupper())


def _path(parts: list[str | int]) -> str:
    """`conversations[3][0].role`, as a client would write it."""
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts)
    return path.removeprefix(".")


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 415:
        return _response(ApiError(415, str(error.detail), "unsupported_media_type", "content-encoding"))
    if error.status_code == 400:  # what FastAPI makes of a body that its JSON parser gives up on
        return _response(_invalid_json())
    if error.status_code == 413:
        return _response(_too_large())
    if error.status_code == 404:
        return _response(ApiError(404, f"there is no route {request.url.path}", "not_found"))
    code = "method_not_allowed" if error.status_code == 405 else "http_error"
    response = _response(ApiError(error.status_code, str(error.detail), code))
    response.headers.update(error.headers or {})
    return response


def _invalid_json() -> ApiError:
    return ApiError(422, "the body is not valid JSON", "invalid_json")
