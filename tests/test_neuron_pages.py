"""The neurons' site in a browser, opened from disk: Chromium, driven by Playwright; skipped without either."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from _browser import needs_browser
from conftest import HANGS_AFTER_S

from soluscope import UserError
from soluscope.neurons import site, stored

HOSTILE = "<script>window.ran = 1</script><img src=x onerror='window.ran = 1'>\u202e"
WIDTHS = (420, 1280, 2560)


@pytest.fixture(scope="module")
def study(tiny_neurons: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a study with the neurons of one run and of its initialisation, and with hostile tokens."""
    copy = tmp_path_factory.mktemp("pages") / "study"
    shutil.copytree(tiny_neurons, copy)
    for part in stored.parts_of(copy / "solu_ln-s0"):
        folder = stored.place(copy / "solu_ln-s0", part)
        texts = json.loads((folder / "vocabulary.json").read_text())
        hostile = [HOSTILE if number % 3 == 0 else text for number, text in enumerate(texts)]
        (folder / "vocabulary.json").write_text(json.dumps(hostile))
        (folder / "SHA256SUMS").write_text(stored.sums_of(folder))
    return copy


@pytest.fixture(scope="module")
def page(study: Path) -> Path:
    return site.build(study)


@pytest.fixture
def visit(browser: Any, page: Path) -> Iterator[Callable[..., Any]]:
    """Return a function that opens the site from disk; at the end, no page has reported an error."""
    contexts, wrong = [], []

    def opened(part: str = "", width: int = 1280, **options: Any) -> Any:
        context = browser.new_context(viewport={"width": width, "height": 900}, **options)
        contexts.append(context)
        tab = context.new_page()
        tab.set_default_timeout(1000 * HANGS_AFTER_S)
        tab.on("console", lambda said: said.type == "error" and wrong.append(said.text))
        tab.on("pageerror", lambda error: wrong.append(str(error)))
        tab.on("request", lambda asked: asked.url.startswith("file:") or wrong.append(asked.url))
        tab.goto(f"{page.as_uri()}{part}")
        until(tab, "() => document.body.dataset.ready")
        return tab

    yield opened
    for context in contexts:
        context.close()
    assert wrong == []


def until(tab: Any, expression: str) -> None:
    """Wait until an expression is true in the page; the page's policy forbids Playwright's own way."""
    ends = time.monotonic() + HANGS_AFTER_S
    while not tab.evaluate(expression):
        assert time.monotonic() < ends, expression
        tab.wait_for_timeout(50)


def drawn(tab: Any, key: str, neuron: int) -> None:
    until(tab, f"() => document.getElementById('cards').dataset.drawn === '{key}/{neuron}'")


def first_cells(tab: Any) -> list[str]:
    return [each.strip() for each in tab.locator("#table tbody th").all_text_contents()]


@needs_browser
def test_the_list_is_sorted_filtered_and_searched(visit: Callable[..., Any], study: Path) -> None:
    tab = visit()
    neurons = stored.read(study / "solu_ln-s0")
    tab.select_option("#sort", "kurtosis_mid")
    by_kurtosis = neurons.statistics.sort_values("kurtosis_mid", ascending=False)["neuron"]
    assert first_cells(tab)[:3] == [str(each) for each in by_kurtosis[:3]]
    tab.select_option("#order", "up")
    assert first_cells(tab)[:3] == [str(each) for each in by_kurtosis[::-1][:3]]
    rules = neurons.rules[neurons.rules["rule"] != ""]
    rule = rules["rule"].iloc[0]
    tab.fill("#query", rule)
    found = tab.locator("#status").text_content()
    assert 0 < int(found.split()[0]) < neurons.about.n_neurons
    tab.fill("#query", "no such rule or token")
    assert "0 neurons match" in tab.locator("#status").text_content()


@needs_browser
def test_bounds_leave_out_neurons_below_them_and_are_part_of_the_link(
    visit: Callable[..., Any], study: Path
) -> None:
    neurons = stored.read(study / "solu_ln-s0")
    statistics = neurons.statistics
    before = neurons.rules[neurons.rules["side"] == "mid"].set_index("neuron")
    largest = statistics[["kurtosis_mid", "kurtosis_post"]].max(axis=1)
    columns = {"effect": statistics["effect"], "drop": before["drop"], "kurtosis": largest}
    tab = visit()
    for name, column in columns.items():
        # A bound between two numbers, which rounding to four digits cannot cross.
        ordered = np.sort(column.dropna().round(12).unique())
        middle = len(ordered) // 2
        bound = float(ordered[middle - 1 : middle + 1].mean())
        tab.fill(f"#{name}", repr(bound))
        wanted = int((column >= bound).sum())
        assert 0 < wanted < neurons.about.n_neurons
        assert tab.locator("#status").text_content() == f"{wanted} neurons match."
        link = tab.url.partition("#")[2]
        tab.fill(f"#{name}", "")
    again = visit(f"#{link}")
    assert again.locator("#status").text_content() == f"{wanted} neurons match."
    assert again.input_value(f"#{name}") == repr(bound)


@needs_browser
def test_a_click_on_a_head_sorts_and_a_second_click_turns_the_order(
    visit: Callable[..., Any], study: Path
) -> None:
    tab = visit()
    effects = stored.read(study / "solu_ln-s0").statistics.set_index("neuron")["effect"].dropna()
    for order in ("descending", "ascending"):
        tab.click("#table thead button:text-is('effect')")
        assert tab.locator("#table th[aria-sort]").text_content() == "effect"
        assert tab.locator("#table th[aria-sort]").get_attribute("aria-sort") == order
        shown = effects[[int(each) for each in first_cells(tab)]].round(6).tolist()
        assert shown == sorted(shown, reverse=order == "descending")


@needs_browser
def test_a_link_opens_a_neuron_with_the_same_rank_beside_it(visit: Callable[..., Any]) -> None:
    tab = visit("#of=m0&neuron=5&beside=m1")
    drawn(tab, "m0", 5)
    heads = tab.locator(".card h2").all_text_contents()
    assert (
        tab.locator("#table tr[aria-current] th").text_content() == "5"
    )  # on its page of the list
    assert heads[0] == "Neuron 5, solu_ln-s0"
    assert heads[1].endswith("solu_ln-s0, untrained")
    ranks = [text.split(" in ")[0] for text in tab.locator(".card > p.soft").all_text_contents()]
    assert ranks[0] == ranks[1]
    assert tab.locator(".card svg[role=img]").count() == 4


@needs_browser
def test_the_keyboard_goes_through_neurons_and_stages(visit: Callable[..., Any]) -> None:
    tab = visit()
    numbers = first_cells(tab)
    tab.keyboard.press("j")
    drawn(tab, "m0", int(numbers[1]))
    assert f"neuron={numbers[1]}" in tab.url
    tab.keyboard.press("k")
    drawn(tab, "m0", int(numbers[0]))
    before = tab.locator(".card [aria-pressed=true]").text_content()
    tab.keyboard.press("s")
    until(
        tab, f"() => document.querySelector('.card [aria-pressed=true]').textContent !== '{before}'"
    )
    tab.keyboard.press("/")
    assert tab.evaluate("document.activeElement.id") == "query"


@needs_browser
def test_examples_show_the_stored_text_and_hostile_tokens_do_not_run(
    visit: Callable[..., Any], study: Path
) -> None:
    tab = visit("#of=m0&neuron=3&stage=post")
    drawn(tab, "m0", 3)
    wanted = stored.read(study / "solu_ln-s0").top(3, "post")[0]
    shown = tab.locator(".passage").first
    assert shown.locator("span").all_text_contents() == list(wanted.tokens)
    assert shown.locator(".peak").text_content() == wanted.tokens[wanted.peak]
    assert HOSTILE in tab.locator("#cards").text_content()
    assert tab.evaluate("window.ran") is None
    assert tab.locator("#cards script, #cards img").count() == 0


@needs_browser
@pytest.mark.parametrize("width", WIDTHS)
def test_no_part_is_wider_than_the_window(visit: Callable[..., Any], width: int) -> None:
    tab = visit("#of=m0&neuron=3&beside=m1", width, color_scheme="dark")
    assert tab.evaluate(
        "document.documentElement.scrollWidth <= document.documentElement.clientWidth"
    )
    background = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == "rgb(21, 24, 28)"


def test_the_policy_allows_the_pages_own_script_and_styles_only(page: Path) -> None:
    text = page.read_text()
    assert "unsafe" not in text.split("<title>")[0]
    assert "default-src 'none'" in text
    assert "://" not in text.split("<style>")[0]


def test_a_study_without_neurons_is_refused(tiny_study: Path) -> None:
    with pytest.raises(UserError, match="no neurons are stored in"):
        site.build(tiny_study)
