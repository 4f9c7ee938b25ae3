"""`/classify` as verl (vLLM), and POLAR and XTuner (SGLang), send it and read it."""

from __future__ import annotations

import math
from typing import Any

import pytest
from fastapi.testclient import TestClient

from tests.serve_app.web.dialects.conftest import FakeService, rendered, score_of

TEXT = rendered("What is 2 + 2?", "4")
SCORE = score_of("What is 2 + 2?", "4")


def test_verl_reads_the_raw_logit(client: TestClient) -> None:
    answer = client.post("/classify", json={"model": "tiny", "input": TEXT, "use_activation": False})
    assert answer.status_code == 200
    assert answer.json()["data"][-1]["probs"][-1] == SCORE


def test_vllms_whole_answer(client: TestClient, service: FakeService) -> None:
    answer = client.post("/classify", json={"input": TEXT}).json()
    num_tokens = len(service.token_ids[0])
    assert answer.pop("id").startswith("classify-")
    assert isinstance(answer.pop("created"), int)
    assert answer == {
        "object": "list",
        "model": "tiny",
        "data": [{"index": 0, "label": "LABEL_0", "probs": [SCORE], "num_classes": 1}],
        "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens, "completion_tokens": 0},
    }


@pytest.mark.parametrize(("use_activation", "expected"), [(None, SCORE), (True, 1 / (1 + math.exp(-SCORE)))])
def test_the_sigmoid_only_where_it_is_asked_for(client: TestClient, use_activation: Any, expected: float) -> None:
    answer = client.post("/classify", json={"input": TEXT, "use_activation": use_activation}).json()
    assert answer["data"][0]["probs"] == [pytest.approx(expected)]


def test_a_sigmoid_of_a_far_off_score_is_a_number(client: TestClient) -> None:
    far = client.post("/classify", json={"input": rendered("a" * 8000), "use_activation": True}).json()
    assert far["data"][0]["probs"] == [0.0]


def test_order_and_lists_of_any_length(client: TestClient) -> None:
    contents = ["one", "three", "fo"]
    answer = client.post("/classify", json={"input": [rendered("hi", content) for content in contents]}).json()
    assert [item["probs"] for item in answer["data"]] == [[score_of("hi", content)] for content in contents]
    assert [item["index"] for item in answer["data"]] == [0, 1, 2]
    lone = client.post("/classify", json={"input": [rendered("hi", "one")]}).json()
    assert [item["probs"] for item in lone["data"]] == [[score_of("hi", "one")]]
    assert client.post("/classify", json={"input": []}).json()["data"] == []


def test_messages_are_one_conversation(client: TestClient, service: FakeService) -> None:
    parts = [{"type": "text", "text": "4"}, {"type": "text", "text": "2"}]
    messages = [{"role": "user", "content": "6 * 7?"}, {"role": "assistant", "content": parts}]
    answer = client.post("/classify", json={"model": "large", "messages": messages}).json()
    assert (answer["model"], service.models) == ("large", ["large"])
    assert answer["data"][0]["probs"] == [score_of("6 * 7?", "42")]


def test_other_parts_than_text_are_refused_by_their_path(client: TestClient, service: FakeService) -> None:
    image = {"type": "image_url", "image_url": {"url": "data:"}}
    messages = [{"role": "user", "content": [{"type": "text", "text": "see"}, image]}]
    answer = client.post("/classify", json={"messages": messages})
    assert (answer.status_code, answer.json()["error"]["param"]) == (422, "messages[0].content[1]")
    called = [{"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}]
    answer = client.post("/classify", json={"messages": called})
    assert (answer.status_code, answer.json()["error"]["param"]) == (422, "messages[0].tool_calls")
    assert service.models == []


def test_no_messages_are_no_conversation(client: TestClient) -> None:
    answer = client.post("/classify", json={"messages": []})
    assert (answer.status_code, answer.json()["error"]["param"]) == (422, "messages")


@pytest.mark.parametrize(
    "body",
    [{}, {"input": TEXT, "messages": [{"role": "user", "content": "hi"}]}, {"input": TEXT, "text": TEXT}],
    ids=["neither", "input and messages", "input and text"],
)
def test_exactly_one_key(client: TestClient, body: dict[str, Any]) -> None:
    answer = client.post("/classify", json=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (422, "exactly_one_field")


def test_polar_reads_sglangs_list(client: TestClient, service: FakeService) -> None:
    texts = [TEXT, rendered("hi", "there")]
    answer = client.post("/classify", json={"model": "tiny", "text": texts}).json()
    assert [item["embedding"][0] for item in answer] == [SCORE, score_of("hi", "there")]
    assert [item["meta_info"]["prompt_tokens"] for item in answer] == [len(ids) for ids in service.token_ids]


def test_a_lone_sglang_text_is_a_list_too(client: TestClient) -> None:
    answer = client.post("/classify", json={"text": TEXT}).json()
    assert [item["embedding"] for item in answer] == [[SCORE]]
    assert client.post("/classify", json={"text": []}).json() == []


def test_unknown_models_and_unreadable_texts(client: TestClient) -> None:
    assert client.post("/classify", json={"model": "huge", "input": TEXT}).status_code == 404
    answer = client.post("/classify", json={"input": [TEXT, "a secret without markers"]})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "input[1]")
    assert "secret" not in answer.text


@pytest.mark.parametrize("front", ["", "<s>", "<s><s>", "</s></s><s>"])
@pytest.mark.parametrize("tail", ["", "<|reward|>", "<|reward|></s></s>"])
def test_one_bos_and_one_reward_token_whatever_is_sent(
    client: TestClient, service: FakeService, front: str, tail: str
) -> None:
    assert client.post("/classify", json={"input": front + TEXT + tail}).status_code == 200
    bos, reward = service.tokenizer.bos_token_id, service.tokenizer.reward_token_id
    (ids,) = service.token_ids
    assert ids == service.tokenizer.encode(
        [{"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": "4"}]
    )
    assert (ids[0], ids.count(ids[0]), ids[-1], ids.count(ids[-1])) == (bos, 1, reward, 1)


def test_the_document_says_that_logits_are_raw(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    assert "raw logits" in document["paths"]["/classify"]["post"]["description"]
    assert document["components"]["schemas"]["ClassifyRequest"]["examples"]
