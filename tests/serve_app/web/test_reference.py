"""The page at /docs has every route, and a browser without internet shows it whole."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import Any

import pytest
from fastapi.testclient import TestClient

from serve_app.web.gate import http_app
from serve_app.web.reference import page
from serve_app.web.security import Guard
from tests.serve_app.web.fake_service import FakeService


class Loaded(HTMLParser):
    """What a page's tags name to be loaded, and where its links go."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.links: list[str | None] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        named = dict(attributes)
        if tag in ("script", "link", "img", "iframe"):
            self.sources.append(tag)
        if tag == "a":
            self.links.append(named.get("href"))


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    return dict(http_app(FakeService(), Guard([])).openapi())


def test_it_needs_nothing_from_elsewhere() -> None:
    response = TestClient(http_app(FakeService(), Guard([])), client=("127.0.0.1", 1)).get("/docs")
    assert response.status_code == 200
    loaded = Loaded(response.text)
    assert (loaded.sources, loaded.links) == ([], ["openapi.json"])
    assert not re.search(r"https?://|url\(|@import", response.text)
    assert "default-src 'none'" in response.headers["content-security-policy"]


def test_every_route_and_field_is_on_it(document: dict[str, Any]) -> None:
    text = page(document)
    for path, methods in document["paths"].items():
        for method in methods:
            assert f"<code>{method.upper()} {path}</code>" in text
    for field in document["components"]["schemas"]["ScoreRequest"]["properties"]:
        assert f"<code>{field}</code>" in text
    assert "curl 127.0.0.1:8000/v1/score" in text
    assert "list of list of MessageBody or ConversationWithReference" in text


def test_text_of_the_document_is_no_markup(document: dict[str, Any]) -> None:
    changed = document | {"info": {"title": "<b>", "description": "<script>x</script>"}}
    assert "<b>" not in page(changed)
    assert "<script" not in page(changed)
