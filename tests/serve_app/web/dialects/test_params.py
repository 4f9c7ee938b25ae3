"""An error of one conversation names it as the client's own contract does."""

from __future__ import annotations

from typing import Any

import pytest
from fastapi.testclient import TestClient

from tests.serve_app.web.dialects.conftest import FakeService, rendered

TEXT = rendered("a", "b")
TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@pytest.mark.parametrize(
    ("path", "body", "params"),
    [
        ("/classify", {"input": TEXT}, ["input"]),
        ("/classify", {"input": [TEXT, TEXT]}, ["input[0]", "input[1]"]),
        ("/classify", {"messages": TURNS}, ["messages"]),
        ("/classify", {"text": [TEXT]}, ["text[0]"]),
        ("/pooling", {"input": [TEXT]}, ["input[0]"]),
        ("/v1/embeddings", {"input": TEXT}, ["input"]),
        ("/get_reward", {"query": [TEXT], "prompts": [""], "labels": [""]}, ["query[0]"]),
        ("/v1/score/evaluation", {"model": "model", "messages": [TEXT, TEXT]}, ["messages[0]", "messages[1]"]),
        ("/rm", {"prompt": "a", "response": "b", "label": ""}, ["response"]),
        ("/v2/rerank", {"query": "a", "documents": ["b", "c"]}, ["documents[0]", "documents[1]"]),
    ],
)
def test_each_conversation_has_its_name(
    client: TestClient, service: FakeService, path: str, body: dict[str, Any], params: list[str]
) -> None:
    assert client.post(path, json=body).status_code == 200
    assert service.params == [params]
