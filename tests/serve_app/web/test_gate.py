"""rayward's own routes and the gate before them, over ASGI and without Ray."""

from __future__ import annotations

import asyncio
import base64
import gzip
import json
import math
import zlib
from typing import Any

import httpx
import pytest

from serve_app.reward_model import Conversation, RewardModel
from serve_app.web.gate import MAX_BODY_BYTES, http_app
from serve_app.web.security import Guard
from serve_app.web.service import ScoringService
from tests.conftest import chat
from tests.serve_app.web.fake_service import FakeService
from tests.serve_app.web.playground.engine_service import EngineService

SHORT, LONG = chat("What?", "No."), chat("What?", "Certainly.")
KEYS = Guard(["first-key", "second-key"])
U = {"role": "user", "content": "Hi"}


def basic(user_and_password: str) -> str:
    return f"Basic {base64.b64encode(user_and_password.encode()).decode()}"


def request(
    method: str, path: str, *, service: ScoringService | None = None, guard: Guard | None = None, **options: Any
) -> httpx.Response:
    client_address = options.pop("client", ("127.0.0.1", 1))

    async def send() -> httpx.Response:
        app = http_app(service or FakeService(), guard or Guard([]))
        transport = httpx.ASGITransport(app, client=client_address)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(method, path, **options)

    return asyncio.run(send())


def error_of(response: httpx.Response) -> dict[str, Any]:
    body = response.json()
    assert body.keys() == {"error"}
    assert body["error"].keys() == {"message", "type", "param", "code"}
    error: dict[str, Any] = body["error"]
    return error


def test_score() -> None:
    service = FakeService()
    body = {"model": "second", "conversations": [LONG, SHORT], "truncation": "left"}
    response = request("POST", "/v1/score", json=body, service=service)
    assert response.status_code == 200
    assert response.json() == {
        "model": "second",
        "results": [
            {"index": 0, "score": 10.0, "num_tokens": 11, "truncated": False},
            {"index": 1, "score": 3.0, "num_tokens": 4, "truncated": False},
        ],
        "usage": {"prompt_tokens": 15},
        "warnings": [],
    }
    assert service.asked[0]["truncation"] == "left"
    service.attributes = {"helpfulness": 0.5}
    response = request("POST", "/v1/score", json=body, service=service)
    assert [row["attributes"] for row in response.json()["results"]] == [{"helpfulness": 0.5}] * 2


def test_every_turn_has_the_bits_of_the_conversation_cut_there(tiny: RewardModel) -> None:
    talk = [U, {"role": "assistant", "content": ""}, *chat("Well?", "Yes, well.", "And?")]
    body = {"conversations": [SHORT, talk], "every_turn": True}
    answer = request("POST", "/v1/score", json=body, service=EngineService({"tiny": tiny})).json()
    first, second = answer["results"]
    assert first == {
        "index": 0,
        "score": tiny.get_score(SHORT),
        "num_tokens": first["num_tokens"],
        "truncated": False,
    } | {
        "turn_scores": [tiny.get_score(SHORT)],
        "turn_tokens": [first["num_tokens"]],
    }
    turns = tiny.score_turns(talk)
    assert (second["turn_scores"], second["score"]) == ([turn.value for turn in turns], tiny.get_score(talk))
    assert second["turn_tokens"] == [turn.num_tokens for turn in turns]
    assert answer["usage"]["prompt_tokens"] == first["num_tokens"] + second["num_tokens"]
    paths = [warning.partition(": the last")[0] for warning in answer["warnings"]]
    assert paths == ["conversations[1]: last_not_assistant", "conversations[1][1]: empty_response"]


@pytest.mark.parametrize(
    ("conversations", "options", "param"),
    [
        ([SHORT, [U]], {}, "conversations[1]"),
        ([SHORT, [U, {"role": "assistant", "content": ""}, *SHORT]], {"strict": True}, "conversations[1][1]"),
        ([{"messages": [*SHORT, U], "reference": "No."}], {}, "conversations[0].messages[1]"),
    ],
)
def test_the_turn_without_a_score_is_named(
    tiny: RewardModel, conversations: list[Any], options: dict[str, Any], param: str
) -> None:
    body = {"conversations": conversations, "every_turn": True, **options}
    response = request("POST", "/v1/score", json=body, service=EngineService({"tiny": tiny}))
    assert (response.status_code, error_of(response)["param"]) == (422, param)


def test_what_looks_wrong_is_told_with_its_place() -> None:
    odd = [{"role": "human", "content": "What?"}, {"role": "assistant", "content": ""}]
    for path, body, names in (
        ("score", {"conversations": [SHORT, odd]}, ["conversations[1]"] * 2),
        ("rank", {"conversations": [odd, SHORT]}, ["conversations[0]"] * 2),
        ("compare", {"first": SHORT, "second": odd}, ["second"] * 2),
        ("best_of_n", {"prompt": odd[:1], "responses": ["No.", ""]}, ["responses[0]", "responses[1]", "responses[1]"]),
    ):
        warnings = request("POST", f"/v1/{path}", json=body).json()["warnings"]
        assert [warning.partition(":")[0] for warning in warnings] == names
        assert "unknown_role: message 0 has the role 'human' (did you mean 'user'?)" in warnings[0]
        assert "empty_response" in warnings[-1]


@pytest.mark.parametrize("path", ["score", "rank", "compare", "best_of_n"])
@pytest.mark.parametrize("strict", [False, True])
def test_strictness_reaches_the_scorer(path: str, strict: bool) -> None:
    bodies: dict[str, dict[str, Any]] = {
        "compare": {"first": SHORT, "second": LONG},
        "best_of_n": {"prompt": SHORT[:1], "responses": ["No."]},
    }
    service = FakeService()
    body = bodies.get(path, {"conversations": [SHORT]}) | {"strict": strict}
    assert request("POST", f"/v1/{path}", json=body, service=service).status_code == 200
    assert service.asked[0]["strict"] is strict


@pytest.mark.parametrize(
    "reference", ["Yes.\nOr no.", [{"role": "assistant", "content": part} for part in ("Yes.", "Or no.")]]
)
def test_a_reference_may_stand_beside_the_messages(reference: Any) -> None:
    one = {"messages": SHORT, "reference": reference}
    for path, body in (
        ("score", {"conversations": [one, SHORT]}),
        ("rank", {"conversations": [one, SHORT]}),
        ("compare", {"first": one, "second": SHORT}),
        ("best_of_n", {"prompt": SHORT[:1], "responses": ["No."], "reference": reference}),
    ):
        service = FakeService()
        assert request("POST", f"/v1/{path}", json=body, service=service).status_code == 200
        first, *others = [Conversation.parse(asked) for asked in service.asked[0]["conversations"]]
        assert first.reference == "Yes.\nOr no."
        assert [message.content for message in first.messages] == ["What?", "No."]
        assert all(other.reference is None for other in others)


@pytest.mark.parametrize(
    ("conversation", "param"),
    [
        ({"messages": [{"role": "user"}], "reference": "x"}, "conversations[0].messages[0].content"),
        ({"messages": SHORT, "reference": [{"role": "user"}]}, "conversations[0].reference[0].content"),
        ({"messages": SHORT}, "conversations[0].reference"),
        ({"messages": SHORT, "reference": "x", "more": 1}, "conversations[0].more"),
        ([{"role": "user"}], "conversations[0][0].content"),
        ([], "conversations[0]"),
        ("text", "conversations[0]"),
    ],
)
def test_the_field_that_is_wrong_is_named_in_both_forms(conversation: Any, param: str) -> None:
    response = request("POST", "/v1/score", json={"conversations": [conversation]})
    assert (response.status_code, error_of(response)["param"]) == (422, param)


def test_an_empty_list_has_no_scores() -> None:
    for path in ("/v1/score", "/v1/rank"):
        response = request("POST", path, json={"conversations": []})
        assert (response.status_code, response.json()["results"]) == (200, [])


def test_answers_in_steps() -> None:
    service = FakeService()
    answers = [{"messages": [U], "steps": ["one", "three"]}, {"messages": [U], "steps": ["four"]}]
    body = {"conversations": answers, "aggregate": "product", "strict": True, "model": "second"}
    response = request("POST", "/v1/steps", json=body, service=service)
    assert response.json() == {
        "model": "second",
        "usage": {"prompt_tokens": 3},
        "warnings": [],
        "results": [
            {"index": 0, "step_scores": [3.0, 5.0], "score": 15.0, "num_tokens": 2},
            {"index": 1, "step_scores": [4.0], "score": 4.0, "num_tokens": 1},
        ],
    }
    assert service.asked == [
        {"model": "second", "prompts": [[U], [U]], "steps": [["one", "three"], ["four"]], "strict": True}
    ]
    (first, _) = request("POST", "/v1/steps", json={"conversations": answers}).json()["results"]
    assert "score" not in first


def test_compare() -> None:
    body = request("POST", "/v1/compare", json={"first": SHORT, "second": LONG}).json()
    assert body["scores"] == [3.0, 10.0]
    assert body["first_is_better"] is False
    assert body["margin"] == -7.0
    assert body["probability"] == pytest.approx(1 / (1 + math.exp(7)))
    assert request("POST", "/v1/compare", json={"first": LONG, "second": LONG}).json()["probability"] == 0.5


def test_compare_survives_a_margin_whose_exponential_does_not() -> None:
    long = chat("What?", "a" * 5000)
    assert request("POST", "/v1/compare", json={"first": long, "second": SHORT}).json()["probability"] == 1.0
    assert request("POST", "/v1/compare", json={"first": SHORT, "second": long}).json()["probability"] == 0.0


def test_rank() -> None:
    body = request("POST", "/v1/rank", json={"conversations": [SHORT, LONG, SHORT, chat("What?", "Maybe.")]}).json()
    assert [result["rank"] for result in body["results"]] == [2, 0, 3, 1]
    assert body["order"] == [1, 3, 0, 2]


def test_best_of_n() -> None:
    body = {"prompt": SHORT[:1], "responses": ["No.", "Certainly.", "Maybe."], "top_n": 2}
    assert request("POST", "/v1/best_of_n", json=body).json()["results"] == [
        {"index": 1, "response": "Certainly.", "score": 10.0},
        {"index": 2, "response": "Maybe.", "score": 6.0},
    ]


def test_the_prompt_of_best_of_n_may_be_text() -> None:
    service = FakeService()
    body = {"prompt": "Hi", "responses": ["No."]}
    assert request("POST", "/v1/best_of_n", service=service, json=body).status_code == 200
    assert service.asked[0]["conversations"] == [[U, {"role": "assistant", "content": "No."}]]


def test_a_body_that_is_one_conversation_says_so() -> None:
    for path in ("/v1/score", "/v1/rank"):
        error = error_of(request("POST", path, json={"conversations": SHORT}))
        assert "one conversation" in error["message"]


def test_the_endpoints_truncation_is_the_default() -> None:
    service = FakeService()
    for body in ({"conversations": [[U]]}, {"conversations": [[U]], "truncation": None}):
        assert request("POST", "/v1/score", service=service, json=body).status_code == 200
    assert [asked["truncation"] for asked in service.asked] == [None, None]


def test_one_model_by_its_name() -> None:
    entry = request("GET", "/v1/models/second").json()
    assert entry == {"id": "second", "object": "model", "max_tokens": 1000, "created": 0, "owned_by": "rayward"}
    assert request("GET", "/v1/models/third").status_code == 404
    assert request("GET", "/v1/models/some/second").status_code == 404


def test_slashes_where_an_address_and_a_route_meet() -> None:
    for path in ("/v1/score/", "//v1/score", "/v1//score//"):
        response = request("POST", f"http://test{path}", json={"conversations": [[U]]})
        assert response.status_code == 200
    assert request("GET", "http://test//").status_code == 200


def test_packed_bodies_are_unpacked() -> None:
    body = json.dumps({"conversations": [[U]]}).encode()
    for encoding, packed in [("gzip", gzip.compress(body)), ("deflate", zlib.compress(body)), ("identity", body)]:
        response = request("POST", "/v1/score", content=packed, headers={"Content-Encoding": encoding})
        assert response.status_code == 200


def test_a_packed_body_is_bounded_by_what_it_unpacks_to() -> None:
    bomb = gzip.compress(b" " * (MAX_BODY_BYTES + 1))
    assert len(bomb) < MAX_BODY_BYTES / 100
    response = request("POST", "/v1/score", content=bomb, headers={"Content-Encoding": "gzip"})
    assert (response.status_code, error_of(response)["code"]) == (413, "body_too_large")


def test_what_cannot_be_unpacked_is_refused_by_its_header() -> None:
    for encoding, content in [("br", b"{}"), ("gzip", b"{}")]:
        response = request("POST", "/v1/score", content=content, headers={"Content-Encoding": encoding})
        assert response.status_code == 415
        assert "Content-Encoding" in error_of(response)["message"]


@pytest.mark.parametrize("given", [None, "application/json; charset=utf-8", "application/vnd.api+json"])
def test_a_body_is_json_with_and_without_a_content_type(given: str | None) -> None:
    body = json.dumps({"conversations": [[U]]}).encode()
    headers = {} if given is None else {"Content-Type": given}
    assert request("POST", "/v1/score", content=body, headers=headers).status_code == 200


def test_another_content_type_is_named() -> None:
    for given in ("text/plain", "application/x-www-form-urlencoded"):
        response = request("POST", "/v1/score", content=b"{}", headers={"Content-Type": given})
        assert (response.status_code, error_of(response)["param"]) == (415, "content-type")
        assert "Content-Type: application/json" in error_of(response)["message"]


@pytest.mark.parametrize(
    ("wrong", "param"),
    [
        ({"conversations": [{"messages": [U], "steps": []}]}, "conversations[0].steps"),
        ({"conversations": [{"messages": [U]}]}, "conversations[0].steps"),
        ({"conversations": [], "aggregate": "mean"}, "aggregate"),
    ],
)
def test_bad_answers_in_steps(wrong: dict[str, Any], param: str) -> None:
    response = request("POST", "/v1/steps", json=wrong)
    assert (response.status_code, error_of(response)["param"]) == (422, param)


def test_models_and_health() -> None:
    assert request("HEAD", "/health").status_code == 200
    models = request("GET", "/v1/models").json()
    assert [(entry["id"], entry["max_tokens"]) for entry in models["data"]] == [("first", 1000), ("second", 1000)]
    service = FakeService()
    assert request("GET", "/health", service=service).json() == {
        "status": "ok",
        "models": {"first": True, "second": True},
    }
    service.is_ready = False
    response = request("GET", "/health", service=service)
    assert (response.status_code, response.json()["models"]["second"]) == (503, False)


BAD_BODIES: list[tuple[str, Any, int, str | None, str]] = [
    # path, body (bytes as they are), status, param, code
    ("/v1/score", b"", 422, None, "invalid_request"),
    ("/v1/score", b"{", 422, None, "invalid_json"),
    ("/v1/score", b"nonsense", 422, None, "invalid_json"),
    ("/v1/score", b"\xff\xfe", 422, None, "invalid_json"),
    ("/v1/score", b"[" * 100_000, 422, None, "invalid_json"),
    ("/v1/score", [], 422, None, "invalid_request"),
    ("/v1/score", "text", 422, None, "invalid_request"),
    ("/v1/score", 3, 422, None, "invalid_request"),
    ("/v1/score", {}, 422, "conversations", "invalid_request"),
    ("/v1/score", {"conversations": None}, 422, "conversations", "invalid_request"),
    ("/v1/score", {"conversations": "Hi"}, 422, "conversations", "invalid_request"),
    ("/v1/score", {"conversations": {"a": 1}}, 422, "conversations", "invalid_request"),
    ("/v1/score", {"conversations": [U]}, 422, "conversations", "invalid_request"),
    ("/v1/score", {"conversations": U}, 422, "conversations", "invalid_request"),
    ("/v1/rank", {"conversations": SHORT}, 422, "conversations", "invalid_request"),
    ("/v1/score", {"conversations": ["Hi"]}, 422, "conversations[0]", "invalid_request"),
    ("/v1/score", {"conversations": [[]]}, 422, "conversations[0]", "invalid_request"),
    ("/v1/score", {"conversations": [[U], []]}, 422, "conversations[1]", "invalid_request"),
    ("/v1/score", {"conversations": [["Hi"]]}, 422, "conversations[0][0]", "invalid_request"),
    ("/v1/score", {"conversations": [[None]]}, 422, "conversations[0][0]", "invalid_request"),
    ("/v1/score", {"conversations": [[{}]]}, 422, "conversations[0][0].role", "invalid_request"),
    ("/v1/score", {"conversations": [[{"role": "user"}]]}, 422, "conversations[0][0].content", "invalid_request"),
    ("/v1/score", {"conversations": [[{"content": "Hi"}]]}, 422, "conversations[0][0].role", "invalid_request"),
    ("/v1/score", {"conversations": [[U | {"content": None}]]}, 422, "conversations[0][0].content", "invalid_request"),
    ("/v1/score", {"conversations": [[U | {"content": 5}]]}, 422, "conversations[0][0].content", "invalid_request"),
    (
        "/v1/score",
        {"conversations": [[U | {"content": ["Hi"]}]]},
        422,
        "conversations[0][0].content",
        "invalid_request",
    ),
    ("/v1/score", {"conversations": [[U | {"role": 1}]]}, 422, "conversations[0][0].role", "invalid_request"),
    ("/v1/score", {"conversations": [[U | {"name": "x"}]]}, 422, "conversations[0][0].name", "invalid_request"),
    ("/v1/score", {"conversations": [[U]], "extra": 1}, 422, "extra", "invalid_request"),
    ("/v1/score", {"conversations": [[U]], "truncation": "middle"}, 422, "truncation", "invalid_request"),
    ("/v1/score", {"conversations": [[U]], "model": 7}, 422, "model", "invalid_request"),
    ("/v1/score", {"conversations": [[U]], "model": "third"}, 404, "model", "model_not_found"),
    ("/v1/score", b'{"conversations": [], "model": "\\ud800"}', 404, "model", "model_not_found"),
    (
        "/v1/score",
        b'{"conversations": [[{"role": "user", "content": "\\ud800"}]]}',
        422,
        "conversations[0]",
        "invalid_conversation",
    ),
    ("/v1/compare", {"first": SHORT}, 422, "second", "invalid_request"),
    ("/v1/compare", {"first": SHORT, "second": []}, 422, "second", "invalid_request"),
    ("/v1/compare", {"first": [SHORT], "second": SHORT}, 422, "first[0]", "invalid_request"),
    ("/v1/rank", {"conversations": [SHORT, [{"role": "user"}]]}, 422, "conversations[1][0].content", "invalid_request"),
    ("/v1/best_of_n", {"prompt": [], "responses": ["a"]}, 422, "prompt", "invalid_request"),
    ("/v1/best_of_n", {"prompt": [U]}, 422, "responses", "invalid_request"),
    ("/v1/best_of_n", {"prompt": [U], "responses": ["a", 5]}, 422, "responses[1]", "invalid_request"),
    ("/v1/best_of_n", {"prompt": [U], "responses": ["a"], "top_n": 0}, 422, "top_n", "invalid_request"),
    ("/v1/best_of_n", {"prompt": [U], "responses": ["a"], "top_n": "many"}, 422, "top_n", "invalid_request"),
    (
        "/v1/best_of_n",
        b'{"prompt": [{"role": "user", "content": "\\ud800"}], "responses": ["a"]}',
        422,
        "prompt",
        "invalid_conversation",
    ),
    ("/v1/nothing", {}, 404, None, "not_found"),
    ("/classify", {"input": ["a", 3]}, 422, "input[1]", "invalid_request"),
    ("/rm", {"prompt": [{"role": "user"}], "response": "a"}, 422, "prompt[0].content", "invalid_request"),
    ("/v1/rerank", {"query": "a", "documents": ["b", {"text": 5}]}, 422, "documents[1].text", "invalid_request"),
]


@pytest.mark.parametrize(
    ("path", "body", "status", "param", "code"), BAD_BODIES, ids=[str(place) for place in range(len(BAD_BODIES))]
)
def test_bad_bodies(path: str, body: Any, status: int, param: str | None, code: str) -> None:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    response = request("POST", path, content=content, headers={"Content-Type": "application/json"})
    error = error_of(response)
    assert (response.status_code, error["param"], error["code"]) == (status, param, code)
    assert error["message"]


def test_the_wrong_method() -> None:
    response = request("GET", "/v1/score")
    assert (response.status_code, error_of(response)["code"]) == (405, "method_not_allowed")
    assert response.headers["allow"] == "POST"


def test_a_body_that_is_too_large_is_refused_by_its_header_and_by_its_length() -> None:
    big = b" " * (MAX_BODY_BYTES + 1)

    async def pieces() -> Any:
        for _ in range(33):
            yield b" " * 2**20

    for content in (big, pieces()):
        response = request("POST", "/v1/score", content=content)
        assert (response.status_code, error_of(response)["code"]) == (413, "body_too_large")


@pytest.mark.parametrize(
    ("authorization", "status"),
    [
        (None, 401),
        ("Bearer wrong", 401),
        ("Bearer", 401),
        ("first-key", 401),
        ("Basic first-key", 401),
        (basic("x:wrong"), 401),
        (basic("first-key:"), 401),
        (basic("first-key"), 401),
        (basic("x:first-key"), 200),
        (basic(":second-key"), 200),
        ("Bearer first-key", 200),
        ("bearer second-key", 200),
        ("Bearer first-key,second-key", 401),
    ],
)
def test_keys(authorization: str | None, status: int) -> None:
    headers = {} if authorization is None else {"Authorization": authorization}
    assert request("GET", "/v1/models", guard=KEYS, headers=headers).status_code == status
    for path in ("/v1/score", "/classify", "/rm", "/nothing"):
        response = request("POST", path, guard=KEYS, headers=headers, json={})
        assert (response.status_code == 401) is (status == 401)


def test_a_key_in_its_own_header() -> None:
    for key, status in [("first-key", 200), ("wrong", 401), ("", 401)]:
        assert request("GET", "/v1/models", guard=KEYS, headers={"X-API-Key": key}).status_code == status
    assert request("GET", "/v1/models?key=first-key", guard=KEYS).status_code == 401


@pytest.mark.parametrize("path", ["/health", "/ping", "/docs", "/openapi.json"])
def test_health_and_docs_need_no_key(path: str) -> None:
    assert request("GET", path, guard=KEYS).status_code == 200


def test_health_needs_no_key_below_a_prefix_either() -> None:
    async def ask() -> list[int]:
        transport = httpx.ASGITransport(http_app(FakeService(), KEYS), root_path="/reward")
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            paths = ("/health", "/health/", "/", "/v1/models", "/v1/models/")
            return [(await client.get(f"/reward{path}")).status_code for path in paths]

    assert asyncio.run(ask()) == [200, 200, 200, 401, 401]


def test_without_keys_only_this_machine_may_ask() -> None:
    response = request("GET", "/v1/models", client=("192.0.2.7", 1))
    assert (response.status_code, error_of(response)["code"]) == (403, "loopback_only")
    assert request("GET", "/v1/models", client=("::1", 1)).status_code == 200
    guard = Guard([], allow_unauthenticated=True)
    assert request("GET", "/v1/models", client=("192.0.2.7", 1), guard=guard).status_code == 200


def test_a_deadline_ends_the_request_and_its_work() -> None:
    service = FakeService()
    service.delay_s = 3600.0
    body = {"conversations": [SHORT]}
    response = request("POST", "/v1/score", json=body, headers={"X-Request-Timeout-S": "0.5"}, service=service)
    assert (response.status_code, error_of(response)["code"]) == (408, "deadline_exceeded")
    assert service.cancelled == 1


def test_requests_beyond_what_a_process_works_on_are_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve_app.web.gate.MAX_IN_FLIGHT", 2)
    service = FakeService()
    service.delay_s = 3600.0

    async def ask() -> tuple[list[httpx.Response], httpx.Response]:
        transport = httpx.ASGITransport(http_app(service, Guard([])))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            body = {"conversations": [SHORT]}
            first = [asyncio.create_task(client.post("/v1/score", json=body)) for _ in range(2)]
            while len(service.asked) < 2:
                await asyncio.sleep(0)
            refused = [await client.post("/v1/score", json=body) for _ in range(2)]
            health = await client.get("/health")
            for task in first:
                task.cancel()
            await asyncio.gather(*first, return_exceptions=True)
            service.delay_s = 0.0
            return [*refused, await client.post("/v1/score", json=body)], health

    responses, health = asyncio.run(ask())
    assert [response.status_code for response in responses] == [503, 503, 200]
    assert error_of(responses[0])["code"] == "overloaded"
    assert responses[0].headers["retry-after"] == "1"
    assert health.status_code == 200


@pytest.mark.parametrize("value", ["soon", "-1", "0", "nan", "inf", ""])
def test_deadlines_that_are_none(value: str) -> None:
    response = request("POST", "/v1/score", json={"conversations": []}, headers={"X-Request-Timeout-S": value})
    assert (response.status_code, error_of(response)["code"]) == (422, "invalid_header")


def test_an_unforeseen_error_is_a_500_that_quotes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    service = FakeService()
    service.fails = ValueError("Certainly.")
    response = request("POST", "/v1/score", json={"conversations": [LONG]}, service=service)
    assert (response.status_code, error_of(response)["code"]) == (500, "internal_error")
    assert "Certainly." not in response.text + caplog.text


def test_every_route_is_documented_with_an_example() -> None:
    document = request("GET", "/openapi.json").json()
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            if method == "post":
                schema = operation["requestBody"]["content"]["application/json"]["schema"]
                names = [reference["$ref"].rpartition("/")[2] for reference in schema.get("anyOf", [schema])]
                assert all(document["components"]["schemas"][name]["examples"] for name in names), path
