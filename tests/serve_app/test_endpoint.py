"""The endpoint over real HTTP, on Ray Serve, with the embedded model."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from serve_app.app import application, build_app
from serve_app.client import RewardClient
from serve_app.config import ServiceConfig
from serve_app.model_handle import PART_TOKENS, PARTS_AT_ONCE
from serve_app.reward_model import RewardModel
from serve_app.web.proxy import PROXY_ENVIRONMENT
from tests.conftest import chat
from tests.serve_app.slow_trial import slow_trial

PATIENCE_S = 600.0  # until a test that hangs fails; nothing waits as long where all is well
pytestmark = pytest.mark.usefixtures("local_ray")
WORDS = ("the", "sea", "is", "wide", "while", "rivers", "run", "to", "it", "from", "hills", "since", "spring")


def deploy(**changes: Any) -> None:
    """Run the endpoint with two replicas of `tiny`; once more with changes is a rolling update."""
    options = {"model": "tiny", "dtype": "float32", "num_cpus": 0.5, "num_replicas": 2, "threads": 1}
    deploy_models([options | changes])


def deploy_models(models: list[dict[str, Any]], **options: Any) -> None:
    from ray import serve

    config = ServiceConfig.model_validate({"models": models} | options)
    serve.run(build_app(config), name="rayward", route_prefix="/")


@contextmanager
def serving() -> Iterator[str]:
    """Serve on a free port, without an application yet: its address."""
    from ray import serve

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    serve.start(
        http_options={"host": "127.0.0.1", "port": port},
        controller_options={"runtime_env": {"env_vars": PROXY_ENVIRONMENT}},
    )
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()


@pytest.fixture(scope="module")
def url(local_ray: None) -> Iterator[str]:
    """The address of an endpoint on a free port."""
    with serving() as url:
        deploy()
        yield url


def conversations(count: int, seed: int = 0) -> list[list[dict[str, str]]]:
    """Conversations of many lengths, some with the prompt of the one before."""
    chooser = random.Random(seed)

    def text(most: int) -> str:
        return " ".join(chooser.choices(WORDS, k=chooser.randint(1, most)))

    made: list[list[dict[str, str]]] = []
    for place in range(count):
        prompt = made[-1][0]["content"] if made and place % 3 else text(60)
        made.append(chat(prompt, text(80)))
    return made


@contextmanager
def load(url: str, asked: list[list[dict[str, str]]], *, clients: int = 4) -> Iterator[list[tuple[int, list[float]]]]:
    """Clients that ask for three conversations at a time, over and over, while the block runs.

    Yields the answers, each with the place of its first conversation; a client's error is raised after the block.
    """
    answers: list[tuple[int, list[float]]] = []
    errors: list[BaseException] = []
    stop = threading.Event()

    def ask(seed: int) -> None:
        chooser = random.Random(seed)
        # No retries: what the endpoint itself cannot mend is an error.
        with httpx.Client(base_url=url, timeout=PATIENCE_S) as client:
            while not stop.is_set():
                first = chooser.randrange(len(asked) - 3)
                try:
                    response = client.post("/v1/score", json={"conversations": asked[first : first + 3]})
                    response.raise_for_status()
                    answers.append((first, [result["score"] for result in response.json()["results"]]))
                except httpx.HTTPError as error:
                    errors.append(error)
                    return

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield answers
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not errors, errors


def wait_for(condition: Callable[[], bool], timeout_s: float = PATIENCE_S) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.1)


INGRESS = "ServeReplica:rayward:ingress"
PROXY = "ProxyActor"
CONTROLLER = "ServeController"


def replica_pids(actor_class: str = "ServeReplica:rayward:tiny") -> dict[str, int]:
    """The processes of the running actors of a class, by default the model's replicas, by actor."""
    from ray._private.state import actors  # the public way needs Ray's dashboard

    return {
        actor_id: actor["Pid"]
        for actor_id, actor in actors().items()
        if actor["State"] == "ALIVE" and actor["ActorClassName"] == actor_class
    }


def kill(actor_class: str) -> Callable[[], bool]:
    """Kill the only actor of a class; what is returned says whether Serve has replaced it."""
    ((actor, pid),) = replica_pids(actor_class).items()
    os.kill(pid, signal.SIGKILL)
    return lambda: replica_pids(actor_class).keys() - {actor} != set()


def test_scores_have_the_bits_of_the_engine_under_mixed_load(url: str, tiny: RewardModel) -> None:
    asked = conversations(90)
    expected = tiny.get_scores(asked)
    with load(url, asked) as answers, RewardClient(url) as client:
        assert [score.value for score in client.score(asked)] == expected
        assert [score.value for score in client.score(asked[::-1])] == expected[::-1]
        wait_for(lambda: len(answers) > 30)
    assert all(scores == expected[first : first + 3] for first, scores in answers)


def test_a_request_of_more_parts_than_are_under_way_at_once(url: str, tiny: RewardModel) -> None:
    asked = conversations(350, seed=1)
    assert sum(len(tiny.tokenizer.encode(each)) for each in asked) > PARTS_AT_ONCE * PART_TOKENS
    response = httpx.post(f"{url}/v1/score", json={"conversations": asked}, timeout=PATIENCE_S).json()
    assert [result["index"] for result in response["results"]] == list(range(len(asked)))
    assert [result["score"] for result in response["results"]] == tiny.get_scores(asked)


def test_each_route_and_dialect(url: str, tiny: RewardModel) -> None:
    one, other = chat("What is 2 + 2?", "4"), chat("What is 2 + 2?", "Five, I think.")
    scores = tiny.get_scores([one, other])
    with RewardClient(url) as client:
        assert client.is_healthy()
        assert [model.id for model in client.models()] == ["tiny"]
        assert client.compare(one, other).first_is_better is (scores[0] > scores[1])
        assert client.rank([one, other]).order == sorted((0, 1), key=lambda place: -scores[place])
        best = client.best_of_n(one[:1], ["4", "Five, I think."])
        assert sorted(response.score for response in best) == sorted(scores)
    text = "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in one)

    def post(path: str, **body: Any) -> Any:
        response = httpx.post(url + path, json=body, timeout=PATIENCE_S)
        assert response.status_code == 200, response.text
        return response.json()

    assert post("/classify", input=text)["data"][-1]["probs"] == scores[:1]
    assert post("/classify", model="tiny", messages=one)["data"][0]["probs"] == scores[:1]
    assert post("/classify", text=[text])[0]["embedding"] == scores[:1]
    assert post("/pooling", input=[text])["data"][0]["data"] == [scores[:1]]
    assert post("/v1/embeddings", input=text)["data"][-1]["embedding"] == scores[:1]
    assert post("/get_reward", query=[text], prompts=["?"], labels=[None])["rewards"] == scores[:1]
    assert post("/get_reward", query=["x", text])["rewards"] == [None, scores[0]]
    assert post("/get_reward", query=["<s>?" + text], prompts=["?"])["rewards"] == tiny.get_scores(
        [chat("?", text.removesuffix("<|im_end|>\n"))]
    )
    completion = post("/v1/chat/completions", model="tiny", messages=one)
    assert float(completion["choices"][0]["message"]["content"]) == scores[0]
    assert post("/score", text_1="What is 2 + 2?", text_2="4")["data"][0]["score"] == scores[0]
    assert post("/v1/score/evaluation", model="model", messages=[text])["scores"] == scores[:1]
    assert post("/rm", prompt=one[:1], response="4", label=None) == scores[0]
    ranked = post("/v2/rerank", model="tiny", query="What is 2 + 2?", documents=["4", "Five, I think."])["results"]
    assert sorted(result["relevance_score"] for result in ranked) == sorted(scores)


def test_a_deadline_and_a_length_over_the_model(url: str, tiny: RewardModel) -> None:
    body = {"conversations": conversations(300, seed=3)}
    response = httpx.post(f"{url}/v1/score", json=body, headers={"X-Request-Timeout-S": "0.05"}, timeout=PATIENCE_S)
    assert (response.status_code, response.json()["error"]["code"]) == (408, "deadline_exceeded")
    long = chat("Why?", "because " * tiny.config.max_tokens)
    response = httpx.post(f"{url}/v1/score", json={"conversations": [chat("a", "b"), long]}, timeout=PATIENCE_S)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (422, "conversations[1]")
    assert str(tiny.config.max_tokens) in error["message"]


def replica_seconds() -> float:
    """Processor time that the model's replicas have used: other work on the machine does not lengthen it."""
    times = [psutil.Process(pid).cpu_times() for pid in replica_pids().values()]
    return float(sum(each.user + each.system for each in times))


def test_a_client_that_is_gone_leaves_no_work(url: str) -> None:
    """A request after those of clients that hung up does not wait until theirs are scored."""
    body = {"conversations": conversations(350, seed=4)}

    def seconds_for(conversations: list[list[dict[str, str]]]) -> float:
        before = replica_seconds()
        httpx.post(f"{url}/v1/score", json={"conversations": conversations}, timeout=PATIENCE_S).raise_for_status()
        return replica_seconds() - before

    async def hang_up(begun_at: float) -> None:
        async with httpx.AsyncClient(base_url=url, timeout=PATIENCE_S) as client:
            tasks = [asyncio.create_task(client.post("/v1/score", json=body)) for _ in range(12)]
            await asyncio.to_thread(wait_for, lambda: replica_seconds() > begun_at)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    one_s = seconds_for(body["conversations"])
    before = replica_seconds()
    asyncio.run(hang_up(before + one_s / 2))
    seconds_for(conversations(60, seed=5))
    assert replica_seconds() - before < 6 * one_s, "twelve requests were scored for nobody"


def test_slow_clients_hold_nobody_up(url: str, tiny: RewardModel) -> None:
    """Some stop in the middle of what they send, some never read their answer: others are served as before."""
    host, _, port = url.removeprefix("http://").partition(":")
    asked = conversations(30, seed=9)
    expected = tiny.get_scores(asked)
    body = json.dumps({"conversations": conversations(100, seed=10)}).encode()
    head = f"POST /v1/score HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n".encode()
    head += b"Content-Length: %d\r\n\r\n" % len(body)

    def begun(sent: bytes) -> socket.socket:
        connection = socket.create_connection((host, int(port)))
        connection.sendall(sent)
        return connection

    with ExitStack() as stack:
        for _ in range(100):
            stack.enter_context(begun(head + body[: len(body) // 2]))
        for _ in range(4):
            stack.enter_context(begun(head + body)).setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        with httpx.Client(base_url=url, timeout=PATIENCE_S) as client:
            for _ in range(3):
                answer = client.post("/v1/score", json={"conversations": asked}).raise_for_status().json()
                assert [result["score"] for result in answer["results"]] == expected


def test_a_killed_replica_costs_no_request(url: str, tiny: RewardModel) -> None:
    asked = conversations(90)
    expected = tiny.get_scores(asked)
    before = replica_pids()
    assert len(before) == 2
    with load(url, asked) as answers:
        wait_for(lambda: len(answers) > 10)
        os.kill(next(iter(before.values())), signal.SIGKILL)
        wait_for(lambda: len(replica_pids()) == 2 and replica_pids() != before)
        seen = len(answers)
        wait_for(lambda: len(answers) > seen + 10)
    assert all(scores == expected[first : first + 3] for first, scores in answers)


def test_a_killed_ingress_costs_no_request(url: str, tiny: RewardModel) -> None:
    """There is one, which has a request of every client: each waits until Serve has another, and no client is told."""
    asked = conversations(90)
    expected = tiny.get_scores(asked)
    with load(url, asked) as answers:
        wait_for(lambda: len(answers) > 10)
        wait_for(kill(INGRESS))
        seen = len(answers)
        wait_for(lambda: len(answers) > seen + 10)
    assert all(scores == expected[first : first + 3] for first, scores in answers)


@pytest.mark.slow
def test_a_killed_controller_costs_no_request(url: str, tiny: RewardModel) -> None:
    """It starts again where it was, and then replaces a replica as before."""
    asked = conversations(90)
    expected = tiny.get_scores(asked)
    ((_, before),) = replica_pids(CONTROLLER).items()
    with load(url, asked) as answers:
        wait_for(lambda: len(answers) > 10)
        os.kill(before, signal.SIGKILL)
        wait_for(lambda: set(replica_pids(CONTROLLER).values()) - {before} != set())
        replicas = replica_pids()
        os.kill(next(iter(replicas.values())), signal.SIGKILL)
        wait_for(lambda: len(replica_pids()) == 2 and replica_pids() != replicas)
        seen = len(answers)
        wait_for(lambda: len(answers) > seen + 10)
    assert all(scores == expected[first : first + 3] for first, scores in answers)


@pytest.mark.slow
def test_a_killed_proxy_costs_the_reward_client_no_call(url: str, tiny: RewardModel) -> None:
    """Plain HTTP breaks: no process is left that could answer."""
    asked = conversations(90)
    expected = tiny.get_scores(asked)
    with RewardClient(url, max_conversations_per_request=3) as client, ThreadPoolExecutor(8) as pool:
        wait_for(client.is_healthy)
        calls = [pool.submit(client.score, asked) for _ in range(4)]
        is_replaced = kill(PROXY)
        with pytest.raises(httpx.TransportError):
            wait_for(lambda: is_replaced() or not httpx.get(f"{url}/health", timeout=60))
        calls += [pool.submit(client.score, asked) for _ in range(4)]
        assert all([score.value for score in call.result()] == expected for call in calls)
    assert is_replaced()


@pytest.mark.slow
def test_a_rolling_update_costs_no_request(url: str, tiny: RewardModel) -> None:
    asked = conversations(90)
    expected = tiny.get_scores(asked)
    before = replica_pids()
    with load(url, asked) as answers:
        wait_for(lambda: len(answers) > 10)
        deploy(token_budget=2000)
        wait_for(lambda: len(replica_pids()) == 2 and not replica_pids().keys() & before.keys())
        seen = len(answers)
        wait_for(lambda: len(answers) > seen + 10)
    assert all(scores == expected[first : first + 3] for first, scores in answers)


@pytest.mark.slow
def test_overload_is_refused_at_once(url: str) -> None:
    """With a queue of one token a replica holds one request and its batch; the rest are told when to come again."""
    deploy(max_queued_tokens=1, num_replicas=1)
    body = {"conversations": conversations(60, seed=6)}

    async def ask() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=url, timeout=PATIENCE_S) as client:
            return await asyncio.gather(*(client.post("/v1/score", json=body) for _ in range(12)))

    responses = asyncio.run(ask())
    refused = [response for response in responses if response.status_code == 503]
    assert refused
    assert len(refused) < len(responses)
    assert {response.status_code for response in responses} == {200, 503}
    assert all(int(response.headers["retry-after"]) >= 1 for response in refused)
    assert {response.json()["error"]["code"] for response in refused} == {"overloaded"}


@pytest.mark.slow
def test_a_trainer_that_ignores_retry_after_loses_no_sample(url: str, tiny: RewardModel) -> None:
    """OpenRLHF's client asks for each sample by itself, five times, a second apart, and gives the sample up then."""
    from ray import serve

    options = {"model": "tiny", "dtype": "float32", "num_cpus": 0.5, "threads": 1, "max_wait_s": 1.0}
    config = ServiceConfig.model_validate(options)
    serve.run(application(config, load=slow_trial), name="rayward", route_prefix="/")
    asked = conversations(512, seed=8)
    texts = ["".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in each) for each in asked]

    async def reward_of(client: httpx.AsyncClient, text: str) -> float | None:
        for _ in range(5):
            response = await client.post("/get_reward", json={"query": [text], "prompts": [""], "labels": [None]})
            if response.status_code == 200:
                return float(response.json()["rewards"][0])
            await asyncio.sleep(1.0)
        return None

    async def rewards() -> list[float | None]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=url, timeout=PATIENCE_S, limits=limits) as client:
            return await asyncio.gather(*(reward_of(client, text) for text in texts))

    assert asyncio.run(rewards()) == tiny.get_scores(asked)


@pytest.mark.slow
def test_two_models_are_served_side_by_side(url: str, tiny: RewardModel, other_folder: Path) -> None:
    """The first is the default; one that is to sleep while nobody asks wakes up for a request."""
    shared = {"dtype": "float32", "num_cpus": 0.5, "threads": 1}
    second = shared | {"model": str(other_folder), "name": "other", "min_replicas": 0, "max_replicas": 1}
    deploy_models([shared | {"model": "tiny"}, second])
    asked = conversations(10, seed=7)
    other = RewardModel.from_pretrained(str(other_folder), device="cpu", dtype="float32")
    with RewardClient(url) as client:
        wait_for(client.is_healthy)
        assert [model.id for model in client.models()] == ["tiny", "other"]
        assert [score.value for score in client.score(asked)] == tiny.get_scores(asked)
    with RewardClient(url, model="other") as client:
        assert [score.value for score in client.score(asked)] == other.get_scores(asked)
    response = httpx.post(f"{url}/v1/score", json={"model": "third", "conversations": asked}, timeout=PATIENCE_S)
    assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")
