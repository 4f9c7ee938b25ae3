"""Debian's chromium, driven by playwright, for tests of pages that people look at."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser

NAMES = ("chromium", "chromium-browser", "google-chrome")


@contextmanager
def chromium() -> Iterator[Browser]:
    """A headless browser, or the test is skipped with the reason why there is none.

    While it runs, this thread has a running event loop: nothing else in it can call `asyncio.run`. So the fixture
    around it lasts for a module at most.
    """
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install playwright")
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip(f"no browser: none of {', '.join(NAMES)} is installed (Debian: apt-get install chromium)")
    is_root = hasattr(os, "geteuid") and os.geteuid() == 0  # chromium has no sandbox for root
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=found, args=["--no-sandbox"] if is_root else [])
        try:
            yield browser
        finally:
            browser.close()
