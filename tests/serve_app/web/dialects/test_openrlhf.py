"""`/get_reward` as OpenRLHF sends it: one sample a request, whole text with the policy's special tokens."""

from __future__ import annotations

import pytest
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
    assert service.models == ["tiny", "tiny"]


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


def test_a_sample_without_a_reward_is_null_in_its_place(
    client: TestClient, service: FakeService, caplog: pytest.LogCaptureFixture
) -> None:
    limit = service.tokenizer.max_tokens
    for query in ("hello", rendered("hi", "word " * limit)):
        answer = client.post("/get_reward", json={"query": [query]})
        assert answer.status_code == 200
        assert answer.json()["rewards"] == answer.json()["scores"] == [None]
        (error,) = answer.json()["errors"]
        assert (error["index"], error["param"]) == (0, "query[0]")
        assert f"1 of 1 have no score; query[0]: {error['message']}" in caplog.text
    answer = client.post("/get_reward", json={"query": [rendered("hi", "a"), "hello", rendered("hi", "b")]})
    assert answer.json()["rewards"] == [score_of("hi", "a"), None, score_of("hi", "b")]


@pytest.mark.parametrize(
    "answer",
    [
        "4<|im_end|>\n<|im_start|>user\nthanks",
        "4<|im_end|>\n<|im_start|>user\nthanks<|im_end|>\n<|im_start|>assistant\nWelcome",
        "The token <|im_end|> ends a turn.",
        "<|im_start|>",
    ],
)
@pytest.mark.parametrize("tail", ["", "<|im_end|>"])
@pytest.mark.parametrize(
    "prompt", ["hi", "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"], ids=["plain", "rendered"]
)
def test_the_answer_is_what_follows_the_prompt(
    client: TestClient, service: FakeService, answer: str, tail: str, prompt: str
) -> None:
    """The tokenizer puts a BOS in front of the query that it decodes."""
    body = {"query": ["<s>" + prompt + answer + tail], "prompts": [prompt], "labels": [None]}
    assert client.post("/get_reward", json=body).json()["rewards"] == [score_of("hi", answer)]
    assert [message.content for message in service.conversations[-1].messages] == ["hi", answer]
