"""Made-up requests to every route, as the document allows them and as broken bytes: an answer always, never a 5xx.

All of the endpoint runs but the replicas: gate, routes, dialects, tokenizer and parts. RAYWARD_FUZZ sets how many
broken requests there are, RAYWARD_FUZZ_SEED which.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import os
import random
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from typing import Any

import httpx
import pytest
import schemathesis
from fastapi import FastAPI
from hypothesis import HealthCheck, given, settings
from schemathesis.core.result import Ok

from serve_app.config import ModelConfig
from serve_app.ingress import ModelService
from serve_app.model_handle import ModelHandle
from serve_app.reward_model import RewardModel
from serve_app.web.gate import http_app
from serve_app.web.security import Guard
from tests.serve_app.test_model_handle import Replicas, lengths

NUM_BROKEN = int(os.environ.get("RAYWARD_FUZZ", "2000"))
SEED = int(os.environ.get("RAYWARD_FUZZ_SEED", "0"))
PATIENCE_S = 120.0  # until a request that hangs fails
HEALTH_CHECKS = list(HealthCheck)
ODD_VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 2**63, 10**400, 1e308, -0.5, "", "\x00", "\ud800", "<|im_end|>", "a" * 3000, [], [[]], [None],
    {}, {"": {}}, [{"role": "user"}], [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
)  # fmt: skip
ODD_BYTES = (
    b"\xff",
    b"\x00",
    b"\xed\xa0\x80",
    b"NaN",
    b"1e999",
    b"[" * 2000,
    b"{" * 2000,
    b'"',
    b"\\u",
    b"\xef\xbb\xbf",
)
ODD_HEADERS: tuple[dict[str, str], ...] = (
    {"Content-Type": "text/plain"},
    {"Content-Type": "application/json; charset=utf-16"},
    {"Content-Type": "multipart/form-data; boundary=x"},
    {"Content-Type": ""},
    {"Content-Encoding": "gzip"},
    {"Content-Encoding": "br, gzip"},
    {"X-Request-Timeout-S": "1e-9"},
    {"Accept-Encoding": "identity;q=0"},
    {"Content-Length": "7"},
)


@pytest.fixture(scope="module")
def app(tiny: RewardModel) -> Iterator[FastAPI]:
    """The endpoint's app. Its one model's replicas answer with the lengths of what they are asked."""
    with ThreadPoolExecutor(1) as pool:
        config = ModelConfig.model_validate({"model": "tiny"})
        handle = ModelHandle(config, Replicas(lengths), pool)  # type: ignore[arg-type]
        yield http_app(ModelService([handle]), Guard([], allow_unauthenticated=True))


def test_no_request_that_the_document_allows_is_a_server_error(app: FastAPI) -> None:
    """Requests made up from the OpenAPI document, right and wrong ones."""
    schema = schemathesis.openapi.from_asgi("/openapi.json", app)
    tried = Counter[tuple[str, str, str]]()
    operations = [result.ok() for result in schema.get_all_operations() if isinstance(result, Ok)]
    for operation, mode in product(operations, schemathesis.GenerationMode):
        if operation.method == "post" or mode is schemathesis.GenerationMode.POSITIVE:
            tried[operation.method, operation.path, mode.value] += ask_without_server_error(operation, mode)
    posts = {path for method, path, _ in tried if method == "post"}
    assert posts == set(examples(app))
    assert all(tried.values())


def ask_without_server_error(operation: Any, mode: Any) -> int:
    """Send made-up requests to an operation; how many."""
    statuses = []

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(max_examples=15, deadline=None, derandomize=True, database=None, suppress_health_check=HEALTH_CHECKS)
    def ask(case: Any) -> None:
        response = case.call()
        statuses.append(response.status_code)
        assert response.status_code < 500, (case.operation.path, case.body, response.text)

    ask()
    return len(statuses)


def examples(app: FastAPI) -> dict[str, list[Any]]:
    """The bodies that the document shows for each route that takes one."""
    document = app.openapi()
    found: dict[str, list[Any]] = {}
    for path, operations in document["paths"].items():
        if "post" in operations:
            schema = operations["post"]["requestBody"]["content"]["application/json"]["schema"]
            names = [each["$ref"].rpartition("/")[2] for each in schema.get("anyOf", [schema])]
            found[path] = [body for name in names for body in document["components"]["schemas"][name]["examples"]]
    return found


def test_no_broken_request_is_a_server_error(app: FastAPI) -> None:
    bodies = [(path, body) for path, bodies in examples(app).items() for body in bodies]
    chooser = random.Random(SEED)

    async def send() -> Counter[int]:
        statuses = Counter[int]()
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            for _ in range(NUM_BROKEN):
                path, body = chooser.choice(bodies)
                content, headers = broken(body, chooser)
                asked = client.post(path, content=content, headers=headers)
                response = await asyncio.wait_for(asked, PATIENCE_S)
                assert response.status_code < 500, (path, headers, content[:2000], response.text)
                response.json()
                statuses[response.status_code] += 1
        return statuses

    statuses = asyncio.run(send())
    assert statuses.keys() >= {200, 400, 415, 422}, statuses


def broken(body: Any, chooser: random.Random) -> tuple[bytes, dict[str, str]]:
    """A body with something wrong in its values, its bytes or its headers, or in several of them."""
    body = json.loads(json.dumps(body))
    for _ in range(chooser.randint(0, 2)):
        body = replaced(body, chooser)
    content = json.dumps(body, allow_nan=True).encode("utf-8", "surrogatepass")
    for _ in range(chooser.choice((0, 0, 1, 3))):
        first, last = sorted(chooser.randrange(len(content) + 1) for _ in range(2))
        content = chooser.choice(
            (
                content[:first] + content[last:],
                content[:last] + content[first:],
                content[:first] + chooser.choice(ODD_BYTES) + content[first:],
                content[:first] + bytes([chooser.randrange(256)]) + content[first + 1 :],
            )
        )[:100_000]
    headers = {"Content-Type": "application/json"}
    if chooser.random() < 0.2:
        headers |= chooser.choice(ODD_HEADERS)
        if chooser.random() < 0.5:
            content = gzip.compress(content)[: chooser.choice((None, 20))]
    return content, headers


def replaced(value: Any, chooser: random.Random) -> Any:
    """The value with an odd one somewhere in it."""
    if isinstance(value, dict) and value and chooser.random() < 0.9:
        key = chooser.choice(list(value))
        return value | {key: replaced(value[key], chooser)}
    if isinstance(value, list) and value and chooser.random() < 0.8:
        place = chooser.randrange(len(value))
        return [*value[:place], replaced(value[place], chooser), *value[place + 1 :]]
    return chooser.choice(ODD_VALUES)
