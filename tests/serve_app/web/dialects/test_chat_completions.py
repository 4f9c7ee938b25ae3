"""`/v1/chat/completions` as ms-swift's InferClient asks a reward model and reads it."""

from __future__ import annotations

import pytest
from fastapi.testclient import TestClient

from tests.serve_app.web.dialects.conftest import score_of

MESSAGES = [{"role": "user", "content": "Hello! Who are you?"}, {"role": "assistant", "content": "A reward model."}]


def test_the_score_is_the_content(client: TestClient) -> None:
    body = {"model": "tiny", "messages": MESSAGES, "temperature": 0.0, "max_tokens": 512}
    answer = client.post("/v1/chat/completions", json=body).json()
    assert (answer["object"], answer["model"], answer["choices"][0]["finish_reason"]) == (
        "chat.completion",
        "tiny",
        "stop",
    )
    message = answer["choices"][0]["message"]
    assert message["role"] == "assistant"
    assert float(message["content"]) == score_of(*(each["content"] for each in MESSAGES))
    assert answer["usage"]["completion_tokens"] == 0


@pytest.mark.parametrize(
    ("wrong", "param"),
    [
        ({"stream": True}, "stream"),
        ({"n": 2}, "n"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"messages": MESSAGES[:1]}, "messages[0].role"),
        ({"messages": []}, "messages"),
    ],
)
def test_a_request_to_generate_is_refused(client: TestClient, wrong: dict[str, object], param: str) -> None:
    answer = client.post("/v1/chat/completions", json={"messages": MESSAGES} | wrong)
    assert (answer.status_code, answer.json()["error"]["param"]) == (422, param)
