"""`/pooling` as XTuner and POLAR send it and read it, of vLLM and of LMDeploy."""

from __future__ import annotations

import base64
import struct

import pytest
from fastapi.testclient import TestClient

from tests.serve_app.web.dialects.conftest import rendered, score_of

TEXTS = [rendered("hi", "there"), rendered("hi", "you")]
SCORES = [score_of("hi", "there"), score_of("hi", "you")]


@pytest.mark.parametrize("number", [0, 1, 2])
def test_vllms_clients_read_the_last_row(client: TestClient, number: int) -> None:
    answer = client.post("/pooling", json={"model": "tiny", "input": TEXTS[:number]}).json()
    assert [item["data"][-1][0] for item in answer["data"]] == SCORES[:number]
    assert [item["data"] for item in answer["data"]] == [[[score]] for score in SCORES[:number]]
    assert [(item["index"], item["object"]) for item in answer["data"]] == [(at, "pooling") for at in range(number)]


def test_lmdeploys_clients_read_the_number(client: TestClient) -> None:
    answer = client.post("/pooling", json={"model": "tiny", "input": TEXTS, "format": "scalar"}).json()
    assert [item["data"] for item in answer["data"]] == SCORES


def test_lmdeploys_clients_find_the_number_below_its_prefix(client: TestClient) -> None:
    """POLAR's client posts the same body to both servers; its address may be HOST:PORT/lmdeploy."""
    answer = client.post("/lmdeploy/pooling", json={"input": [TEXTS[0], "unreadable", TEXTS[1]]}).json()
    assert [item["data"] for item in answer["data"]] == [SCORES[0], None, SCORES[1]]


def test_base64_is_the_float32(client: TestClient) -> None:
    answer = client.post("/pooling", json={"input": TEXTS[0], "encoding_format": "base64"}).json()
    assert struct.unpack("<f", base64.b64decode(answer["data"][0]["data"])) == (SCORES[0],)


def test_messages_and_a_lone_text(client: TestClient) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "there"}]
    for body in ({"messages": messages}, {"input": TEXTS[0]}):
        assert client.post("/pooling", json=body).json()["data"][0]["data"] == [[SCORES[0]]]


def test_an_activation_is_applied_on_request(client: TestClient) -> None:
    answer = client.post("/pooling", json={"input": rendered(""), "use_activation": True}).json()
    assert answer["data"][0]["data"] == [[0.5]]


def test_neither_input_nor_messages_is_refused(client: TestClient) -> None:
    answer = client.post("/pooling", json={"model": "tiny"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (422, "exactly_one_field")
