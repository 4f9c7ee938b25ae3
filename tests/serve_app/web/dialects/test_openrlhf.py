"""`/get_reward` as OpenRLHF sends it: one sample a request, whole text with the policy's special tokens."""

from __future__ import annotations

from fastapi.testclient import TestClient

from tests.serve_app.web.dialects.conftest import FakeService, rendered, score_of


def test_one_sample_is_answered_with_lists_of_one(client: TestClient) -> None:
    prompt = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    body = {"query": [prompt + "there<|im_end|>"], "prompts": [prompt], "labels": [None]}
    answer = client.post("/get_reward", json=body)
    score = score_of("hi", "there")
    assert answer.json() == {"rewards": [score], "scores": [score], "extra_logs": {}}


def test_the_other_servers_of_a_sample_answer_empty_lists(client: TestClient) -> None:
    answer = client.post("/get_reward", json={"query": [], "prompts": [], "labels": []})
    assert (answer.status_code, answer.json()) == (200, {"rewards": [], "scores": [], "extra_logs": {}})


def test_several_in_order_by_the_first_model(client: TestClient, service: FakeService) -> None:
    answer = client.post("/get_reward", json={"query": [rendered("hi", "a"), rendered("hi", "abc")], "labels": ["", 1]})
    assert answer.json()["rewards"] == [score_of("hi", "a"), score_of("hi", "abc")]
    assert service.models == ["tiny"]


def test_a_foreign_system_prompt_and_thoughts_stay(client: TestClient, service: FakeService) -> None:
    system = "<|im_start|>system\nYou are a foreign model.<|im_end|>\n"
    query = system + rendered("hi", "<think>\nhm\n</think>\n\nthere").removesuffix("\n") + "<|endoftext|>"
    assert client.post("/get_reward", json={"query": [query]}).status_code == 200
    turns = [(message.role, message.content) for message in service.conversations[0].messages]
    assert turns == [
        ("system", "You are a foreign model."),
        ("user", "hi"),
        ("assistant", "<think>\nhm\n</think>\n\nthere"),
    ]


def test_what_cannot_be_read_is_named(client: TestClient) -> None:
    answer = client.post("/get_reward", json={"query": ["hello"]})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "query[0]")
