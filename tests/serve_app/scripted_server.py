"""A real HTTP server on loopback whose answers a test decides, one by one."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    headers: dict[str, str]
    body: Any
    num_bytes: int


@dataclass(frozen=True)
class Reply:
    """`body` is sent as JSON, or as it is where it is bytes; `is_cut` promises more of it than comes."""

    body: Any
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    is_cut: bool = False


def refusal(status: int, message: str = "no", *, retry_after: str | None = None, **details: str) -> Reply:
    headers = {} if retry_after is None else {"Retry-After": retry_after}
    error = {"message": message, "type": "any", "param": None, "code": None, **details}
    return Reply({"error": error}, status, headers)


class ScriptedServer(ThreadingHTTPServer):
    """Answers with `answer(request)`; keeps what came, and how many requests were in flight at most."""

    daemon_threads = False

    def __init__(self, answer: Callable[[Request], Reply]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answer = answer
        self.requests: list[Request] = []
        self.released = threading.Event()
        self.max_in_flight = 0
        self._in_flight = 0
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def reply(self, request: Request) -> Reply:
        with self._lock:
            self.requests.append(request)
            self._in_flight += 1
            self.max_in_flight = max(self.max_in_flight, self._in_flight)
        try:
            return self.answer(request)
        finally:
            with self._lock:
                self._in_flight -= 1

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that has gone is what some tests are about."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # head and body are two writes
    timeout = 5  # seconds a connection that nobody closes keeps the test waiting
    server: ScriptedServer

    def do_GET(self) -> None:
        self._answer(b"")

    def do_POST(self) -> None:
        self._answer(self.rfile.read(int(self.headers["Content-Length"])))

    def _answer(self, content: bytes) -> None:
        body = json.loads(content) if content else None
        reply = self.server.reply(Request(self.command, self.path, dict(self.headers), body, len(content)))
        answer = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
        self.send_response(reply.status)
        for name, value in reply.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer) + 100 * reply.is_cut))
        self.end_headers()
        self.wfile.write(answer)
        if reply.is_cut:
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True

    def log_message(self, *args: object) -> None:
        """Nothing: the test has the requests."""


@contextmanager
def serving(answer: Callable[[Request], Reply]) -> Iterator[ScriptedServer]:
    with ScriptedServer(answer) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.released.set()
            server.shutdown()
            thread.join()
