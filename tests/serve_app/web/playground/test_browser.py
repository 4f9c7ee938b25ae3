"""The playground as its readers meet it: in a real browser, on the real application, over a fake service."""

from __future__ import annotations

import math

import pytest

from serve_app.web.service import ApiError
from tests.serve_app.web.playground.conftest import OneModel, OpenPage, TwoModels, contents
from tests.serve_app.web.playground.reading import expect, fill, overflow, rank, ranked


def test_answers_are_ranked(open_page: OpenPage) -> None:
    service = OneModel()
    with open_page(service, permissions=["clipboard-read", "clipboard-write"]) as page:
        fill(page, "Say something.", "aaa", "aaaaa", "aaaa")
        page.click("#rank")
        assert ranked(page) == [
            ["1st", "B", "5.0000", "6 tokens"],
            ["2nd", "C", "4.0000", "5 tokens"],
            ["3rd", "A", "3.0000", "4 tokens"],
        ]
        chance = f"{100 / (1 + math.exp(-1)):.1f}\u00a0%"
        leads = page.locator(".ahead:visible").all_inner_texts()
        assert leads == [f"1.0000 ahead, {chance} likely to beat {letter}" for letter in "CA"]
        expect(page.locator("#summary")).to_have_text(f"Answer B is the best, {chance} likely to beat C.")
        widths = page.locator(".fill").evaluate_all("all => all.map((bar) => bar.style.width)")
        assert widths == ["100%", "50%", "0%"]
        expect(page.locator("#second-setting")).to_be_hidden()
        page.click("summary:has-text('command line')")
        command = page.locator("#command").inner_text()
        assert '"content":"aaaaa"' in command
        page.click("#copy")
        expect(page.locator("#copy")).to_have_text("Copied")
        assert page.evaluate("() => navigator.clipboard.readText()") == command
    (asked,) = service.asked
    assert (asked["model"], asked["truncation"]) == ("first", "error")
    assert contents(asked["conversations"][1]) == [("user", "Say something."), ("assistant", "aaaaa")]


def test_turns_come_and_go(open_page: OpenPage) -> None:
    service = OneModel()
    with open_page(service) as page:
        fill(page, "One", "a", "bb", "ccc")
        page.click("#add-turn")
        page.keyboard.type("Two")  # a new field has the focus
        page.click("#add-turn")
        page.keyboard.type("Three")
        page.click("#add-system")
        page.keyboard.type("Zero")
        expect(page.locator("#add-system")).to_be_hidden()
        page.get_by_role("button", name="Remove answer A").click()
        expect(page.locator("#answer-a")).to_be_focused()
        expect(page.locator("#answer-a")).to_have_value("bb")
        expect(page.get_by_role("button", name="Remove answer A")).to_be_hidden()  # two at least
        page.get_by_label("Role of turn 3").select_option("user")
        page.get_by_role("button", name="Remove turn 2").click()
        page.locator("#options summary").click()
        page.get_by_label("If too long for the model").select_option("left")
        page.click("#rank")
        assert len(ranked(page)) == 2
    (asked,) = service.asked
    prompt = [("system", "Zero"), ("user", "Two"), ("user", "Three")]
    assert [contents(each) for each in asked["conversations"]] == [
        [*prompt, ("assistant", "bb")],
        [*prompt, ("assistant", "ccc")],
    ]
    assert asked["truncation"] == "left"


def test_the_example_is_given_on_request_and_taken_back(open_page: OpenPage) -> None:
    service = OneModel()
    with open_page(service) as page:
        expect(page.locator("#turn-1")).to_have_value("")
        fill(page, "Mine", "a", "b")
        page.click("#example")
        expect(page.locator("#turn-1")).not_to_have_value("Mine")
        page.click("#example")
        page.click("#undo")
        expect(page.locator("#turn-1")).to_have_value("Mine")
        page.click("#rank")
        assert len(ranked(page)) == 2
        expect(page.locator("#stale")).to_be_hidden()
        page.locator("#answer-a").fill("other")
        expect(page.locator("#stale")).to_be_visible()
        page.locator("#answer-a").fill("a")
        expect(page.locator("#stale")).to_be_hidden()
        page.click("#clear")
        page.locator("#turn-1").fill("Another")
        page.click("#undo")
        expect(page.locator("#answer-b")).to_have_value("b")
        page.click("#undo")  # takes itself back
        expect(page.locator("#turn-1")).to_have_value("Another")
        service.fails = ApiError(500, "no", "internal_error")
        fill(page, "Another", "c", "d")
        rank(page)
        expect(page.locator("#problem")).to_be_visible()
        expect(page.locator("#stale")).to_be_hidden()
        assert page.locator(".standing").count() == 0


def test_two_models_stand_side_by_side(open_page: OpenPage) -> None:
    service = TwoModels()
    with open_page(service, viewport={"width": 1280, "height": 800}) as page:
        fill(page, "One", "a", "bb", "ccc")
        page.click("#rank")
        assert [standing[1:] for standing in ranked(page)] == [
            ["C", "3.0000", "4 tokens \u00b7 3rd with second"],
            ["B", "2.0000", "3 tokens"],
            ["A", "1.0000", "2 tokens \u00b7 1st with second"],
        ]
        assert [standing[1] for standing in ranked(page, 1)] == ["A", "B", "C"]
        summary = page.locator("#summary")
        expect(summary).to_have_text("first puts answer C first, second answer A. They agree on 0 of 3 pairs.")
        left, right = (page.locator(".column").nth(place).bounding_box() for place in (0, 1))
        assert left
        assert right
        assert (left["y"], left["x"] + left["width"] < right["x"]) == (right["y"], True)
        service.refuses, service.refusal = "second", ApiError(503, "no replica", "unavailable", retry_after_s=5)
        rank(page)
        expect(summary).to_contain_text("The other model failed.")
        expect(page.locator(".column").nth(1)).to_contain_text("Try again in about 5 seconds.")
        assert len(ranked(page)) == 3
        page.get_by_label("Compare with").select_option(label="no other")
        expect(page.locator("#stale")).to_be_visible()
        page.get_by_label("Model", exact=True).select_option("second")
        rank(page)
        expect(page.locator("#problem")).to_contain_text("Try again in about 5 seconds.")
        page.get_by_label("Compare with").select_option("first")
        service.refusal = ApiError(422, "unfit", "invalid_conversation", "conversations[2]")
        service.fails = ApiError(422, "bad", "invalid_conversation", "conversations[2]")
        rank(page)
        told = "second: No score for answer C: unfit first: No score for answer C: bad"
        expect(page.locator("#answer-c-problem")).to_have_text(told)
    assert [asked["model"] for asked in service.asked] == ["first", "second", "first", "first"]


LONG = "word " * 400 + "x" * 400
CHINESE = "\u5929\u7a7a\u4e3a\u4ec0\u4e48\u662f\u84dd\u8272\u7684\uff1f" * 30


@pytest.mark.parametrize(("width", "scheme"), [(360, "dark"), (1280, "light")])
def test_nothing_is_cut_off_at_any_width(open_page: OpenPage, width: int, scheme: str) -> None:
    service = TwoModels()
    with open_page(service, viewport={"width": width, "height": 800}, color_scheme=scheme) as page:
        assert not overflow(page)
        fill(page, CHINESE, LONG, CHINESE, "short")
        page.click("#rank")
        assert [standing[1] for standing in ranked(page)] == ["A", "B", "C"]
        assert not overflow(page)
        expect(page.locator("#results-title")).to_be_in_viewport()
        first = page.locator(".column").first.locator(".standing").first
        short = first.bounding_box()
        first.get_by_role("button", name="Show all").click()
        whole = first.bounding_box()
        assert short
        assert whole
        assert whole["height"] > 2 * short["height"]
        assert not overflow(page)
        service.fails = ApiError(503, "x" * 300, "overloaded")
        rank(page)
        expect(page.locator("#problem")).to_be_in_viewport()
        assert not overflow(page)
        light = page.evaluate("() => getComputedStyle(document.body).backgroundColor.match(/\\d+/g)[0] > 128")
        assert light is (scheme == "light")


def test_the_keyboard_is_enough(open_page: OpenPage) -> None:
    with open_page(OneModel()) as page:
        expect(page.locator("#model")).to_be_enabled()
        order = []
        for _ in range(14):
            page.keyboard.press("Tab")
            order.append(page.evaluate("() => document.activeElement.id || document.activeElement.className"))
            if order[-1] in ("turn-1", "answer-a", "answer-b"):
                page.keyboard.type(order[-1])
        assert order == [
            *("model", "key", "add-system", "role", "turn-1", "add-turn", "answer-a", "answer-b", "add-answer"),
            *("", "rank", "example", "clear", ""),  # the first without a name opens the options
        ]
        page.locator("#rank").focus()
        page.keyboard.press("Enter")
        assert [standing[1] for standing in ranked(page)] == ["A", "B"]
        page.locator("#answer-b").focus()
        page.keyboard.type("!!!")
        page.keyboard.press("Control+Enter")
        expect(page.locator(".standing .letter").first).to_have_text("B")
        expect(page.locator("#answer-b")).to_be_focused()
        expect(page.locator("#summary")).to_have_role("status")
        names = page.locator("input, select, textarea, button").evaluate_all(
            "all => all.map((each) => each.ariaLabel || each.labels?.[0]?.textContent || each.textContent.trim())"
        )
        assert all(names)
