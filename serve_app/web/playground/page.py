"""The page and the policy it is served under. Its parts lie beside this file and are put into one page at start-up."""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import dataclass
from importlib.resources import files

from fastapi import APIRouter
from fastapi.responses import Response

PART = re.compile(
    r'<link rel="stylesheet" href="(?P<style>\w+\.css)">'
    r'|<script src="(?P<script>\w+\.js)"></script>'
    r'|<script id="(?P<id>\w+)" type="application/json" src="(?P<data>\w+\.json)"></script>'
)


@dataclass(frozen=True, slots=True)
class PlaygroundPage:
    """A page in one piece, and the Content-Security-Policy that lets its own scripts and styles work and no others."""

    html: str
    policy: str

    @property
    def headers(self) -> dict[str, str]:
        return {
            "Content-Security-Policy": self.policy,
            "Cache-Control": "no-cache",
            "Cross-Origin-Opener-Policy": "same-origin",
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
        }


def load_page() -> PlaygroundPage:
    """`page.html` with every part it names put in its place."""
    folder = files(__package__)
    styles: list[str] = []
    scripts: list[str] = []

    def inline(match: re.Match[str]) -> str:
        name = match["style"] or match["script"] or match["data"]
        text = folder.joinpath(name).read_text(encoding="utf-8")
        if match["data"]:  # never run, so no policy speaks of it; \u003c keeps `</script>` from ending it
            text = text.replace("<", "\\u003c")
            return f'<script id="{match["id"]}" type="application/json">{text}</script>'
        if match["style"]:
            styles.append(_source(text))
            return f"<style>{text}</style>"
        scripts.append(_source(text))
        return f"<script>{text}</script>"

    html = PART.sub(inline, folder.joinpath("page.html").read_text(encoding="utf-8"))
    return PlaygroundPage(html, _policy(styles, scripts))


def playground() -> APIRouter:
    """The route `/`. The page itself is open to everybody; what it asks of the endpoint carries the reader's key."""
    page = load_page()
    router = APIRouter()

    @router.get("/", include_in_schema=False)
    async def index() -> Response:
        return Response(page.html, headers=page.headers, media_type="text/html")

    return router


def _source(text: str) -> str:
    """A hash source, https://www.w3.org/TR/CSP3/#grammardef-hash-source."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _policy(styles: list[str], scripts: list[str]) -> str:
    return "; ".join(
        [
            "default-src 'none'",
            f"script-src {' '.join(scripts)}",
            f"style-src {' '.join(styles)}",
            "connect-src 'self'",
            "img-src data:",  # the icon
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
            "require-trusted-types-for 'script'",  # innerHTML and its like throw
            "trusted-types 'none'",
        ]
    )
