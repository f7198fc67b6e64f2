"""A person rates neurons in a browser: Chromium, driven by Playwright. Skipped where either is missing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from _browser import needs_browser, opened
from test_rating_survival import served

from soluscope.rating.analysis import analyse
from soluscope.rating.database import Database
from soluscope.results import Rating

pytestmark = needs_browser


def press(tab: Any, *keys: str) -> None:
    """Press keys, the last of which leads to another page."""
    for key in keys[:-1]:
        tab.keyboard.press(key)
    with tab.expect_navigation():
        tab.keyboard.press(keys[-1])


def begin(tab: Any, name: str) -> None:
    tab.locator("#name:focus").wait_for()  # the page gives it the focus
    tab.keyboard.type(name)
    press(tab, "Enter")


@pytest.mark.slow
def test_a_person_rates_thirty_neurons_with_the_keyboard(browser: Any, tmp_path: Path) -> None:
    """Rate 30 neurons, take one back, pause, resume after a restart of the server, and analyse."""
    study, wrong = tmp_path / "first", []
    database = Database(study / "rating" / "ratings.sqlite")
    with served(study, n_neurons=20) as (_, address):
        tab = opened(browser, address, wrong)
        begin(tab, "ann")
        for number in range(15):
            assert f"Neuron {number + 1} of" in tab.inner_text(".bar")
            if number % 3 == 0:
                tab.keyboard.press("y")
                tab.keyboard.type(f"yes, no and up, rule {number}")  # letters of keys are text here
                press(tab, "Enter")
            else:
                press(tab, "n", "Enter")
        press(tab, "u")
        assert tab.is_checked("#no")
        press(tab, "p")
        assert "Paused" in tab.inner_text("h1")
        press(tab, "Enter")
        assert "Neuron 15 of" in tab.inner_text(".bar")
    assert database.raters() == {"ann": 14}
    with served(study, n_neurons=20) as (_, address):
        tab = opened(browser, address, wrong)
        begin(tab, "ann")
        assert "Neuron 15 of" in tab.inner_text(".bar")
        for _ in range(16):
            press(tab, "n", "Enter")
    ratings = database.ratings()
    assert len(ratings) == 30
    assert sum(each.interpretable for each in ratings) == 5
    assert ratings[3].hypothesis == "yes, no and up, rule 3"
    terms = {each.term for each in analyse(database, "abc")}
    assert {Rating.SHARE, Rating.DIFFERENCE, Rating.SECONDS} <= terms
    assert wrong == []


def test_the_page_fits_a_narrow_screen_and_works_with_the_pointer(
    browser: Any, tmp_path: Path
) -> None:
    wrong: list[str] = []
    with served(tmp_path / "first", n_neurons=6) as (_, address):
        narrow = {"viewport": {"width": 420, "height": 800}}
        tab = opened(browser, address, wrong, java_script_enabled=False, **narrow)
        tab.fill("#name", "bob")
        tab.click("button")
        for _ in range(2):
            box = tab.locator("#answer").bounding_box()
            assert box["x"] >= 0
            assert box["x"] + box["width"] <= 420
            assert box["y"] + box["height"] <= 800  # in view without scrolling
            tab.click("label[for=no]")
            tab.click("#answer button")
        tab.click("#undo button")
        assert "Neuron 2 of" in tab.inner_text(".bar")
        context = browser.new_context(**narrow)
        widths = context.new_page()
        widths.goto(address)
        begin(widths, "eve")
        scroll = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
        assert widths.evaluate(scroll) <= 0
    assert wrong == []
