"""Chromium, driven by Playwright, for tests of pages. The fixture `browser` of conftest.py starts it."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
from conftest import HANGS_AFTER_S

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next((found for name in NAMES if (found := shutil.which(name))), "")
needs_browser = pytest.mark.skipif(not CHROMIUM, reason="chromium is not installed")


def opened(browser: Any, address: str, wrong: list[str], **options: Any) -> Any:
    """Return a page of a new browser that has opened the address; its errors and foreign requests are noted."""
    context = browser.new_context(**options)
    tab = context.new_page()
    tab.set_default_timeout(1000 * HANGS_AFTER_S)
    tab.on("console", lambda said: said.type == "error" and wrong.append(said.text))
    tab.on("pageerror", lambda error: wrong.append(str(error)))
    origin = address.split("/?")[0]
    tab.on(
        "request",
        lambda asked: asked.url.startswith((origin, "data:")) or wrong.append(asked.url),
    )
    tab.goto(address)
    return tab
