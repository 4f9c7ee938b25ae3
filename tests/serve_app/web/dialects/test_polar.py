"""POLAR's own client: the text that it renders is scored at the routes it posts to, answered as it reads answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from serve_app.reward_model.architecture import DecoderConfig
from serve_app.reward_model.tokenizer import Tokenizer
from tests.conftest import chat
from tests.reward_model.polar import rendered_by_its_client, write
from tests.serve_app.web.dialects.conftest import FakeService, score_of

PROMPT = "What is the capital of China?"
TEXTS = [rendered_by_its_client([PROMPT], ["Beijing."], [output]) for output in ("Beijing.", "Shanghai.")]


@pytest.fixture
def service(tmp_path_factory: pytest.TempPathFactory) -> FakeService:
    folder: Path = write(tmp_path_factory.mktemp("polar"))
    return FakeService(Tokenizer.from_pretrained(folder, config=DecoderConfig.from_folder(folder)))


@pytest.mark.parametrize(
    ("path", "body", "read"),
    [
        ("/classify", {"model": "tiny", "text": TEXTS}, lambda answer: [each["embedding"][0] for each in answer]),
        ("/pooling", {"input": TEXTS}, lambda answer: [each["data"][-1][0] for each in answer["data"]]),
        ("/pooling", {"input": TEXTS, "format": "scalar"}, lambda answer: [each["data"] for each in answer["data"]]),
    ],
    ids=["sglang", "vllm", "lmdeploy"],
)
def test_its_clients_requests(client: TestClient, service: FakeService, path: str, body: Any, read: Any) -> None:
    answer = client.post(path, json=body)
    assert answer.status_code == 200
    assert read(answer.json()) == [score_of(PROMPT, output) for output in ("Beijing.", "Shanghai.")]
    assert [conversation.reference for conversation in service.conversations] == ["Beijing."] * 2
    assert service.token_ids == [service.tokenizer._tokenizer(text)["input_ids"] for text in TEXTS]


def test_chat_markup_is_refused(client: TestClient) -> None:
    answer = client.post("/classify", json={"text": "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nx"})
    assert answer.status_code == 400
    assert "POLAR's client renders" in answer.json()["error"]["message"]


def test_messages_alone_lack_a_reference(service: FakeService) -> None:
    from serve_app.reward_model import ConversationError

    with pytest.raises(ConversationError, match="there is none"):
        service.tokenizer.encode(chat("hi", "there"))
