"""`/classify` as verl (vLLM), and POLAR and XTuner (SGLang), send it and read it."""

from __future__ import annotations

import math
from collections.abc import Callable
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


def test_a_lone_sglang_text_gets_an_object(client: TestClient) -> None:
    answer = client.post("/classify", json={"text": TEXT}).json()
    assert answer["embedding"] == [SCORE]
    assert client.post("/classify", json={"text": []}).json() == []


def test_unknown_models_and_unreadable_texts(client: TestClient) -> None:
    assert client.post("/classify", json={"model": "huge", "input": TEXT}).status_code == 404
    sent: list[tuple[Any, str]] = [("a secret", "input"), (["a secret"], "input[0]")]
    for text, param in sent:
        answer = client.post("/classify", json={"input": text})
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == param
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


@pytest.mark.parametrize("name", ["tiny", "org/tiny", "", None])
def test_a_model_may_be_named_by_its_name_id_or_the_last_part_of_either(client: TestClient, name: str | None) -> None:
    assert client.post("/classify", json={"model": name, "input": TEXT}).json()["model"] == "tiny"
    assert client.post("/classify", json={"model": "org/large", "input": TEXT}).json()["model"] == "large"
    answer = client.post("/classify", json={"model": "other/tiny", "input": TEXT})
    assert answer.status_code == 404
    assert "'tiny', 'large'" in answer.json()["error"]["message"]


def test_a_text_without_a_score_costs_its_own_alone(client: TestClient) -> None:
    answer = client.post("/classify", json={"input": [TEXT, "a secret", TEXT]})
    assert answer.status_code == 200
    assert [item["probs"] for item in answer.json()["data"]] == [[SCORE], [None], [SCORE]]
    (error,) = answer.json()["errors"]
    assert (error["index"], error["param"], error["code"]) == (1, "input[1]", "unreadable_text")
    assert "secret" not in answer.text
    native = client.post("/classify", json={"text": [TEXT, "a secret"]}).json()
    assert [item["embedding"] for item in native] == [[SCORE], [None]]
    assert "ChatML" in native[1]["meta_info"]["error"]


def test_old_names_of_the_activation_do_what_they_say_or_are_refused(client: TestClient) -> None:
    sigmoid = client.post("/classify", json={"input": TEXT, "use_activation": True}).json()["data"]
    assert client.post("/classify", json={"input": TEXT, "activation": True}).json()["data"] == sigmoid
    raw = client.post("/classify", json={"input": TEXT, "activation": False, "softmax": False}).json()
    assert raw["data"][0]["probs"] == [SCORE]
    native = client.post("/classify", json={"text": TEXT, "use_activation": True}).json()
    assert native["embedding"] == sigmoid[0]["probs"]
    for refused in ({"softmax": True}, {"activation": True, "use_activation": False}, {"chat_template": "x"}):
        answer = client.post("/classify", json={"input": TEXT} | refused)
        assert (answer.status_code, answer.json()["error"]["param"]) == (422, next(iter(refused)))


def test_truncate_prompt_tokens_is_honoured_or_refused(client: TestClient, service: FakeService) -> None:
    long = rendered("word " * 100, "4")
    for path in ("/classify", "/pooling", "/v1/embeddings", "/v1/classify"):
        assert client.post(path, json={"input": long, "truncate_prompt_tokens": 40}).status_code == 200
        assert service.limits[-1:] == [("left", 40)]
        assert len(service.token_ids[-1]) <= 40
    body = {"input": long, "truncate_prompt_tokens": 40, "truncation_side": "right"}
    assert client.post("/classify", json=body).status_code == 200
    assert service.limits[-1:] == [("right", 40)]
    assert client.post("/classify", json={"input": long, "truncate_prompt_tokens": -1}).status_code == 200
    assert service.limits[-1:] == [("left", None)]
    for wrong in (-2, 0, 1):
        answer = client.post("/classify", json={"input": long, "truncate_prompt_tokens": wrong})
        assert answer.status_code == 422


def test_token_ids_are_the_text_that_they_spell(client: TestClient, service: FakeService) -> None:
    ids = service.tokenizer._backend.encode("<s>" + TEXT, add_special_tokens=False).ids
    asked: list[tuple[dict[str, Any], Callable[[Any], Any]]] = [
        ({"input": ids}, lambda answer: answer["data"][0]["probs"]),
        ({"input": [ids]}, lambda answer: answer["data"][0]["probs"]),
        ({"input_ids": ids}, lambda answer: answer["embedding"]),
        ({"input_ids": [ids]}, lambda answer: answer[0]["embedding"]),
    ]
    for body, read in asked:
        assert read(client.post("/classify", json=body).json()) == [SCORE]
    for wrong in ([10**9], [-1]):
        answer = client.post("/classify", json={"input": wrong})
        assert (answer.status_code, answer.json()["error"]["code"]) == (422, "invalid_token_ids")


def test_sglangs_conversations_and_its_other_paths(client: TestClient) -> None:
    conversation = [{"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": "4"}]
    for path in ("/classify", "/encode"):
        assert client.post(path, json={"conv": conversation}).json()["embedding"] == [SCORE]
        answer = client.post(path, json={"conv": [conversation, conversation]}).json()
        assert [item["embedding"] for item in answer] == [[SCORE], [SCORE]]
        assert client.post(path, json={"text": TEXT}).json()["embedding"] == [SCORE]
        odd = client.post(path, json={"conv": [conversation, [], conversation]}).json()
        assert [item["embedding"] for item in odd] == [[SCORE], [None], [SCORE]]
    assert client.post("/encode", json={}).json()["error"]["code"] == "exactly_one_field"
    assert client.post("/v1/classify", json={"input": TEXT}).json()["data"][0]["probs"] == [SCORE]


def test_with_one_model_dialects_whose_servers_ignore_the_name_ignore_it(
    client: TestClient, service: FakeService
) -> None:
    asked: list[tuple[str, dict[str, Any]]] = [
        ("/encode", {"text": TEXT}),
        ("/classify", {"text": TEXT}),
        ("/v1/embeddings", {"input": TEXT}),
    ]
    asked += [("/v1/score/evaluation", {"messages": [TEXT]}), ("/get_reward", {"query": [TEXT]})]
    for path, body in asked:
        assert client.post(path, json=body | {"model": "gpt-4"}).status_code == 404
    service.model_names.pop()
    for path, body in asked:
        assert client.post(path, json=body | {"model": "gpt-4"}).status_code == 200
    assert client.post("/classify", json={"input": TEXT, "model": "gpt-4"}).status_code == 404
