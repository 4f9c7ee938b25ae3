"""The page as it is served, without a browser: in one piece, under a policy that lets nothing else in."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
import tomllib
from fnmatch import fnmatch
from html.parser import HTMLParser
from pathlib import Path

import httpx
import pytest

from serve_app.reward_model.tiny import note
from serve_app.web.gate import http_app
from serve_app.web.playground.page import load_page
from serve_app.web.security import Guard
from tests.serve_app.web.fake_service import FakeService

ROOT = Path(__file__).parents[4]
FOLDER = ROOT / "serve_app" / "web" / "playground"


def get(path: str, *, root_path: str = "", client: str = "127.0.0.1", guard: Guard | None = None) -> httpx.Response:
    async def send() -> httpx.Response:
        app = http_app(FakeService(), guard or Guard([]))
        transport = httpx.ASGITransport(app, root_path=root_path, client=(client, 1))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as asking:
            return await asking.get(path)

    return asyncio.run(send())


class Reader(HTMLParser):
    """The contents of scripts and styles, and all attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.code: dict[str, list[str]] = {"script": [], "style": [], "data": []}
        self.attributes: list[tuple[str, str]] = []
        self._kind: str | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag in ("script", "style"):
            self._kind = "data" if dict(attrs).get("type") == "application/json" else tag
            self.code[self._kind].append("")

    def handle_endtag(self, tag: str) -> None:
        self._kind = None

    def handle_data(self, data: str) -> None:
        if self._kind is not None:
            self.code[self._kind][-1] += data


def read(html: str) -> Reader:
    reader = Reader()
    reader.feed(html)
    reader.close()
    return reader


def test_the_page_is_open_to_everybody() -> None:
    for guard in (Guard([]), Guard(["key"])):
        response = get("/", client="192.0.2.7", guard=guard)
        assert (response.status_code, response.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert "<title>rayward playground</title>" in response.text


def test_below_a_prefix_its_requests_stay_there() -> None:
    response = get("/reward", root_path="/reward")
    assert (response.status_code, response.headers["location"]) == (307, "http://test/reward/")
    assert get("/reward/", root_path="/reward").status_code == 200


def test_the_policy_names_what_is_in_the_page_and_nothing_else() -> None:
    response = get("/")
    directives = dict(part.split(" ", 1) for part in response.headers["content-security-policy"].split("; "))
    code = read(response.text).code
    for kind, directive in (("script", "script-src"), ("style", "style-src")):
        digests = [hashlib.sha256(text.encode()).digest() for text in code[kind]]
        assert directives[directive].split() == [f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests]
        assert digests
    assert directives["default-src"] == "'none'"
    assert directives["connect-src"] == "'self'"
    assert "unsafe" not in response.headers["content-security-policy"]


def test_the_page_is_in_one_piece() -> None:
    reader = read(load_page().html)
    addresses = {value.partition(",")[0] for name, value in reader.attributes if name in ("src", "href", "srcset")}
    assert addresses == {"data:image/svg+xml", "docs"}
    assert not [name for name, _ in reader.attributes if name == "style" or name.startswith("on")]
    assert all(text.strip() for texts in reader.code.values() for text in texts)
    assert not re.search(r"url\(|@import", "".join(reader.code["style"]))


def test_data_cannot_end_its_element(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for file in FOLDER.glob("*.*"):
        if file.suffix in (".css", ".html", ".js"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "examples.json").write_text('["</script><script>alert(1)</script>"]', encoding="utf-8")
    monkeypatch.setattr("serve_app.web.playground.page.files", lambda package: tmp_path)
    code = read(load_page().html).code
    assert code["data"] == ['["\\u003c/script>\\u003cscript>alert(1)\\u003c/script>"]']


def test_a_wheel_holds_every_part_of_the_page() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = settings["tool"]["setuptools"]["package-data"]["serve_app.web.playground"]
    parts = [file.name for file in FOLDER.iterdir() if file.suffix not in (".py", ".png") and file.is_file()]
    assert parts
    assert all(any(fnmatch(name, pattern) for pattern in patterns) for name in parts)


def test_the_page_says_of_the_embedded_model_what_the_engine_says() -> None:
    code = (FOLDER / "wording.js").read_text(encoding="utf-8")
    assert f'"{note("tiny")}"' in re.sub(r'" \+\n +"', "", code)
