"""What a reader does with the page, and what it shows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.serve_app.web.playground.conftest import TIMEOUT_MS

if TYPE_CHECKING:
    from playwright.sync_api import Page

sync_api = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install playwright")
sync_api.expect.set_options(timeout=TIMEOUT_MS)
expect = sync_api.expect


def fill(page: Page, prompt: str, *answers: str) -> None:
    page.locator("#turn-1").fill(prompt)
    for place, answer in enumerate(answers):
        if place > 1:
            page.click("#add-answer")
        page.locator("#answers textarea").nth(place).fill(answer)


def rank(page: Page) -> None:
    """Press the button and wait for the answer, whatever it is."""
    page.click("#rank")
    expect(page.locator("#rank")).not_to_have_attribute("aria-disabled", "true")


def ranked(page: Page, column: int = 0) -> list[list[str]]:
    """Rank, letter, score and tokens of each answer of a column, as shown."""
    shown = page.locator(".column").nth(column)
    expect(shown.locator(".standing").first).to_be_visible()
    parts = [shown.locator(f".standing {part}").all_inner_texts() for part in (".rank", ".letter", ".value", ".facts")]
    return [list(standing) for standing in zip(*parts, strict=True)]


def overflow(page: Page) -> list[str]:
    """What is wider than its place: the page, or a text in it."""
    wide: list[str] = page.evaluate(
        """() => [document.documentElement, ...document.querySelectorAll("p, h1, h2, h3, label, .text, button")]
            .filter((each) => each.scrollWidth > each.clientWidth && each.clientWidth > 1)
            .filter((each) => getComputedStyle(each).display !== "inline")
            .map((each) => `${each.tagName} ${each.id || each.className}`)"""
    )
    return wide
