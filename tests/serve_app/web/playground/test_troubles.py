"""What goes wrong, and what somebody may try, in a real browser."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from serve_app.web.security import Guard
from serve_app.web.service import ApiError
from tests.serve_app.web.playground.conftest import OneModel, OpenPage
from tests.serve_app.web.playground.reading import expect, fill, rank, ranked
from tests.serve_app.web.playground.serving import serving

SCRIPT = "<script>alert(1)</script><img src=x onerror=alert(2)>"

ERRORS: list[tuple[ApiError, str, str | None]] = [
    # what the server answers, what the page says, the field it says it at
    (
        ApiError(
            422,
            "conversation has 1200 tokens, the limit is 1000; ask for truncation='left'",
            "context_length_exceeded",
            "conversations[1]",
        ),
        "Prompt and answer B are too long: conversation has 1200 tokens, the limit is 1000. Shorten them",
        "#answer-b",
    ),
    (ApiError(422, "no such role", "invalid_request", "conversations[1][0].role"), "Turn 1: no such role", "#turn-1"),
    (ApiError(422, "unfit", "x", "conversations[0][1].content"), "No score for answer A: unfit", "#answer-a"),
    (ApiError(422, "not one of three", "x", "truncation"), "truncation: not one of three", None),
    (ApiError(413, "too large", "body_too_large"), "too much text for one request", None),
    (
        ApiError(503, "first has more work than it can do soon", "overloaded", retry_after_s=7),
        "The server is busy: first has more work than it can do soon. Try again in about 7 seconds.",
        None,
    ),
    (ApiError(503, "no replica", "unavailable"), "The server cannot answer just now: no replica. Try again in a", None),
    (ApiError(408, "late", "deadline_exceeded"), "No answer within 120 seconds.", None),
    (ApiError(500, "something is wrong with the server", "internal_error"), "The server failed (500): something", None),
    (ApiError(404, "there is no model 'first'", "model_not_found", "model"), "there is no model 'first'. The li", None),
    (ApiError(403, "loopback", "loopback_only"), "Without API keys the server answers its own machine only.", None),
]


def test_errors_are_told_in_words(open_page: OpenPage) -> None:
    service = OneModel()
    with open_page(service) as page:
        fill(page, "One", "a", "bb")
        for error, words, field in ERRORS:
            service.fails = error
            rank(page)
            told = page.locator("#problem" if field is None else f"{field}-problem")
            expect(told).to_contain_text(words)
            if field is not None:
                expect(page.locator(field)).to_be_focused()
            assert page.locator("[aria-invalid]").count() == (field is not None)
            assert page.locator("[role=alert]:visible").count() == 1
        expect(page.locator("#answer-b")).to_have_value("bb")  # nothing typed is lost
        service.fails = None
        rank(page)
        assert len(ranked(page)) == 2
        assert page.locator("[role=alert]:visible").count() == 0


def test_what_is_not_filled_in_is_said_at_its_field(open_page: OpenPage) -> None:
    service = OneModel()
    with open_page(service) as page:
        fill(page, "One", "a", "  ")
        page.click("#rank")
        expect(page.locator("#answer-b-problem")).to_have_text("Answer B is empty: write it, or remove it.")
        expect(page.locator("#answer-b")).to_be_focused()
        page.keyboard.type("bb")
        page.locator("#options summary").click()
        page.locator("#limit").fill("0")
        page.click("#rank")
        expect(page.locator("#limit-problem")).to_have_text("A whole number from 1 to 3600.")
    assert not service.asked


def replying(status: int, body: str) -> Callable[[Any], None]:
    return lambda route: route.fulfill(status=status, body=body, content_type="text/html")


def test_a_server_that_is_gone_late_or_another(open_page: OpenPage) -> None:
    service = OneModel()
    with open_page(service) as page:
        fill(page, "One", "a", "bb")
        problem = page.locator("#problem")
        replies = [
            (lambda route: route.abort(), "The server does not answer"),
            (replying(200, "<p>Welcome"), "The answer cannot be read."),
            (replying(200, '{"results": [{"score": 1}]}'), "The answer cannot be read."),
            (replying(200, '{"results": [{"score": 1}, {"score": null}]}'), "The answer cannot be read."),
            (replying(502, "<p>Bad gateway"), "The server failed (502): Bad Gateway."),
        ]
        for reply, words in replies:
            page.route("**/v1/score", reply)
            rank(page)
            expect(problem).to_contain_text(words)
            page.unroute("**/v1/score")
        page.locator("#options summary").click()
        page.locator("#limit").fill("1")
        service.delay_s = 30.0
        page.click("#rank")
        expect(problem).to_contain_text("No answer within 1 second.")
        page.locator("#limit").fill("120")
        page.click("#rank")
        expect(page.locator("#stop")).to_be_visible()
        page.keyboard.press("Escape")
        expect(page.locator("#summary")).to_have_text("Stopped.")
        service.delay_s = 0.0
        page.evaluate("() => { rank(); rank(); }")  # while one runs, another is not begun
        assert len(ranked(page)) == 2
        expect(page.locator("#rank")).to_have_text("Rank answers Ctrl+Enter")
    assert len(service.asked) == 3


def test_a_key_is_asked_for_and_kept_in_memory_only(open_page: OpenPage) -> None:
    service = OneModel()
    with open_page(service, guard=Guard(["a-secret-key"])) as page:
        key, problem = page.locator("#key"), page.locator("#key-problem")
        expect(problem).to_have_text("This server asks for an API key.")
        expect(key).to_be_focused()
        for wrong, words in (("another", "The server does not know this API key."), ("kl\u00fc", "An API key has no")):
            key.fill(wrong)
            key.blur()
            expect(problem).to_contain_text(words)
        fill(page, "One", "a", "bb")
        page.click("#rank")
        expect(problem).to_be_visible()
        assert not service.asked
        key.fill("a-secret-key")
        page.keyboard.press("Control+Enter")
        assert len(ranked(page)) == 2
        expect(problem).to_be_hidden()
        key.blur()
        expect(page.locator("#model")).to_have_value("first")
        held = page.evaluate(
            "() => [location.href, document.cookie, JSON.stringify({...localStorage, ...sessionStorage}),"
            " document.documentElement.outerHTML].join()"
        )
        assert "a-secret-key" not in held
        assert "$RAYWARD_API_KEY" in held  # in the command that stands for the request
        page.reload()
        expect(problem).to_have_text("This server asks for an API key.")
        expect(key).to_have_value("")


def test_markup_is_shown_as_text(open_page: OpenPage) -> None:
    with open_page(OneModel()) as page:
        fill(page, SCRIPT, SCRIPT, "<b>bold</b>")
        page.click("#rank")
        ranked(page)
        assert page.locator(".standing .text").all_inner_texts() == [SCRIPT, "<b>bold</b>"]
        assert page.locator("main b, main img, main script").count() == 0


def test_what_is_not_the_page_s_own_does_not_run(open_page: OpenPage, browser: Any) -> None:
    """The policy at work, where nobody watches the console for its complaints."""
    with serving(OneModel()) as url:
        page = browser.new_page()
        page.goto(f"{url}/")
        page.evaluate(
            """() => {
                document.addEventListener("securitypolicyviolation", (event) => {
                    document.title += ` ${event.effectiveDirective}`;
                });
                const image = document.createElement("img");
                image.src = "https://192.0.2.1/x.png";
                document.body.append(image);
                fetch("https://192.0.2.1/").catch(() => {});
                const attempts = {
                    html: () => { document.body.innerHTML = "<p>"; },
                    handler: () => { image.setAttribute("onerror", "document.title = 'ran'"); },
                    script: () => { document.createElement("script").text = "document.title = 'ran'"; },
                };
                for (const [name, attempt] of Object.entries(attempts)) {
                    try { attempt(); } catch { document.title += ` no-${name}`; }
                }
            }"""
        )
        for what in ("img-src", "connect-src", "no-html", "no-handler", "no-script"):
            expect(page).to_have_title(re.compile(what))
        page.close()
