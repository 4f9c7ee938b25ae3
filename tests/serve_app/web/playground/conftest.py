"""A browser for the module, and pages of it that notice what a page must not do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import pytest

from serve_app.reward_model import ConversationLike
from serve_app.web.security import Guard
from serve_app.web.service import ScoringService
from tests.browser import chromium
from tests.serve_app.web.fake_service import FakeService
from tests.serve_app.web.playground.serving import serving

if TYPE_CHECKING:
    from playwright.sync_api import Browser, ConsoleMessage, Dialog, Page, Request

TIMEOUT_MS = 120_000


class OneModel(FakeService):
    """Serves `first` alone."""

    @property
    def model_names(self) -> list[str]:
        return ["first"]


class TwoModels(FakeService):
    """`first` likes long responses, `second` short ones; `refuses` names a model that fails."""

    def __init__(self) -> None:
        super().__init__()
        self.refuses: str | None = None
        self.refusal: Exception | None = None

    async def score(self, model: str, conversations: Any, **options: Any) -> Any:
        if model == self.refuses and self.refusal is not None:
            raise self.refusal
        scores = await super().score(model, conversations, **options)
        return scores if model == "first" else [type(score)(-score.value / 10, score.num_tokens) for score in scores]


class Faults:
    """What a page must not do: fail, break its policy, ask another server, open a dialog."""

    def __init__(self, url: str) -> None:
        self.seen: list[str] = []
        self._own = (f"{url}/", "data:")

    def on_error(self, error: Exception) -> None:
        self.seen.append(str(error))

    def on_console(self, message: ConsoleMessage) -> None:
        if any(words in message.text for words in ("Content Security Policy", "Trusted", "Uncaught")):
            self.seen.append(message.text)

    def on_request(self, asked: Request) -> None:
        if not asked.url.startswith(self._own):
            self.seen.append(asked.url)

    def on_dialog(self, dialog: Dialog) -> None:
        self.seen.append(dialog.message)
        dialog.dismiss()


class OpenPage(Protocol):
    def __call__(
        self, service: ScoringService, *, guard: Guard | None = None, **options: Any
    ) -> AbstractContextManager[Page]:
        """The playground of `service` in a new context of the browser, made with `options`."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as running:
        yield running


@pytest.fixture
def open_page(browser: Browser) -> OpenPage:
    @contextmanager
    def opened(service: ScoringService, *, guard: Guard | None = None, **options: Any) -> Iterator[Page]:
        with serving(service, guard) as url:
            context = browser.new_context(**options)
            context.set_default_timeout(TIMEOUT_MS)
            page = context.new_page()
            faults = Faults(url)
            page.on("pageerror", faults.on_error)
            page.on("console", faults.on_console)
            page.on("request", faults.on_request)
            page.on("dialog", faults.on_dialog)
            page.goto(f"{url}/")
            yield page
            context.close()
            assert not faults.seen

    return opened


def contents(conversation: ConversationLike) -> list[tuple[str, str]]:
    """A conversation's roles and texts, as a service was asked."""
    return [(message["role"], message["content"]) for message in conversation]  # type: ignore[index, union-attr]
