"""The middleware of Serve's proxies, around what is lost as an ingress is: it returns without an answer."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.serve import has_haproxy
from serve_app.web import proxy
from serve_app.web.gate import MAX_BODY_BYTES
from serve_app.web.proxy import PROXY_ENVIRONMENT, RepeatLost

PORT_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")

ROOT = Path(__file__).parents[3]
PIECES = [b'{"conversations"', b": ", b"[]}"]
GOOD: list[Message] = [
    {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]},
    {"type": "http.response.body", "body": b"{}", "more_body": False},
]


@dataclass
class Serve:
    """What stands for a proxy: reads `reads` pieces of each request, sends `sends[try]`, and returns."""

    sends: list[list[Message]]
    reads: int = len(PIECES)
    bodies: list[bytes] = field(default_factory=list)
    headers: list[dict[bytes, bytes]] = field(default_factory=list)
    during: Callable[[], None] = lambda: None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        number = len(self.bodies)
        self.headers.append(dict(scope["headers"]))
        scope["headers"].append((b"x-request-id", b"%d" % number))
        self.bodies.append(b"".join([(await receive()).get("body", b"") for _ in range(self.reads)]))
        self.during()
        for message in self.sends[number]:
            await send(message)


def ask(
    app: ASGIApp, messages: list[Message] | None = None, headers: dict[bytes, bytes] | None = None
) -> list[Message]:
    """What a client gets that sends `messages`."""
    last = len(PIECES) - 1
    pieces: list[Message] = [
        {"type": "http.request", "body": piece, "more_body": place < last} for place, piece in enumerate(PIECES)
    ]
    coming = iter(pieces if messages is None else messages)
    sent: list[Message] = []

    async def receive() -> Message:
        return next(coming)

    async def send(message: Message) -> None:
        sent.append(message)

    scope: dict[str, Any] = {
        "type": "http",
        "method": "POST",
        "path": "/v1/score",
        "headers": [*(headers or {}).items()],
    }
    asyncio.run(RepeatLost(app)(scope, receive, send))
    assert scope["headers"] == [*(headers or {}).items()]
    return sent


def test_an_answer_passes_as_it_is() -> None:
    serve = Serve([GOOD])
    assert ask(serve) == GOOD
    assert serve.bodies == [b"".join(PIECES)]


@pytest.mark.parametrize("reads", range(len(PIECES) + 1))
@pytest.mark.parametrize("num_lost", [1, 2])
def test_a_lost_request_is_asked_again_with_its_whole_body(num_lost: int, reads: int) -> None:
    read_first = Serve([[]], reads=reads)
    rest = Serve([[]] * (num_lost - 1) + [GOOD])

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await (rest if read_first.bodies else read_first)(scope, receive, send)

    assert ask(app) == GOOD
    assert rest.bodies == [b"".join(PIECES)] * num_lost
    assert rest.headers == [{}] * num_lost  # what one try adds to the headers, the next does not see


def test_an_answer_without_its_body_is_taken_back() -> None:
    assert ask(Serve([GOOD[:1], GOOD])) == GOOD


def test_an_answer_that_breaks_off_is_not_repeated() -> None:
    """The client has a part of it: Serve's proxy closes the connection."""
    broken = [GOOD[0], {**GOOD[1], "more_body": True}]
    serve = Serve([broken])
    assert ask(serve) == broken


def test_a_request_that_is_lost_each_time_ends_in_503() -> None:
    serve = Serve([[]] * 3)
    start, body = ask(serve)
    headers = dict(start["headers"])
    assert (start["status"], headers[b"retry-after"], headers[b"content-type"]) == (503, b"5", b"application/json")
    error = json.loads(body["body"])["error"]
    assert (error["code"], error["type"], error["param"]) == ("ingress_lost", "server_error", None)
    assert len(serve.bodies) == 3


def test_nothing_is_repeated_for_a_client_that_is_gone() -> None:
    serve = Serve([[]], reads=2)
    assert ask(serve, [{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}]) == []
    assert len(serve.bodies) == 1


def test_a_body_over_the_limit_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    assert proxy.MAX_KEPT_BYTES > MAX_BODY_BYTES
    monkeypatch.setattr(proxy, "MAX_KEPT_BYTES", sum(map(len, PIECES)) - 1)
    serve = Serve([[]])
    assert [message.get("status") for message in ask(serve)] == [503, None]
    monkeypatch.setattr(proxy, "MAX_KEPT_BYTES", sum(map(len, PIECES)))
    assert ask(Serve([[], GOOD])) == GOOD


def no_route() -> list[Message]:
    from ray.serve._private.http_util import convert_object_to_asgi_messages

    return list(convert_object_to_asgi_messages("Path '/v1/score' not found.", status_code=404))


def test_a_proxy_that_has_just_started_waits_for_its_routes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proxy, "ROUTES_PAUSE_S", 0.0)
    routes_late = Serve([no_route(), no_route(), no_route(), no_route(), GOOD], reads=0)
    assert ask(routes_late) == GOOD
    own_404: list[Message] = [{**GOOD[0], "status": 404}, GOOD[1]]
    assert ask(Serve([own_404])) == own_404
    monkeypatch.setattr(proxy, "ROUTES_WITHIN_S", 0.0)
    assert ask(Serve([no_route()], reads=0)) == no_route()


@pytest.mark.parametrize(
    ("told", "spent_s", "left"),
    [(b"30", 12.5, b"17.500"), (b"10", 12.5, b"0.001"), (b"soon", 12.5, b"soon"), (b"-1", 12.5, b"-1")],
)
def test_tries_share_the_deadline(monkeypatch: pytest.MonkeyPatch, told: bytes, spent_s: float, left: bytes) -> None:
    now = [100.0]
    monkeypatch.setattr("serve_app.web.proxy.monotonic", lambda: now[0])
    serve = Serve([[], GOOD], during=lambda: now.append(now.pop() + spent_s))
    headers = {proxy.TIMEOUT_HEADER: told, b"authorization": b"Bearer k"}
    assert ask(serve, headers=headers) == GOOD
    assert serve.headers == [headers, headers | {proxy.TIMEOUT_HEADER: left}]


@pytest.mark.skipif(not PORT_RANGE.exists(), reason="not Linux")
def test_ports_of_haproxy_are_free_and_none_that_ray_may_take() -> None:
    ports = proxy._free_ports(40)
    low = int(PORT_RANGE.read_text("ascii").split()[0])
    assert len(set(ports)) == 40
    assert max(ports) < low, "the range from which the system gives ports"


def test_a_port_of_haproxy_that_is_taken_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, third = proxy._free_ports(3)
    monkeypatch.setattr(proxy, "HAPROXY_PORTS", (first, second, third))
    with socket.socket() as taken:
        taken.bind(("", second))
        assert sorted(proxy._free_ports(2)) == sorted((first, third))


@pytest.mark.skipif(not has_haproxy(), reason="no HAProxy here")
def test_ray_reads_what_haproxy_is_told(tmp_path: Path) -> None:
    """A variable of another name would be without effect, and nobody would say so."""
    code = """if True:
        from ray.serve._private import constants
        print(constants.RAY_SERVE_HAPROXY_TIMEOUT_CONNECT_S, constants.RAY_SERVE_HAPROXY_HEALTH_CHECK_FALL,
              constants.RAY_SERVE_HAPROXY_HEALTH_CHECK_FASTINTER, constants.RAY_SERVE_ENABLE_HA_PROXY)
    """
    told = proxy.haproxy_environment(tmp_path)
    found = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | told, capture_output=True, text=True, check=True, timeout=120
    )
    assert found.stdout.split() == ["30", "6", "5s", "True"]
    spec = find_spec("ray")
    assert spec is not None
    assert spec.origin is not None
    known = (Path(spec.origin).parent / "serve" / "_private" / "constants.py").read_text("utf-8")
    assert [name for name in told if f'"{name}"' not in known] == []


def test_websockets_and_the_like_pass() -> None:
    seen: list[Scope] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope)

    async def never(*_: object) -> Any:
        raise AssertionError

    scope = {"type": "websocket"}
    asyncio.run(RepeatLost(app)(scope, never, never))
    assert seen == [scope]


def test_the_proxy_loads_it_and_neither_the_engine_nor_fastapi() -> None:
    """Under the names that Serve reads from the environment; a proxy stays small."""
    code = """
import sys
from serve_app.web.proxy import middlewares
print(sorted({'torch', 'transformers', 'fastapi', 'ray'} & set(sys.modules)))
from ray.serve._private import constants
from ray.serve._private.http_util import call_function_from_import_path, validate_http_proxy_callback_return
assert constants.PROXY_HEALTH_CHECK_PERIOD_S == 2
path = constants.RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH
print([each.cls.__name__ for each in validate_http_proxy_callback_return(call_function_from_import_path(path))])
"""
    command = [sys.executable, "-W", "ignore", "-c", code]
    environment = os.environ | PROXY_ENVIRONMENT
    found = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, env=environment)
    assert found.stdout.split("\n")[:2] == ["[]", "['RepeatLost']"]
