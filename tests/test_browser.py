"""The page in a browser: Chromium, driven by Playwright. The tests are skipped where either is missing.

The browser gets the page from Playwright. Every other request is refused and noted.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import combinations, pairwise
from typing import Any

import numpy as np
import pytest
from _browser import needs_browser
from _records import LN, RUN, number, passed, token_values, words
from conftest import HANGS_AFTER_S
from test_report import before_training, make_rows

from soluscope import plugins
from soluscope.report import figures, page
from soluscope.results import Measurement, ProbeWords, Record, Setting

pytestmark = needs_browser

URL = "http://report.test/"
WIDTHS = (420, 1280, 2560)
HOSTILE = (
    "<|BOS|>", "<script>window.ran = 1</script>", "<img src=x onerror='window.ran = 1'>",
    '" onfocus="window.ran = 1', " fine",
)  # fmt: skip
TABS = "header nav a"
SHOWN = "main > .tab:not([hidden])"
DRAWN = ".plot:has(.main-svg)"


@pytest.fixture(scope="module")
def html() -> str:
    """Return the page of a study of six arms with warnings, two probes, and a text of hostile tokens."""
    records = [
        row
        for row in make_rows()
        if not isinstance(row, Measurement) or row.stream in ("", "natural", "train", "prefixes")
    ]
    records = [
        replace(row, rate="was set by hand") if isinstance(row, Setting) else row for row in records
    ]
    return page.render(
        [*records, *passed("engagement", "scale_freeze"), *token_values(HOSTILE), *token_values(HOSTILE, "gelu")]
    )  # fmt: skip


@pytest.fixture
def visit(browser: Any, html: str) -> Iterator[Callable[..., Any]]:
    """Return a function that opens a page; at the end, no page has asked for anything or reported an error."""
    contexts, wrong = [], []

    def opened(content: str = html, width: int = 1280, height: int = 800, **options: Any) -> Any:
        context = browser.new_context(viewport={"width": width, "height": height}, **options)
        contexts.append(context)

        def answer(route: Any) -> None:
            if route.request.url == URL:
                route.fulfill(body=content, content_type="text/html; charset=utf-8")
            else:
                wrong.append(f"request: {route.request.url}")
                route.abort()

        context.route("**/*", answer)
        tab = context.new_page()
        tab.set_default_timeout(1000 * HANGS_AFTER_S)
        tab.on("console", lambda said: wrong.append(f"{said.type}: {said.text}"))
        tab.on("pageerror", lambda error: wrong.append(str(error)))
        tab.goto(URL)
        until(tab, "() => window.Plotly")
        if tab.locator(f"{SHOWN} .plot").count():
            tab.wait_for_selector(f"{SHOWN} {DRAWN}")
        return tab

    opened.wrong = wrong  # type: ignore[attr-defined]
    yield opened
    for context in contexts:
        context.close()
    assert wrong == []


def until(tab: Any, expression: str) -> None:
    """Wait until an expression is true in the page; Playwright's own way needs a policy that allows `eval`."""
    ends = time.monotonic() + HANGS_AFTER_S
    while not tab.evaluate(expression):
        assert time.monotonic() < ends, expression
        tab.wait_for_timeout(50)


def wide(tab: Any) -> int:
    """Return the pixels by which the page is wider than the window."""
    return int(
        tab.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    )


def bottom(tab: Any, selector: str) -> float:
    """Return the distance of an element's bottom from the top of the page, in pixels."""
    return float(
        tab.evaluate(
            "selector => document.querySelector(selector).getBoundingClientRect().bottom + scrollY", selector
        )
    )  # fmt: skip


# ---------------------------------------------------------------- actions of a reader


def test_a_tab_shows_its_part_alone(visit):
    tab = visit()
    links = tab.locator(TABS)
    assert links.count() >= 5
    for i in range(links.count()):
        links.nth(i).click()
        tab.wait_for_selector(f"{SHOWN}{links.nth(i).get_attribute('href')}")
        assert tab.locator(SHOWN).count() == 1
        assert links.nth(i).get_attribute("aria-selected") == "true"


def test_the_keyboard_reaches_the_tabs_and_the_probes(visit):
    tab = visit()
    tab.keyboard.press("Tab")
    assert tab.evaluate("document.activeElement.hash") == "#answer"
    tab.keyboard.press("ArrowRight")
    assert tab.evaluate("[document.activeElement.hash, location.hash]") == [
        "#training",
        "#training",
    ]
    tab.keyboard.press("End")
    tab.wait_for_selector(f"{SHOWN}#data")
    tab.locator(f"{TABS}[href='#probes']").click()
    tab.wait_for_selector(f"{SHOWN}#probes")
    tab.keyboard.press("Tab")
    first = tab.evaluate("document.activeElement.hash")
    tab.keyboard.press("ArrowDown")
    assert tab.evaluate("document.activeElement.hash") != first
    assert tab.locator("#probes > section:not([hidden])").count() == 1


def test_pointing_at_a_dot_shows_its_number(visit):
    tab = visit()
    dot = tab.locator("#figure-1 .point").last.bounding_box()
    tab.mouse.move(dot["x"] + dot["width"] / 2, dot["y"] + dot["height"] / 2)
    assert tab.locator("#figure-1 .hovertext").text_content() == "solu: the reference, 0"


def test_a_click_in_the_legend_hides_an_arm(visit):
    tab = visit()
    tab.locator(f"{TABS}[href='#training']").click()
    figure = tab.locator(f"#training {DRAWN}").first
    name = figure.locator(".legendtext").first.bounding_box()
    tab.mouse.click(name["x"] + name["width"] / 2, name["y"] + name["height"] / 2)
    hidden = f"""() => document.querySelector("#training {DRAWN}").data
        .filter(each => each.visible === "legendonly").map(each => each.name)"""
    until(tab, f"() => ({hidden})().length > 0")
    names = set(tab.evaluate(hidden)) - {None}
    assert names == {figure.locator(".legendtext").first.text_content()}


def test_a_token_shows_its_colour_and_its_numbers(visit):
    tab = visit()
    tab.locator(f"{TABS}[href='#tokens']").click()
    last = tab.locator("#tokens details[open] .words span").last
    colour = "token => getComputedStyle(token).backgroundColor"
    by_gain = last.evaluate(colour)
    tab.locator("label[for=by-effect]").click()
    assert by_gain != last.evaluate(colour)
    last.focus()
    text = last.evaluate("token => getComputedStyle(token, '::after').content")
    assert "gain 500" in text


def test_a_click_on_each_save_button_reaches_it(visit):
    """A figure above a table's button must not cover the button."""
    tab = visit()
    until(tab, "() => document.body.classList.contains('prepared')")
    covered = tab.evaluate(
        """() => [...document.querySelectorAll("button.save")].filter(each => {
            if (!each.checkVisibility()) return false;
            each.scrollIntoView({block: "center"});
            const {x, y, width, height} = each.getBoundingClientRect();
            return [0.2, 0.8].some(part => document.elementFromPoint(x + width / 2, y + part * height) !== each);
        }).map(each => each.nextElementSibling.textContent.slice(0, 80))"""
    )
    assert covered == []
    assert tab.locator("#answer button.save:visible").count() > 5


def test_a_compressed_table_is_there_once_its_fold_is_opened(visit):
    tab = visit()
    tab.locator(f"{TABS}[href='#probes']").click()
    tab.locator("#probes > nav a", has_text="P1").click()
    fold = tab.locator(
        "#probes > section:not([hidden]) details", has_text="other streams and splits"
    )
    assert fold.locator("table").count() == 0
    fold.locator("summary").click()
    assert "median of r" in fold.locator("tbody th").first.text_content()
    assert fold.locator("button.save").text_content() == "CSV"
    assert wide(tab) == 0


def test_dark_mode_changes_the_page_and_its_figures_and_back(visit):
    tab = visit(color_scheme="dark")
    colours = """() => [getComputedStyle(document.body).backgroundColor,
        document.querySelector('#figure-1')._fullLayout.paper_bgcolor]"""
    assert tab.evaluate(colours) == ["rgb(21, 24, 28)", "#15181c"]
    tab.emulate_media(color_scheme="light")
    until(tab, "() => document.querySelector('#figure-1')._fullLayout.paper_bgcolor === 'white'")
    assert tab.evaluate(colours) == ["rgb(255, 255, 255)", "white"]


def test_no_two_arms_have_similar_colours_in_dark_mode():
    """Distances are those of CIE 1976 L*a*b*, in which the least difference that is seen is about 2."""
    script = page.render([LN]).split("const COLOURS = ")[1].split(";")[0]
    changed = dict(re.findall(r'"(#\w+)": "(#\w+)"', script))
    colours = [lab(changed.get(colour, colour)) for colour in figures.COLOURS]
    paper = lab(re.findall(r'white: "(#\w+)"', script)[0])
    assert min(np.linalg.norm(a - b) for a, b in combinations([*colours, paper], 2)) > 25


def lab(colour: str) -> np.ndarray:
    """Return a colour of sRGB, such as `#0072B2`, in L*a*b* of the white D65."""
    rgb = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    to_xyz = [
        [0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041],
    ]  # fmt: skip
    x, y, z = np.cbrt(np.array(to_xyz) @ linear / (0.95047, 1.0, 1.08883))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def test_paper_has_all_parts_with_their_figures_and_warnings(visit):
    tab = visit()
    until(tab, "() => document.body.classList.contains('prepared')")
    tab.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert tab.locator("main > .tab:visible").count() == tab.locator("main > .tab").count()
    folded = ".plot:not(details:not([open]) .plot)"
    assert tab.locator(f"{folded}:not(:has(.main-svg))").count() == 0
    assert tab.locator("details.warn[open]").count() == 1
    # The paper would cut a figure that is wider than the page's 900 pixels, which a browser shrinks to the paper.
    widths = "[...document.querySelectorAll('.main-svg')].map(each => each.getBoundingClientRect().width)"
    assert tab.evaluate(f"Math.max(...{widths})") <= 900
    tab.evaluate("dispatchEvent(new Event('afterprint'))")
    until(tab, f"() => {widths}[0] > 900")


# ---------------------------------------------------------------- a page that asks for nothing


def test_hostile_tokens_are_shown_and_do_not_run(visit):
    tab = visit()
    tab.locator(f"{TABS}[href='#tokens']").click()
    tokens = tab.locator("#tokens details[open] .words span")
    assert tokens.all_text_contents() == list(HOSTILE)
    for i in range(tokens.count()):
        tokens.nth(i).focus()
    assert tab.evaluate("typeof window.ran") == "undefined"


def test_a_script_that_was_added_does_not_run(visit, html):
    attack = "document.documentElement.dataset.ran = 1"
    added = f"<script>{attack}</script><img src=x onerror='{attack}'><p style='color: red'>"
    tab = visit(html.replace("<main>", f"<main>{added}"))
    assert tab.evaluate("document.documentElement.dataset.ran === undefined")
    assert len([text for text in visit.wrong if "Content Security Policy" in text]) >= 3
    visit.wrong.clear()


# ---------------------------------------------------------------- layout


@pytest.mark.parametrize("width", WIDTHS)
def test_no_part_is_wider_than_the_window_and_headings_are_in_order(visit, width):
    tab = visit(width=width)
    links = tab.locator(TABS)
    for i in range(links.count()):
        links.nth(i).click()
        assert wide(tab) == 0, links.nth(i).text_content()
        levels = tab.evaluate(
            """[...document.querySelectorAll("h1, h2, h3, h4")].filter(each => each.checkVisibility())
            .map(each => Number(each.tagName[1]))"""
        )
        assert levels[0] == 1
        assert all(after <= before + 1 for before, after in pairwise(levels))


def test_the_first_screen_holds_the_answer_with_its_figure_tiles_and_certainty(visit):
    tab = visit()
    assert bottom(tab, "#answer > section:first-child") <= 800
    assert tab.locator("details.warn").evaluate("each => each.open") is False
    tab = visit(width=420)
    assert bottom(tab, "details.warn") - bottom(tab, "header nav") < 32  # one line
    assert bottom(tab, "#figure-1") <= 800


@pytest.mark.parametrize("width", WIDTHS)
def test_the_table_of_controls_shows_all_probes_beside_each_other(visit, width):
    """A phone has room for some of the columns; the names of the controls stay in view while the others scroll."""
    probes = plugins.names("soluscope.probes")
    planted = plugins.names("soluscope.controls")
    gates = [replace(each, control=one) for one in planted for each in passed(*probes)]
    tab = visit(page.render([LN, RUN, *map(words, probes), *gates]), width=width)
    tab.locator(f"{TABS}[href='#methods']").click()
    table = tab.locator("table.grid")
    assert table.locator("thead th").count() == 1 + len(probes)
    hidden = table.evaluate(
        "each => each.parentElement.scrollWidth - each.parentElement.clientWidth"
    )
    assert hidden == 0 or width < 1280
    name = table.locator("tbody th").first
    left = name.bounding_box()["x"]
    table.evaluate("each => each.parentElement.scrollBy(1000, 0)")
    assert name.bounding_box()["x"] == pytest.approx(left, abs=1)
    last = table.locator("thead th").last.bounding_box()
    assert last["x"] + last["width"] <= width
    assert table.locator("td div").first.get_attribute("aria-label") == "C- pass"


def test_a_probe_is_one_screen(visit):
    """A probe of eight arms: question, verdict, figure and folds, each with three panels and all its controls."""
    arms = [replace(LN, arm=f"arm {i}", label=f"SoLU + LN, arm {i}") for i in range(8)]
    records: list[Record] = [*arms]
    probes = plugins.names("soluscope.probes")
    for name in probes:
        of_probe = words(name)
        controls = {gate.control: gate.quantity for gate in of_probe.gates}
        records += [replace(each, control=control) for control in controls for each in passed(name)]
        for quantity in shown_in(of_probe):
            statistic = of_probe.quantities[quantity].statistics[:1]
            for arm in arms:
                row = number(
                    name, quantity, 0.1, arm=arm.arm, run=f"{arm.arm}-s0", statistic="".join(statistic),
                    unit=of_probe.quantities[quantity].unit,
                )  # fmt: skip
                records += [row, before_training(row, 0.2)]
        records.append(replace(of_probe, figures=of_probe.figures[:1]))
    tab = visit(page.render([*records, RUN]))
    tab.locator(f"{TABS}[href='#probes']").click()
    too_high = []
    for link in tab.locator("#probes > nav a").all():
        if not re.match(r"P\d", link.text_content()):
            continue
        link.click()
        end = bottom(tab, "#probes > section:not([hidden])")
        if end > 800:
            too_high.append((link.text_content(), end))
    assert too_high == []


def shown_in(probe: ProbeWords) -> list[str]:
    """Return the probe's tested quantity and those of its first figure of dots."""
    dots = [spec.quantities for spec in probe.figures if spec.kind == "dots"]
    names = [probe.tested, *(dots[0] if dots else ())]
    return [name for name in dict.fromkeys(names) if name in probe.quantities]
