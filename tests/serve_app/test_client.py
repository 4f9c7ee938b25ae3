"""RewardClient against a real server on loopback that fails as it is told."""

from __future__ import annotations

import asyncio
import json
import math
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest

from serve_app.client import (
    AsyncRewardClient,
    AuthenticationError,
    Comparison,
    DeadlineError,
    InvalidRequestError,
    MalformedAnswerError,
    ModelInfo,
    OverloadedError,
    RankedConversation,
    RankedResponse,
    Ranking,
    RewardClient,
    RewardClientError,
    Score,
    StepwiseScore,
    TooLongError,
    TurnScores,
    UnavailableError,
    transport,
)
from serve_app.client.answers import read_scores, read_turn_scores
from tests.conftest import chat
from tests.serve_app.scripted_server import Reply, Request, ScriptedServer, refusal, serving

ROOT = Path(__file__).parents[2]
USAGE = {"prompt_tokens": 7}


def value_of(conversation: list[dict[str, str]]) -> float:
    """The scripted model: a response's score is the number it spells."""
    return float(conversation[-1]["content"])


def order_of(scores: list[float]) -> list[int]:
    return sorted(range(len(scores)), key=lambda index: -scores[index])


def answer_score(body: dict[str, Any]) -> dict[str, Any]:
    results: list[dict[str, Any]] = [
        {"index": index, "score": value_of(conversation), "num_tokens": 5, "truncated": False}
        for index, conversation in enumerate(body["conversations"])
    ]
    if body.get("every_turn"):
        for result, conversation in zip(results, body["conversations"], strict=True):
            values = [float(message["content"]) for message in conversation if message["role"] == "assistant"]
            result |= {"turn_scores": values, "turn_tokens": list(range(1, len(values) + 1))}
    return {"model": "tiny", "results": results, "usage": USAGE}


def answer_rank(body: dict[str, Any]) -> dict[str, Any]:
    scores = [value_of(conversation) for conversation in body["conversations"]]
    order = order_of(scores)
    results = [{"index": i, "score": score, "rank": order.index(i)} for i, score in enumerate(scores)]
    return {"model": "tiny", "results": results, "order": order, "usage": USAGE}


def answer_compare(body: dict[str, Any]) -> dict[str, Any]:
    first, second = value_of(body["first"]), value_of(body["second"])
    return {
        "model": "tiny",
        "scores": [first, second],
        "first_is_better": first > second,
        "margin": first - second,
        "probability": 1 / (1 + math.exp(second - first)),
        "usage": USAGE,
    }


def answer_best_of_n(body: dict[str, Any]) -> dict[str, Any]:
    scores = [float(response) for response in body["responses"]]
    results = [{"index": i, "response": body["responses"][i], "score": scores[i]} for i in order_of(scores)]
    return {"model": "tiny", "results": results[: body.get("top_n")], "usage": USAGE}


def answer_steps(body: dict[str, Any]) -> dict[str, Any]:
    results: list[dict[str, Any]] = [
        {"index": place, "step_scores": [float(step) for step in each["steps"]], "num_tokens": len(each["messages"])}
        for place, each in enumerate(body["conversations"])
    ]
    if body.get("aggregate") == "minimum":
        results = [result | {"score": min(result["step_scores"])} for result in results]
    return {"model": "tiny", "results": results, "usage": USAGE, "warnings": ["conversations[0]: unknown_role: a"]}


ROUTES: dict[str, Callable[[Any], dict[str, Any]]] = {
    "/v1/score": answer_score,
    "/v1/steps": answer_steps,
    "/v1/rank": answer_rank,
    "/v1/compare": answer_compare,
    "/v1/best_of_n": answer_best_of_n,
    "/v1/models": lambda _: {"object": "list", "data": [{"id": "tiny", "object": "model", "max_tokens": 4096}]},
    "/health": lambda _: {"status": "ok"},
}


def well(request: Request) -> Reply:
    return Reply(ROUTES[request.path](request.body))


def first_then_well(*replies: Reply) -> Callable[[Request], Reply]:
    """`replies` to the first requests, in turn, and good answers to the rest."""
    left = list(replies)
    return lambda request: left.pop(0) if left else well(request)


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("RAYWARD_API_KEY", raising=False)


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with serving(well) as server:
        yield server


@pytest.fixture
def client(server: ScriptedServer) -> Iterator[RewardClient]:
    with RewardClient(server.url, max_retries=3) as client:
        yield client


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses between tries, in seconds, none of which is waited for."""
    pauses: list[float] = []

    async def no_sleep(wait_s: float) -> None:
        pauses.append(wait_s)

    monkeypatch.setattr(transport, "sleep", no_sleep)
    return pauses


def numbers(count: int) -> list[list[dict[str, str]]]:
    return [chat(f"q{number}", str(number)) for number in range(count)]


def test_a_process_that_imports_the_client_stays_light() -> None:
    heavy = "{'torch', 'numpy', 'ray', 'transformers', 'pydantic', 'fastapi'}"
    code = f"import sys; from serve_app.client import RewardClient; print(sorted({heavy} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert found.stdout.strip() == "[]"


class TestCalls:
    def test_score(self, client: RewardClient, server: ScriptedServer) -> None:
        conversations = [chat("a", "1.5"), chat('ü\n"', "-2")]
        assert client.score(conversations, truncation="left") == [Score(1.5, 5, False), Score(-2.0, 5, False)]
        assert server.requests[0].body == {"truncation": "left", "conversations": conversations}
        assert "Authorization" not in server.requests[0].headers

    def test_score_turns(self, server: ScriptedServer) -> None:
        with RewardClient(server.url, max_conversations_per_request=2) as client:
            talks = [chat(*"123456"[: 2 * turns]) for turns in (1, 3, 2)]
            found = client.score_turns(talks, truncation="left", strict=True)
        assert [turns.values for turns in found] == [(2.0,), (2.0, 4.0, 6.0), (2.0, 4.0)]
        assert [turns.num_tokens for turns in found] == [(1,), (1, 2, 3), (1, 2)]
        asked = {"truncation": "left", "strict": True, "every_turn": True}
        assert [request.body.items() >= asked.items() for request in server.requests] == [True, True]

    def test_score_steps(self, server: ScriptedServer) -> None:
        with RewardClient(server.url, max_conversations_per_request=2) as client:
            found = client.score_steps([chat("a")] * 3, [["1", "0.5"], ["2"], ["3", "4"]], aggregate="minimum")
            (plain,) = client.score_steps([chat("a", "b", "c")], [["1", "2"]], strict=True)
            with pytest.raises(InvalidRequestError, match="1 conversations have 2 lists of steps"):
                client.score_steps([chat("a")], [["1"], ["2"]])
        told = ("unknown_role: a",)
        assert found == [
            StepwiseScore((1.0, 0.5), 1, 0.5, told),
            StepwiseScore((2.0,), 1, 2.0),
            StepwiseScore((3.0, 4.0), 1, 3.0, told),
        ]
        assert plain == StepwiseScore((1.0, 2.0), 3, None, told)
        assert server.requests[-1].body == {
            "strict": True,
            "conversations": [{"messages": chat("a", "b", "c"), "steps": ["1", "2"]}],
        }

    def test_the_servers_own_truncation_is_the_default(self, client: RewardClient, server: ScriptedServer) -> None:
        client.score([chat("a", "1")])
        assert server.requests[0].body.keys() == {"conversations"}

    def test_the_prompt_of_best_of_n_may_be_text(self, client: RewardClient, server: ScriptedServer) -> None:
        assert client.best_of_n("a", ["1", "2"], 1) == [RankedResponse(1, "2", 2.0)]
        assert server.requests[0].body["prompt"] == [{"role": "user", "content": "a"}]

    def test_compare(self, client: RewardClient, server: ScriptedServer) -> None:
        comparison = client.compare(chat("a", "2"), chat("b", "1"))
        assert comparison == Comparison((2.0, 1.0), True, 1.0, 1 / (1 + math.exp(-1)))
        assert server.requests[0].body == {"first": chat("a", "2"), "second": chat("b", "1")}

    def test_rank(self, client: RewardClient, server: ScriptedServer) -> None:
        ranking = client.rank([chat("a", "1"), chat("a", "3"), chat("a", "1"), chat("a", "2")])
        assert ranking.order == [1, 3, 0, 2]
        assert ranking.results[2] == RankedConversation(index=2, score=1.0, rank=3)
        assert [request.path for request in server.requests] == ["/v1/rank"]

    def test_best_of_n(self, client: RewardClient, server: ScriptedServer) -> None:
        best = client.best_of_n(chat("a"), ["1", "3", "2"], top_n=2)
        assert best == [RankedResponse(1, "3", 3.0), RankedResponse(2, "2", 2.0)]
        assert server.requests[0].body == {"prompt": chat("a"), "responses": ["1", "3", "2"], "top_n": 2}
        assert len(client.best_of_n(chat("a"), ["1", "3", "2"])) == 3

    def test_models(self, client: RewardClient) -> None:
        assert client.models() == [ModelInfo(id="tiny", max_tokens=4096)]

    def test_empty_lists_send_nothing(self, client: RewardClient, server: ScriptedServer) -> None:
        assert client.score([]) == []
        assert client.rank([]) == Ranking(results=[], order=[])
        assert client.best_of_n(chat("a"), []) == []
        assert server.requests == []

    def test_the_model_and_the_key_are_sent(self, server: ScriptedServer, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("RAYWARD_API_KEY", "of-the-environment")
        with RewardClient(server.url, "given", model="large") as client:
            client.score(numbers(1))
            client.compare(chat("a", "1"), chat("a", "2"))
            client.rank(numbers(1))
            client.best_of_n(chat("a"), ["1"])
        with RewardClient(server.url + "/") as client:
            client.score(numbers(1))
        with RewardClient(server.url, "") as client:
            client.score(numbers(1))
        assert [request.body.get("model") for request in server.requests] == ["large"] * 4 + [None] * 2
        keys = [request.headers.get("Authorization") for request in server.requests]
        assert keys == ["Bearer given"] * 4 + ["Bearer of-the-environment", None]

    def test_health(self, client: RewardClient, server: ScriptedServer) -> None:
        assert client.is_healthy()
        server.answer = lambda _: refusal(503, retry_after="1")
        assert not client.is_healthy()
        server.answer = lambda _: Reply(b"", 200 if server.released.wait(120) else 500)
        assert not client.is_healthy(timeout_s=0.2)
        assert len(server.requests) >= 2

    def test_health_of_a_server_that_is_not_there(self) -> None:
        with serving(well) as server:
            gone = server.url
        with RewardClient(gone) as client:
            assert not client.is_healthy()

    def test_the_async_client_has_the_same_calls(self, server: ScriptedServer) -> None:
        async def call_all() -> tuple[Any, ...]:
            async with AsyncRewardClient(server.url) as client:
                return await asyncio.gather(
                    client.score(numbers(2)),
                    client.compare(chat("a", "1"), chat("a", "2")),
                    client.rank(numbers(3)),
                    client.best_of_n(chat("a"), ["1", "2"], 1),
                    client.models(),
                    client.is_healthy(),
                )

        async def wait() -> None:
            async with AsyncRewardClient(server.url) as client:
                await client.wait_until_ready(60)

        asyncio.run(wait())
        score, comparison, ranking, best, models, healthy = asyncio.run(call_all())
        assert [result.value for result in score] == [0.0, 1.0]
        assert not comparison.first_is_better
        assert ranking.order == [2, 1, 0]
        assert best == [RankedResponse(1, "2", 2.0)]
        assert (models[0].id, healthy) == ("tiny", True)


class TestArguments:
    @pytest.mark.parametrize(
        "wrong",
        [
            {"base_url": "127.0.0.1:8000"},
            {"base_url": "ftp://host"},
            {"api_key": "two\nlines"},
            {"api_key": "schlüssel"},
            {"timeout_s": 0.0},
            {"timeout_s": math.inf},
            {"max_retries": -1},
            {"max_concurrency": 0},
            {"max_conversations_per_request": 0},
            {"max_bytes_per_request": 0},
        ],
        ids=str,
    )
    def test_out_of_range(self, wrong: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match=next(iter(wrong))) as caught:
            RewardClient(**{"base_url": "http://host", **wrong})
        assert wrong.get("api_key", "none") not in str(caught.value)

    @pytest.mark.parametrize(
        ("conversations", "param"),
        [
            ("text", "conversations"),
            ({"role": "user", "content": "a"}, "conversations"),
            (chat("a", "b"), "conversations"),
            ([chat("a", "b")[0], "text"], "conversations"),
            ([chat("a", "1"), "text"], "conversations[1]"),
            ([chat("a", "1"), [{"role": "user", "content": math.nan}]], "conversations[1]"),
            ([[{"role": "user", "content": "\ud800"}]], "conversations[0]"),
            ([[{"role": "user", "content": object()}]], "conversations[0]"),
        ],
    )
    def test_what_is_no_list_of_conversations(
        self, client: RewardClient, server: ScriptedServer, conversations: Any, param: str
    ) -> None:
        for call in (client.score, client.rank):
            with pytest.raises(InvalidRequestError) as caught:
                call(conversations)
            assert (caught.value.param, caught.value.status) == (param, None)
        assert server.requests == []

    @pytest.mark.parametrize(
        ("responses", "top_n", "param"),
        [("text", None, "responses"), (["1", 2], None, "responses[1]"), (["1"], 0, "top_n")],
    )
    def test_what_are_no_responses(self, client: RewardClient, responses: Any, top_n: int | None, param: str) -> None:
        with pytest.raises(InvalidRequestError) as caught:
            client.best_of_n(chat("a"), responses, top_n)
        assert caught.value.param == param


class TestSplitting:
    def test_a_long_list_keeps_its_order_within_the_bound_on_requests(self, server: ScriptedServer) -> None:
        def slowest_first(request: Request) -> Reply:
            time.sleep(0.02 if len(server.requests) % 3 == 1 else 0.001)
            return well(request)

        server.answer = slowest_first
        with RewardClient(server.url, max_concurrency=3, max_conversations_per_request=100) as client:
            scores = client.score(numbers(5000))
        assert [score.value for score in scores] == list(range(5000))
        assert [len(request.body["conversations"]) for request in server.requests] == [100] * 50
        assert server.max_in_flight == 3

    def test_the_bound_holds_over_all_threads(self, server: ScriptedServer) -> None:
        def slow(request: Request) -> Reply:
            time.sleep(0.005)
            return well(request)

        server.answer = slow
        with (
            RewardClient(server.url, max_concurrency=2, max_conversations_per_request=5) as client,
            ThreadPoolExecutor(8) as pool,
        ):
            lists = [[chat("q", str(100 * thread + place)) for place in range(20)] for thread in range(8)]
            for conversations, scores in zip(lists, pool.map(client.score, lists), strict=True):
                assert [score.value for score in scores] == [value_of(conversation) for conversation in conversations]
        assert server.max_in_flight == 2

    def test_requests_are_bounded_in_bytes(self, server: ScriptedServer) -> None:
        long = chat("x" * 3000, "7")
        with RewardClient(server.url, max_bytes_per_request=1000) as client:
            scores = client.score([*numbers(40), long, *numbers(3)])
        assert [score.value for score in scores] == [*range(40), 7, 0, 1, 2]
        alone = [request for request in server.requests if long in request.body["conversations"]]
        assert [request.body["conversations"] for request in alone] == [[long]]
        others = [request.num_bytes for request in server.requests if request not in alone]
        assert max(others) <= 1000 + len('{"truncation":"error","conversations":[]}')
        assert len(others) < 8  # each is filled

    def test_conversations_of_one_prompt_stay_together(self, server: ScriptedServer) -> None:
        sizes = [3, 3, 3, 25, 2]
        conversations = [
            chat(f"prompt {which}", str(place)) for which, size in enumerate(sizes) for place in range(size)
        ]
        with RewardClient(server.url, max_concurrency=1, max_conversations_per_request=8) as client:
            client.score(conversations)
        sent = [[c[0]["content"][-1] for c in request.body["conversations"]] for request in server.requests]
        assert ["".join(prompts) for prompts in sent] == ["000111", "222", "3" * 8, "3" * 8, "3" * 8, "344"]

    def test_a_long_list_is_ranked_here(self, server: ScriptedServer) -> None:
        conversations = [chat("q", str(number % 7)) for number in range(50)]
        with RewardClient(server.url, max_conversations_per_request=10) as client:
            pieces = client.rank(conversations)
        with RewardClient(server.url) as client:
            whole = client.rank(conversations)
        assert pieces == whole
        assert [request.path for request in server.requests] == ["/v1/score"] * 5 + ["/v1/rank"]

    def test_many_responses_are_ranked_here(self, server: ScriptedServer) -> None:
        responses = [str(number % 7) for number in range(50)]
        with RewardClient(server.url, max_concurrency=1, max_conversations_per_request=10) as client:
            pieces = client.best_of_n(chat("q"), responses, top_n=9)
        with RewardClient(server.url) as client:
            whole = client.best_of_n(chat("q"), responses, top_n=9)
        assert pieces == whole
        assert server.requests[0].body["conversations"][0] == chat("q", "0")
        assert [request.path for request in server.requests] == ["/v1/score"] * 5 + ["/v1/best_of_n"]

    @pytest.mark.parametrize(
        ("call", "param"),
        [
            (lambda client: client.score(numbers(50)), "conversations[43][0].role"),
            (lambda client: client.rank(numbers(50)), "conversations[43][0].role"),
            (lambda client: client.best_of_n(chat("q"), list(map(str, range(50)))), "responses[43][0].role"),
        ],
    )
    def test_an_error_names_the_place_in_the_whole_list(
        self, server: ScriptedServer, call: Callable[[RewardClient], Any], param: str
    ) -> None:
        def refuse_43(request: Request) -> Reply:
            if value_of(request.body["conversations"][0]) != 40:
                return well(request)
            return refusal(422, "conversations[3] is odd", param="conversations[3][0].role", code="odd")

        server.answer = refuse_43
        client = RewardClient(server.url, max_conversations_per_request=10)
        with client, pytest.raises(InvalidRequestError) as caught:
            call(client)
        assert (caught.value.param, caught.value.status, caught.value.code) == (param, 422, "odd")
        assert "[43]" in caught.value.message

    def test_a_param_of_another_field_is_left_alone(self, client: RewardClient, server: ScriptedServer) -> None:
        server.answer = lambda _: refusal(422, param="truncation")
        with pytest.raises(InvalidRequestError) as caught:
            client.score(numbers(1))
        assert caught.value.param == "truncation"

    def test_the_first_error_ends_the_call(self, server: ScriptedServer) -> None:
        def refuse_the_first(request: Request) -> Reply:
            time.sleep(0.01)
            return well(request) if value_of(request.body["conversations"][0]) else refusal(422)

        server.answer = refuse_the_first
        with RewardClient(server.url, max_conversations_per_request=1, max_concurrency=2) as client:
            with pytest.raises(InvalidRequestError):
                client.score(numbers(100))
            time.sleep(0.1)
            assert len(server.requests) < 50

    def test_scores_of_two_models_are_not_mixed(self, server: ScriptedServer) -> None:
        server.answer = lambda request: Reply({**answer_score(request.body), "model": f"m{len(server.requests)}"})
        client = RewardClient(server.url, max_conversations_per_request=1)
        with client, pytest.raises(RewardClientError, match="changed"):
            client.score(numbers(2))


class TestRetries:
    def test_503_is_tried_again_after_as_long_as_the_server_asks(
        self, client: RewardClient, server: ScriptedServer, pauses: list[float]
    ) -> None:
        in_a_minute = format_datetime(datetime.now(UTC) + timedelta(seconds=60), usegmt=True)
        server.answer = first_then_well(
            refusal(503, retry_after="20"), refusal(503, retry_after=in_a_minute), refusal(503, retry_after="soon")
        )
        assert client.score(numbers(1)) == [Score(0.0, 5, False)]
        assert 20 < pauses[0] < 21
        assert 30 < pauses[1] < 61
        assert 0 < pauses[2] <= 1

    @pytest.mark.parametrize("status", [502, 503, 504])
    def test_pauses_grow_and_end(
        self, client: RewardClient, server: ScriptedServer, pauses: list[float], status: int
    ) -> None:
        server.answer = lambda _: Reply(b"<html>gateway</html>", status)
        with pytest.raises(UnavailableError) as caught:
            client.score(numbers(1))
        assert caught.value.status == status
        assert len(server.requests) == 4
        assert [0.125 * 2**n <= pause <= 0.25 * 2**n for n, pause in enumerate(pauses)] == [True] * 3

    @pytest.mark.parametrize(
        "reply",
        [
            Reply(b"Internal Server Error", 500, {"Content-Type": "text/plain; charset=utf-8"}),
            Reply(b"", 500),
            Reply({"detail": "Internal Server Error"}, 500),
            Reply(b"The deployment is not available.", 503),
        ],
        ids=["plain-500", "empty-500", "foreign-500", "plain-503"],
    )
    def test_what_a_proxy_says_of_a_process_that_died(
        self, client: RewardClient, server: ScriptedServer, pauses: list[float], reply: Reply
    ) -> None:
        server.answer = first_then_well(reply, reply, reply)
        assert client.score(numbers(2)) == [Score(0.0, 5, False), Score(1.0, 5, False)]
        assert len(pauses) == 3
        server.answer = lambda _: reply
        with pytest.raises(UnavailableError, match=f"status {reply.status}\\) after 4 tries") as caught:
            client.score(numbers(2))
        assert type(caught.value) is UnavailableError

    def test_a_proxy_that_has_just_started_knows_no_route_yet(
        self, client: RewardClient, server: ScriptedServer, pauses: list[float]
    ) -> None:
        text = b"Path '/v1/score' not found. Ping http://.../-/routes for available routes."
        reply = Reply(text, 404, {"Content-Type": "text/plain"})
        server.answer = lambda _: reply
        with pytest.raises(UnavailableError, match="has no route to a rayward endpoint") as caught:
            client.score(numbers(1))
        assert (caught.value.num_tries, caught.value.status) == (1, 404)  # nor was there one before
        server.answer = first_then_well()
        client.score(numbers(1))
        server.answer = first_then_well(reply, reply)
        assert client.score(numbers(1)) == [Score(0.0, 5, False)]
        assert len(pauses) == 2

    def test_the_pauses_outlast_the_replacement_of_a_proxy(self, server: ScriptedServer, pauses: list[float]) -> None:
        """Serve checks its proxies every 10 s and replaces one at the third check that fails."""
        server.answer = lambda _: Reply(b"", is_cut=True)
        with RewardClient(server.url) as client, pytest.raises(UnavailableError, match="after 13 tries"):
            client.score(numbers(1))
        assert len(pauses) == 12
        assert 30 < sum(pauses) < 64

    def test_overload_to_the_end(self, client: RewardClient, server: ScriptedServer, pauses: list[float]) -> None:
        server.answer = lambda _: refusal(503, "full", code="overloaded", retry_after="2")
        with pytest.raises(OverloadedError, match="full") as caught:
            client.rank(numbers(2))
        assert (caught.value.retry_after_s, caught.value.code, len(pauses)) == (2.0, "overloaded", 3)

    def test_a_pause_past_the_deadline_is_not_waited_for(self, client: RewardClient, server: ScriptedServer) -> None:
        server.answer = lambda _: refusal(503, retry_after="3600")
        with pytest.raises(OverloadedError):
            client.score(numbers(1), timeout_s=1800)
        assert len(server.requests) == 1

    def test_an_answer_that_breaks_off_is_asked_for_again(
        self, client: RewardClient, server: ScriptedServer, pauses: list[float]
    ) -> None:
        server.answer = first_then_well(Reply(b'{"model": "ti', is_cut=True), Reply(b"", is_cut=True))
        assert client.score(numbers(1)) == [Score(0.0, 5, False)]
        assert len(pauses) == 2

    def test_connections_that_always_break(
        self, client: RewardClient, server: ScriptedServer, pauses: list[float]
    ) -> None:
        server.answer = lambda _: Reply(b"{", is_cut=True)
        with pytest.raises(UnavailableError, match="no answer") as caught:
            client.score(numbers(1))
        assert (caught.value.status, len(server.requests), len(pauses)) == (None, 4, 3)

    def test_a_server_that_was_never_there_is_an_error_at_once(self, pauses: list[float]) -> None:
        with serving(well) as server:
            gone = server.url
        with (
            RewardClient(gone, max_retries=2) as client,
            pytest.raises(UnavailableError, match="nothing listens at .*wait_until_ready"),
        ):
            client.models()
        assert pauses == []

    def test_a_server_that_went_away_may_come_back(self, pauses: list[float]) -> None:
        """As Serve's proxy, which takes a while to be replaced."""
        with serving(well) as server:
            client = RewardClient(server.url, max_retries=2)
            client.models()
        with client, pytest.raises(UnavailableError):
            client.models()
        assert len(pauses) == 2

    def test_waiting_for_a_server_that_is_being_started(self, server: ScriptedServer) -> None:
        starting = [refusal(503), refusal(503)]
        server.answer = lambda request: starting.pop() if starting else well(request)
        with RewardClient(server.url) as client:
            client.wait_until_ready(60)
            assert starting == []
            assert client.is_healthy()
            server.answer = lambda _: refusal(503)
            with pytest.raises(UnavailableError, match="not ready within 0.3 s: /health was answered with 503"):
                client.wait_until_ready(0.3)
        with serving(well) as gone:
            url = gone.url
        with RewardClient(url) as client, pytest.raises(UnavailableError, match="not ready within 0.3 s: no answer"):
            client.wait_until_ready(0.3)

    @pytest.mark.parametrize(
        ("reply", "kind"),
        [
            (refusal(400), InvalidRequestError),
            (refusal(401), AuthenticationError),
            (refusal(404), InvalidRequestError),
            (refusal(408), DeadlineError),
            (refusal(413), TooLongError),
            (refusal(422), InvalidRequestError),
            (refusal(422, code="context_length_exceeded"), TooLongError),
            (refusal(429, retry_after="1"), OverloadedError),
            (refusal(500), RewardClientError),
            (Reply(b"", 307, {"Location": "/elsewhere"}), RewardClientError),
            (Reply(b'{"detail": "Not Found"}', 404), InvalidRequestError),
            (Reply({"error": {"message": 1, "param": []}}, 400), InvalidRequestError),
        ],
        ids=lambda value: str(value.status) if isinstance(value, Reply) else value.__name__,
    )
    def test_nothing_else_is_tried_again(
        self, client: RewardClient, server: ScriptedServer, reply: Reply, kind: type[RewardClientError]
    ) -> None:
        server.answer = lambda _: reply
        with pytest.raises(RewardClientError) as caught:
            client.compare(chat("a", "1"), chat("a", "2"))
        assert type(caught.value) is kind
        assert caught.value.status == reply.status
        assert len(server.requests) == 1


class TestDeadline:
    def test_a_slow_answer(self, client: RewardClient, server: ScriptedServer) -> None:
        server.answer = lambda request: well(request) if server.released.wait(120) else refusal(500)
        started = time.monotonic()
        with pytest.raises(DeadlineError, match="1 s"):
            client.score(numbers(3), timeout_s=1)
        assert time.monotonic() - started > 0.9
        assert 0 < float(server.requests[0].headers["X-Request-Timeout-S"]) <= 1

    def test_the_client_has_one_of_its_own(self, server: ScriptedServer) -> None:
        with RewardClient(server.url, timeout_s=7000) as client:
            client.score(numbers(1))
            client.score(numbers(1), timeout_s=3000)
        told = [float(request.headers["X-Request-Timeout-S"]) for request in server.requests]
        assert told == [pytest.approx(7000, abs=100), pytest.approx(3000, abs=100)]

    def test_tries_share_one(self, server: ScriptedServer) -> None:
        server.answer = lambda _: refusal(503)
        ends = pytest.raises((UnavailableError, DeadlineError))  # as the end falls into a pause or a try
        with RewardClient(server.url, max_retries=1000) as client, ends:
            client.score(numbers(1), timeout_s=2)
        told = [float(request.headers["X-Request-Timeout-S"]) for request in server.requests]
        assert len(told) >= 2
        assert told == sorted(told, reverse=True)
        assert told[-1] < 2 - 0.1

    @pytest.mark.parametrize("timeout_s", [0.0, -1.0, math.nan, math.inf])
    def test_what_is_no_time(self, client: RewardClient, timeout_s: float) -> None:
        with pytest.raises(ValueError, match="timeout_s"):
            client.score(numbers(1), timeout_s=timeout_s)


def changed(answer: dict[str, Any], row: int | None = None, **values: Any) -> bytes:
    """`answer`, or a row of its results, with `values`; JSON as Python writes it, NaN and all."""
    target = answer if row is None else answer["results"][row]
    target.update(values)
    return json.dumps(answer).encode()


SCORED = {"conversations": numbers(2)}
COMPARED = {"first": chat("a", "1"), "second": chat("a", "2")}
BEST = {"responses": ["0", "1", "2"]}


class TestAnswers:
    def test_warnings_and_attributes_belong_to_their_scores(self) -> None:
        rows: list[dict[str, Any]] = [
            {"index": place, "score": 0.5, "num_tokens": 3, "truncated": False} for place in (1, 0)
        ]
        rows[0] |= {"attributes": {"helpfulness": 2, "verbosity": -0.5}}
        told = ["conversations[1]: unknown_role: line\nbreak", "conversations[1]: empty_response: the last"]
        first, second = read_scores({"results": rows, "warnings": told}, 2)
        assert (first.warnings, first.attributes) == ((), {})
        assert second.warnings == ("unknown_role: line\nbreak", "empty_response: the last")
        assert second.attributes == {"helpfulness": 2.0, "verbosity": -0.5}
        for broken in ({"warnings": ["of nothing"]}, {"results": [rows[0] | {"attributes": {"a": "b"}}, rows[1]]}):
            with pytest.raises(MalformedAnswerError):
                read_scores({"results": rows, "warnings": told} | broken, 2)

    def test_turns_that_do_not_fit_are_refused(self) -> None:
        row = {"index": 0, "num_tokens": 9, "truncated": True, "turn_scores": [0.5, 1], "turn_tokens": [4, 9]}
        told = ["conversations[0]: unknown_role: a", "conversations[0].messages[1]: empty_response: b"]
        (turns,) = read_turn_scores({"results": [row], "warnings": told}, 1)
        assert turns == TurnScores((0.5, 1.0), (4, 9), True, ("unknown_role: a", "[1]: empty_response: b"))
        wrong: list[dict[str, Any]] = [{"turn_tokens": [4]}, {"turn_scores": [0.5, None]}, {"turn_scores": []}]
        for broken in wrong:
            with pytest.raises(MalformedAnswerError):
                read_turn_scores({"results": [row | broken]}, 1)
        with pytest.raises(MalformedAnswerError, match="'turn_scores' is missing"):
            read_turn_scores(answer_score({"conversations": [chat("1", "2")]}), 1)

    def test_strict_is_asked_for(self, client: RewardClient, server: ScriptedServer) -> None:
        client.score([chat("a", "1")], strict=True)
        client.rank([chat("a", "1")], strict=True)
        client.compare(chat("a", "1"), chat("a", "2"), strict=True)
        client.best_of_n(chat("a"), ["1"], strict=True, reference="2")
        assert [request.body["strict"] for request in server.requests] == [True] * 4
        assert server.requests[3].body["reference"] == "2"


class TestMalformedAnswers:
    @pytest.mark.parametrize(
        "answer",
        [
            b"",
            b"garbage",
            b"\xff\xfe\xfa",
            b"[" * 100_000,
            b"null",
            b"[]",
            b"{}",
            b'{"model": "tiny", "results": {}}',
            changed(answer_score({"conversations": numbers(1)})),
            changed(answer_score({"conversations": numbers(3)})),
            changed(answer_score(SCORED), 1, index=0),
            changed(answer_score(SCORED), 1, index=2),
            changed(answer_score(SCORED), 1, index=True),
            changed(answer_score(SCORED), 1, index="1"),
            changed(answer_score(SCORED), 1, score=math.nan),
            changed(answer_score(SCORED), 1, score=-math.inf),
            changed(answer_score(SCORED), 1, score=4711).replace(b"4711", b"1e999"),
            changed(answer_score(SCORED), 1, score=10**400),
            changed(answer_score(SCORED), 1, score=None),
            changed(answer_score(SCORED), 1, score="1.0"),
            changed(answer_score(SCORED), 1, score=True),
            changed(answer_score(SCORED), 1, num_tokens=1.5),
            changed(answer_score(SCORED), 1, truncated="no"),
            changed(answer_score(SCORED), model=None),
            changed(
                answer_score(SCORED), results=[*answer_score(SCORED)["results"], answer_score(SCORED)["results"][1]]
            ),
            changed(answer_score(SCORED), usage=math.nan),
            changed(answer_score(SCORED), results=[1, 2]),
        ],
    )
    def test_score(self, client: RewardClient, server: ScriptedServer, answer: bytes) -> None:
        server.answer = lambda _: Reply(answer)
        with pytest.raises(MalformedAnswerError):
            client.score(SCORED["conversations"])
        assert len(server.requests) == 1

    @pytest.mark.parametrize(
        "answer",
        [
            changed(answer_compare(COMPARED), scores=[1.0]),
            changed(answer_compare(COMPARED), scores=[1.0, math.nan]),
            changed(answer_compare(COMPARED), margin=math.inf),
            changed(answer_compare(COMPARED), probability=None),
            changed(answer_compare(COMPARED), first_is_better=1),
        ],
    )
    def test_compare(self, client: RewardClient, server: ScriptedServer, answer: bytes) -> None:
        server.answer = lambda _: Reply(answer)
        with pytest.raises(MalformedAnswerError):
            client.compare(COMPARED["first"], COMPARED["second"])

    @pytest.mark.parametrize(
        "answer",
        [
            changed(answer_rank({"conversations": numbers(1)})),
            changed(answer_rank(SCORED), order=[0, 1]),
            changed(answer_rank(SCORED), order=[1]),
            changed(answer_rank(SCORED), order=["1", "0"]),
            changed(answer_rank(SCORED), 0, rank=0),
            changed(answer_rank(SCORED), 0, rank=7),
            changed(answer_rank(SCORED), 0, index=1),
            changed(answer_rank(SCORED), 0, score=math.nan),
        ],
    )
    def test_rank(self, client: RewardClient, server: ScriptedServer, answer: bytes) -> None:
        server.answer = lambda _: Reply(answer)
        with pytest.raises(MalformedAnswerError):
            client.rank(SCORED["conversations"])

    @pytest.mark.parametrize(
        "answer",
        [
            changed(answer_best_of_n({"responses": ["0", "1"]})),
            changed(answer_best_of_n(BEST), 0, index=0),
            changed(answer_best_of_n(BEST), 0, index=-1),
            changed(answer_best_of_n(BEST), 0, index=3),
            changed(answer_best_of_n(BEST), 0, response="1"),
            changed(answer_best_of_n(BEST), 0, score=-1.0),
        ],
    )
    def test_best_of_n(self, client: RewardClient, server: ScriptedServer, answer: bytes) -> None:
        server.answer = lambda _: Reply(answer)
        with pytest.raises(MalformedAnswerError):
            client.best_of_n(chat("a"), BEST["responses"])

    @pytest.mark.parametrize("answer", [b"{}", b'{"data": [{"id": "tiny"}]}', b'{"data": ["tiny"]}'])
    def test_models(self, client: RewardClient, server: ScriptedServer, answer: bytes) -> None:
        server.answer = lambda _: Reply(answer)
        with pytest.raises(MalformedAnswerError):
            client.models()

    def test_a_wrong_encoding(self, client: RewardClient, server: ScriptedServer) -> None:
        server.answer = lambda _: Reply(b"no gzip", headers={"Content-Encoding": "gzip"})
        with pytest.raises(MalformedAnswerError):
            client.models()


class TestLifetime:
    def test_a_closed_client_says_so(self, server: ScriptedServer) -> None:
        client = RewardClient(server.url)
        client.score(numbers(1))
        client.close()
        client.close()
        with pytest.raises(RuntimeError, match="closed"):
            client.score(numbers(1))

    def test_closing_ends_the_calls_of_other_threads(self, server: ScriptedServer) -> None:
        arrived = threading.Event()

        def never(request: Request) -> Reply:
            arrived.set()
            return well(request) if server.released.wait(120) else refusal(500)

        server.answer = never
        client = RewardClient(server.url)
        with ThreadPoolExecutor(1) as pool:
            call = pool.submit(client.score, numbers(1))
            assert arrived.wait(120)
            client.close()
            with pytest.raises(UnavailableError, match="closed"):
                call.result(timeout=120)

    def test_a_dropped_client_leaves_no_thread(self, server: ScriptedServer) -> None:
        client = RewardClient(server.url)
        client.score(numbers(1))
        ours = [thread for thread in threading.enumerate() if thread.name == "rayward-client"]
        assert len(ours) == 1
        del client
        ours[0].join(timeout=120)
        assert not ours[0].is_alive()

    def test_a_forked_process_gets_its_own_connections(self, server: ScriptedServer) -> None:
        code = """
import os, sys
from serve_app.client import RewardClient
conversation = [{"role": "user", "content": "3"}]
with RewardClient(sys.argv[1], timeout_s=120) as client:
    client.score([conversation])
    if (child := os.fork()) == 0:
        os._exit(int(client.score([conversation])[0].value))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), client.score([conversation])[0].value)
"""
        command = [sys.executable, "-W", "ignore", "-c", code, server.url]
        found = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, timeout=240)
        assert found.stdout.split() == ["3", "3.0"]

    def test_a_cancelled_call_sends_no_more_and_the_client_goes_on(self, server: ScriptedServer) -> None:
        arrived = threading.Event()

        def never(request: Request) -> Reply:
            arrived.set()
            return well(request) if server.released.wait(120) else refusal(500)

        server.answer = never

        async def cancel() -> list[Score]:
            async with AsyncRewardClient(server.url, max_concurrency=2, max_conversations_per_request=1) as client:
                call = asyncio.create_task(client.score(numbers(50)))
                assert await asyncio.to_thread(arrived.wait, 120)
                call.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await call
                assert [task for task in asyncio.all_tasks() if task is not asyncio.current_task()] == []
                server.answer = well
                return await client.score(numbers(2))

        assert asyncio.run(cancel()) == [Score(0.0, 5, False), Score(1.0, 5, False)]
        assert len(server.requests) <= 2 + 2

    def test_many_tasks(self, server: ScriptedServer) -> None:
        async def score_all() -> list[float]:
            async with AsyncRewardClient(server.url) as client:
                lists = await asyncio.gather(*(client.score([chat("q", str(number))]) for number in range(200)))
                return [scores[0].value for scores in lists]

        assert asyncio.run(score_all()) == list(range(200))
        assert server.max_in_flight <= 8


def test_errors_say_what_they_know_and_pickle() -> None:
    error = OverloadedError("full", status=503, code="overloaded", param="conversations[1]")
    error.retry_after_s = 2.0
    copy = pickle.loads(pickle.dumps(error))
    assert str(copy) == "full (status 503, code overloaded, param conversations[1])"
    assert (type(copy), copy.retry_after_s) == (OverloadedError, 2.0)
    assert str(RewardClientError("plain")) == "plain"
