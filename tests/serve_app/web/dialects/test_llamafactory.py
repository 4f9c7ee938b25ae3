"""`/v1/score/evaluation` as LLaMA-Factory's PPO sends it: texts decoded with their special tokens."""

from __future__ import annotations

from fastapi.testclient import TestClient

from tests.serve_app.web.dialects.conftest import FakeService, rendered, score_of


def test_its_client_sends_the_model_name_model(client: TestClient, service: FakeService) -> None:
    texts = ["<s>" + rendered("hi", "there").removesuffix("\n") + "</s>", "<s>" + rendered("hi", "you")]
    answer = client.post("/v1/score/evaluation", json={"model": "model", "messages": texts}).json()
    assert answer["scores"] == [score_of("hi", "there"), score_of("hi", "you")]
    assert (answer["object"], answer["model"], service.limits) == ("score.evaluation", "tiny", [(None, None)] * 2)


def test_a_served_model_can_be_named_and_another_not(client: TestClient, service: FakeService) -> None:
    body = {"model": "large", "messages": [rendered("hi", "there")]}
    assert client.post("/v1/score/evaluation", json=body).json()["model"] == "large"
    assert client.post("/v1/score/evaluation", json=body | {"model": "huge"}).status_code == 404


def test_max_length_shortens_the_prompt_and_nothing_else_does(client: TestClient, service: FakeService) -> None:
    text = rendered("long " * 40, "there")
    assert client.post("/v1/score/evaluation", json={"messages": [text], "max_length": 24}).status_code == 200
    assert service.limits == [("left", 24)]
    (ids,) = service.token_ids
    response = service.tokenizer.encode([{"role": "assistant", "content": "there"}])[1:]
    assert len(ids) == 24
    assert ids[-len(response) :] == response


def test_no_texts_are_a_400(client: TestClient) -> None:
    answer = client.post("/v1/score/evaluation", json={"model": "model", "messages": []})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "messages")


def test_one_text_without_a_score_is_null_and_all_are_an_error(client: TestClient) -> None:
    answer = client.post("/v1/score/evaluation", json={"model": "model", "messages": [rendered("hi", "you"), "x"]})
    assert answer.json()["scores"] == [score_of("hi", "you"), None]
    assert answer.json()["errors"][0]["param"] == "messages[1]"
    answer = client.post("/v1/score/evaluation", json={"model": "model", "messages": ["x", "y"]})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "messages[0]")
