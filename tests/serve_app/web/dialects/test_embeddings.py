"""`/v1/embeddings` as verl's SGLang path sends it and reads it."""

from __future__ import annotations

import base64
import math

import numpy as np
from fastapi.testclient import TestClient

from tests.serve_app.web.dialects.conftest import FakeService, rendered, score_of


def test_verl_reads_the_last_number(client: TestClient) -> None:
    answer = client.post("/v1/embeddings", json={"model": "tiny", "input": rendered("hi", "there")})
    assert answer.json()["data"][-1]["embedding"][-1] == score_of("hi", "there")


def test_the_whole_answer_in_order(client: TestClient, service: FakeService) -> None:
    body = {"input": [rendered("hi", "there"), rendered("hi", "you")], "encoding_format": "float"}
    answer = client.post("/v1/embeddings", json=body).json()
    num_tokens = sum(len(ids) for ids in service.token_ids)
    assert answer == {
        "object": "list",
        "data": [
            {"object": "embedding", "index": 0, "embedding": [score_of("hi", "there")]},
            {"object": "embedding", "index": 1, "embedding": [score_of("hi", "you")]},
        ],
        "model": "tiny",
        "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens, "completion_tokens": 0},
    }


def test_openais_sdk_reads_base64(client: TestClient) -> None:
    """Its request as it goes over the wire, and its reading of the answer: numpy.frombuffer, float32."""
    body = {"input": [rendered("hi", "there"), "unreadable"], "model": "tiny", "encoding_format": "base64"}
    data = client.post("/v1/embeddings", json=body).json()["data"]
    read = [np.frombuffer(base64.b64decode(item["embedding"]), dtype="float32").tolist() for item in data]
    assert read[0] == [score_of("hi", "there")]
    assert math.isnan(read[1][0])


def test_what_would_change_the_number_is_refused(client: TestClient) -> None:
    for field, value in [("normalize", True), ("dimensions", 8)]:
        answer = client.post("/v1/embeddings", json={"input": rendered("hi", "there"), field: value})
        assert (answer.status_code, answer.json()["error"]["param"]) == (422, field)


def test_messages_are_one_conversation(client: TestClient) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "there"}]
    answer = client.post("/v1/embeddings", json={"messages": messages}).json()
    assert answer["data"][0]["embedding"] == [score_of("hi", "there")]


def test_an_empty_list_is_an_empty_list(client: TestClient) -> None:
    assert client.post("/v1/embeddings", json={"input": []}).json()["data"] == []
