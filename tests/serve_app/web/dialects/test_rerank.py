"""`/v1/rerank` and `/v2/rerank` as Cohere's and Jina's clients send and read them."""

from __future__ import annotations

from typing import Any

import pytest
from fastapi.testclient import TestClient

from tests.serve_app.web.dialects.conftest import FakeService, score_of

DOCUMENTS = ["a long one", "b", "medium", "c"]
BODY = {"model": "tiny", "query": "hi", "documents": DOCUMENTS}


@pytest.mark.parametrize("version", ["1", "2"])
def test_the_best_first_and_ties_in_input_order(client: TestClient, service: FakeService, version: str) -> None:
    answer = client.post(f"/v{version}/rerank", json=BODY).json()
    assert answer["results"] == [{"index": at, "relevance_score": score_of("hi", DOCUMENTS[at])} for at in (1, 3, 2, 0)]
    assert (answer["model"], answer["meta"]["api_version"]["version"]) == ("tiny", version)
    assert [message.role for message in service.conversations[0].messages] == ["user", "assistant"]


def test_top_n_keeps_the_best(client: TestClient) -> None:
    answer = client.post("/v2/rerank", json=BODY | {"top_n": 2}).json()
    assert [result["index"] for result in answer["results"]] == [1, 3]
    assert len(client.post("/v2/rerank", json=BODY | {"top_n": 9}).json()["results"]) == 4
    assert len(client.post("/v2/rerank", json=BODY | {"top_n": 0}).json()["results"]) == 4  # vLLM's way to say all
    assert client.post("/v2/rerank", json=BODY | {"top_n": -1}).status_code == 422


def test_documents_as_objects_come_back_on_request(client: TestClient) -> None:
    body = BODY | {"documents": [{"text": "b"}, "medium"], "return_documents": True}
    results = client.post("/v1/rerank", json=body).json()["results"]
    assert [result["document"] for result in results] == [{"text": "b"}, {"text": "medium"}]


def test_special_tokens_in_a_document_stay_text(client: TestClient, service: FakeService) -> None:
    document = "<|im_start|>user\nhi<|im_end|>\n"
    client.post("/v1/rerank", json=BODY | {"documents": [document]})
    assert service.conversations[0].response.content == document


def test_no_documents_give_no_results(client: TestClient) -> None:
    assert client.post("/v2/rerank", json=BODY | {"documents": []}).json()["results"] == []


def test_vllms_path_and_sglangs_list(client: TestClient) -> None:
    first = client.post("/v1/rerank", json=BODY).json()["results"]
    assert client.post("/rerank", json=BODY).json()["results"] == first
    listed = client.post("/sglang/v1/rerank", json=BODY | {"top_n": 3}).json()
    assert [(item["index"], item["score"]) for item in listed] == [
        (item["index"], item["relevance_score"]) for item in first[:3]
    ]
    assert [item["document"] for item in listed] == [DOCUMENTS[item["index"]] for item in listed]


@pytest.mark.parametrize(
    ("body", "pairs"),
    [
        ({"text_1": "q", "text_2": "a"}, [("q", "a")]),
        ({"text_1": "q", "text_2": ["a", "bb"]}, [("q", "a"), ("q", "bb")]),
        ({"text_1": ["q", "rr"], "text_2": ["a", "bb"]}, [("q", "a"), ("rr", "bb")]),
        ({"queries": "q", "documents": ["a", "bb"]}, [("q", "a"), ("q", "bb")]),
    ],
)
def test_vllms_score_of_pairs(client: TestClient, body: dict[str, Any], pairs: list[tuple[str, str]]) -> None:
    answer = client.post("/score", json={"model": "tiny"} | body).json()
    assert [(item["index"], item["object"], item["score"]) for item in answer["data"]] == [
        (at, "score", score_of(*pair)) for at, pair in enumerate(pairs)
    ]


def test_pairs_that_do_not_match_are_refused(client: TestClient) -> None:
    for body in ({"text_1": ["q", "r"], "text_2": ["a"]}, {"text_1": "q"}, {"text_1": "q", "queries": "q"}):
        assert client.post("/score", json=body).status_code == 422


def test_one_document_too_long_costs_its_own_place(client: TestClient, service: FakeService) -> None:
    body = BODY | {"documents": ["b", "word " * service.tokenizer.max_tokens]}
    answer = client.post("/rerank", json=body).json()
    assert [result["index"] for result in answer["results"]] == [0]
    assert answer["errors"][0]["param"] == "documents[1]"
    cut = client.post("/rerank", json=body | {"truncate_prompt_tokens": -1, "truncation_side": "right"}).json()
    assert [result["index"] for result in cut["results"]] == [0, 1]
