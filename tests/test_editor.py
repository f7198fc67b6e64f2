"""The editor: a neuron on a text and on an edited text, against hooks; and a page that others cannot use."""

from __future__ import annotations

import re
import shutil
import threading
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import uvicorn
from _browser import needs_browser, opened

import soluscope
from soluscope import UserError
from soluscope.editor import app
from soluscope.editor.compare import compare, pairs
from soluscope.editor.models import Models
from soluscope.neurons import site, stored
from soluscope.neurons.schema import STAGES
from soluscope.notebook.on_text import on_text
from soluscope.serving import server

client = pytest.importorskip("starlette.testclient", reason="its client is not installed")

TOKEN = "secret-token"
HOST = "http://127.0.0.1:8000"
RUN = "solu_ln-s0"
TEXT, EDITED = "import os\n\nos.path", "import io\n\nos.path"
TYPED = ("<img src=x onerror=ran=1>", "</textarea><script>\n", "&lt;b&gt;\t'\"")
"""Texts that must be shown as they are; short, since the model's context is."""


@pytest.fixture(scope="module")
def study(tiny_neurons: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy: Path = tmp_path_factory.mktemp("editor") / "study"
    shutil.copytree(tiny_neurons, copy)
    return copy


@pytest.fixture(scope="module")
def page(study: Path) -> Any:
    return app.build(study, Models(app.ready(study), "cpu"), TOKEN)


@pytest.fixture
def visitor(page: Any) -> Any:
    opened = client.TestClient(page, base_url=HOST, headers={"origin": HOST})
    assert opened.get("/", params={"token": TOKEN}).url.path == app.PAGES
    return opened


class Table(HTMLParser):
    """The cells of the table of numbers."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.lines: list[list[str]] = []
        self.inside = False
        self.feed(
            text.partition('id="numbers"')[2].partition("</table>")[0].partition("<tbody>")[2]
        )

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag == "tr":
            self.lines.append([])
        self.inside = tag in ("td", "th")
        if self.inside:
            self.lines[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self.inside = False

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.lines[-1][-1] += data


def with_hooks(model: Any, text: str, neuron: int) -> dict[str, torch.Tensor]:
    """Return the neuron's activations at the tokens after BOS, and the gain, caught by hooks."""
    caught: dict[str, torch.Tensor] = {}

    def catch(value: torch.Tensor, hook: Any) -> None:
        caught[hook.name.rpartition("hook_")[2]] = value[0, 1:].clone()

    names = [*(f"blocks.0.mlp.hook_{stage}" for stage in STAGES), "blocks.0.mlp.ln.hook_scale"]
    with torch.no_grad():
        model.run_with_hooks(model.to_tokens(text), fwd_hooks=[(name, catch) for name in names])
    found = {stage: caught[stage][:, neuron] for stage in STAGES}
    return found | {"gain": 1 / caught["scale"][:, 0]}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_differences_are_those_of_two_passes_with_hooks(
    study: Path, dtype: torch.dtype, tolerance: float
) -> None:
    model = soluscope.load(study / RUN).to(dtype)
    lines = compare(on_text(model, 3, TEXT), on_text(model, 3, EDITED))
    before, after = with_hooks(model, TEXT, 3), with_hooks(model, EDITED, 3)
    assert len(lines) == len(before["pre"]) == len(after["pre"])
    changed = [line.changed for line in lines]
    assert 0 < sum(changed) < len(lines)
    first = changed.index(True)
    for stage in STAGES:
        found = torch.tensor([line.difference(stage) for line in lines], dtype=torch.float64)
        wanted = (after[stage] - before[stage]).double()
        assert torch.allclose(found, wanted, rtol=tolerance, atol=tolerance)
        assert (found[:first] == 0).all()  # attention is causal
        assert (found[first:] != 0).any()
    gains = torch.tensor([line.gain for line in lines], dtype=torch.float64)
    assert torch.allclose(gains[:, 0], before["gain"].double(), rtol=tolerance)
    assert torch.allclose(gains[:, 1], after["gain"].double(), rtol=tolerance)


def test_a_replaced_token_is_paired_with_its_replacement_also_among_equal_tokens() -> None:
    assert pairs([7, 7, 7, 7], [7, 7, 9, 7]) == [(0, 0), (1, 1), (2, 2), (3, 3)]
    assert pairs([1, 2, 3], [1, 8, 9, 3]) == [(0, 0), (1, None), (None, 1), (None, 2), (2, 3)]
    assert pairs([1, 2], []) == [(0, None), (1, None)]
    assert pairs([5, 5], [5, 5, 5]) == [(0, 0), (1, 1), (None, 2)]


@pytest.mark.parametrize("seed", range(20))
def test_every_token_of_both_texts_is_in_one_pair_and_in_order(seed: int) -> None:
    drawn = np.random.default_rng(seed)
    a, b = (drawn.integers(0, 4, size=drawn.integers(0, 12)).tolist() for _ in range(2))
    found = pairs(a, b)
    assert [left for left, _ in found if left is not None] == list(range(len(a)))
    assert [right for _, right in found if right is not None] == list(range(len(b)))
    if len(a) != len(b):
        assert all(a[x] == b[y] for x, y in found if x is not None and y is not None)


def test_the_page_shows_both_texts_token_by_token(study: Path, visitor: Any) -> None:
    fields = {"of": "m0", "neuron": "3", "text": TEXT.replace("\n", "\r\n"), "edited": EDITED}
    reply = visitor.post("/editor", data=fields)
    assert reply.status_code == 200
    model = soluscope.load(study / RUN)
    before, after = with_hooks(model, TEXT, 3), with_hooks(model, EDITED, 3)
    lines = Table(reply.text).lines
    assert len(lines) == len(before["pre"])
    for at, cells in enumerate(lines):
        for number, stage in enumerate(STAGES):
            texts = cells[2 + 3 * number : 5 + 3 * number]
            wanted = [float(before[stage][at]), float(after[stage][at])]
            assert [float(text) for text in texts[:2]] == pytest.approx(wanted, rel=1e-3, abs=1e-6)
            assert float(texts[2]) == pytest.approx(wanted[1] - wanted[0], rel=2e-2, abs=1e-5)


def test_the_initialisation_is_another_model(visitor: Any) -> None:
    fields = {"neuron": "3", "text": TEXT, "edited": ""}
    trained, untrained = (
        Table(visitor.post("/editor", data={"of": of, **fields}).text).lines for of in ("m0", "m1")
    )
    assert [cells[0] for cells in trained] == [cells[0] for cells in untrained]
    assert [cells[1] for cells in trained] != [cells[1] for cells in untrained]
    assert len(trained[0]) == 5  # token, pre, mid, post, gain: the text is not edited


def test_an_example_fills_the_text_in(study: Path, visitor: Any) -> None:
    tokens = stored.read(study / RUN).windows(3)[2]
    model = soluscope.load(study / RUN)
    reply = visitor.get("/editor", params={"of": "m0", "neuron": 3, "example": 2})
    text = re.search(r'name="text"[^>]*>\n(.*?)</textarea>', reply.text, re.DOTALL)
    assert text
    wanted = model.tokenizer.decode(tokens)
    assert text[1] == wanted.replace("&", "&amp;").replace("<", "&lt;").replace(
        ">", "&gt;"
    ).replace('"', "&#34;").replace("'", "&#39;")


@pytest.mark.parametrize("text", TYPED)
def test_hostile_texts_are_shown_and_do_not_run(visitor: Any, text: str) -> None:
    fields = {"of": "m0", "neuron": "3", "text": text, "edited": text}
    reply = visitor.post("/editor", data=fields)
    assert reply.status_code == 200
    assert "<img" not in reply.text
    assert reply.text.count("<script") == 1  # the page's own
    assert reply.text.count("</textarea>") == 2
    shown = "".join(cells[0] for cells in Table(reply.text).lines)
    assert shown.replace("\u2423", " ").replace("\u21b5", "\n") == text
    assert "default-src 'none'" in reply.headers["content-security-policy"]
    assert "unsafe" not in reply.headers["content-security-policy"]


@pytest.mark.parametrize(
    ("fields", "said"),
    [({"of": "m7"}, "of='m7' is no model"), ({"of": "../m0"}, "is no model"), ({}, "of='' is no model"),
     ({"of": "m0", "neuron": "9999"}, "neuron='9999' is not a whole number from 0 to"),
     ({"of": "m0", "neuron": "-1"}, "neuron='-1'"), ({"of": "m0", "neuron": "\u0663"}, "is not a whole"),
     ({"of": "m0", "neuron": "1", "example": "100000"}, "example='100000' is not")],
)  # fmt: skip
def test_an_address_that_does_not_fit_the_study_is_refused(
    visitor: Any, fields: dict[str, str], said: str
) -> None:
    reply = visitor.get("/editor", params=fields)
    assert reply.status_code == 404
    assert said in reply.text
    assert reply.text.count("\n") == 1


def test_a_text_longer_than_the_context_is_refused_and_kept(visitor: Any) -> None:
    text = "import os, " * 200
    reply = visitor.post("/editor", data={"of": "m0", "neuron": "3", "text": text, "edited": text})
    assert reply.status_code == 400
    assert "shorten the text" in reply.text
    assert text in reply.text
    assert visitor.post("/editor", content=b"text=" + b"a" * 70_000).status_code == 413


@pytest.mark.parametrize(
    "path", ["/", "/editor?of=m0&neuron=3", app.PAGES, "/neurons/data/m0.js", "/editor.js"]
)
def test_only_a_browser_with_the_token_sees_anything(page: Any, path: str) -> None:
    other = client.TestClient(page, base_url=HOST)
    assert other.get(path).status_code == 403
    assert "soluscope neurons --serve" in other.get(path).text
    assert other.get("/", params={"token": "guess"}).status_code == 403


@pytest.mark.parametrize("headers", [
    {"host": "evil.example:8000"}, {"origin": "http://evil.example"}, {"origin": "http://127.0.0.1:9000"},
    {"origin": "null"}, {"sec-fetch-site": "cross-site"},
])  # fmt: skip
def test_requests_of_other_pages_are_refused(visitor: Any, headers: dict[str, str]) -> None:
    fields = {"of": "m0", "neuron": "3", "text": TEXT}
    assert visitor.post("/editor", data=fields, headers=headers).status_code == 403


@pytest.mark.parametrize(
    "name", ["../index", "..%2Findex", "m0%00", "nothing", "%2e%2e/%2e%2e/data"]
)
def test_only_the_sites_own_data_is_sent(visitor: Any, name: str) -> None:
    assert visitor.get(f"/neurons/data/{name}.js").status_code == 404


def test_a_link_among_the_data_is_not_followed(study: Path, visitor: Any, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    link = study / "neurons" / "data" / "link.js"
    link.symlink_to(tmp_path / "secret")
    assert visitor.get("/neurons/data/link.js").status_code == 404
    link.unlink()


def test_the_served_page_links_to_the_editor_and_allows_its_own_script(
    visitor: Any, study: Path
) -> None:
    reply = visitor.get(app.PAGES)
    assert 'data-editor="/editor"' in reply.text
    assert reply.headers.get_list("content-security-policy") == [site.policy()]
    assert 'data-editor="' not in (study / "neurons" / "index.html").read_text()
    data = visitor.get("/neurons/data/m0.js")
    assert data.content == (study / "neurons" / "data" / "m0.js").read_bytes()


def test_only_pages_of_other_neurons_are_written_again(
    study: Path, page: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[Path] = []
    monkeypatch.setattr(site, "build", built.append)
    app.ready(study)
    assert built == []
    index = study / "neurons" / "index.html"
    before = index.read_text()
    index.write_text(before.replace("m0", "m9") + " ")
    app.ready(study)
    assert built == [study]
    index.write_text(before)


def test_a_folder_without_neurons_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no neurons are stored in"):
        app.ready(tmp_path)


# ---------------------------------------------------------------- in a browser


@pytest.fixture
def address(page: Any) -> Iterator[str]:
    """Return the link to a server of the page, in a thread."""
    listening = server.listening(0)
    running = uvicorn.Server(uvicorn.Config(page, lifespan="off", log_config=None, ws="none"))
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]})
    thread.start()
    yield server.link(listening, TOKEN)
    running.should_exit = True
    thread.join()
    listening.close()


@pytest.mark.slow
@needs_browser
@pytest.mark.parametrize("width", [420, 1280, 2560])
def test_a_person_opens_the_editor_from_a_neurons_page(
    browser: Any, address: str, width: int
) -> None:
    wrong: list[str] = []
    tab = opened(browser, address, wrong, viewport={"width": width, "height": 900})
    tab.locator(".card .example a").first.click()
    tab.locator("#numbers").wait_for()
    text = tab.input_value("#text")
    assert tab.input_value("#edited") == text
    assert tab.locator("#numbers tr.changed").count() == 0
    tab.fill("#text", TEXT)
    tab.fill("#edited", EDITED)
    tab.focus("#edited")
    with tab.expect_navigation():
        tab.keyboard.press("Control+Enter")
    assert tab.locator("#numbers tr.changed").count() > 0
    assert tab.locator("#post .row").count() == 3
    tab.fill("#text", TYPED[0])
    tab.fill("#edited", TYPED[0] + "x")
    with tab.expect_navigation():
        tab.click("button")
    assert tab.input_value("#text") == TYPED[0]
    assert tab.locator("#numbers").count() == 1
    assert tab.evaluate("window.ran") is None
    wide = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert tab.evaluate(wide) <= 0
    tab.click("text=Page of this neuron")
    tab.locator(".card h2").wait_for()
    assert wrong == []
