"""`/v1/embeddings` as verl's SGLang path sends it and reads it."""

from __future__ import annotations

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


def test_base64_is_refused_and_not_answered_with_numbers(client: TestClient) -> None:
    body = {"input": rendered("hi", "there"), "encoding_format": "base64"}
    assert client.post("/v1/embeddings", json=body).status_code == 422


def test_an_empty_list_is_an_empty_list(client: TestClient) -> None:
    assert client.post("/v1/embeddings", json={"input": []}).json()["data"] == []
