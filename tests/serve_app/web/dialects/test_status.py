"""What clients ask before they send anything."""

from __future__ import annotations

import pytest
from fastapi.testclient import TestClient

from tests.serve_app.web.dialects.conftest import FakeService


@pytest.mark.parametrize(
    "path",
    [
        "/ping",
        "/health_generate",
        "/version",
        "/get_model_info",
        "/model_info",
        "/server_info",
        "/get_server_info",
        "/load",
    ],
)
def test_get_and_head(client: TestClient, path: str) -> None:
    assert client.get(path).status_code == client.head(path).status_code == 200


def test_what_they_say(client: TestClient) -> None:
    assert client.get("/get_model_info").json() == {
        "model_path": "tiny",
        "tokenizer_path": "tiny",
        "is_generation": False,
        "max_tokens": 1000,
    }
    assert client.get("/server_info").json()["models"].keys() == {"tiny", "large"}
    assert client.get("/version").json()["version"]
    assert client.get("/load").json() == {"server_load": 0}


def test_a_load_balancer_sees_that_models_load(client: TestClient, service: FakeService) -> None:
    service.is_ready = False
    assert client.get("/ping").status_code == client.get("/health_generate").status_code == 503
