"""The rating page: answers are stored, arms are hidden, and other pages and hostile texts have no effect."""

from __future__ import annotations

import os
import re
import shutil
import signal
import sqlite3
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from _rating import ARMS, HOSTILE, WORDS, MadeUp

from soluscope.errors import UserError
from soluscope.rating import app, database
from soluscope.rating.database import Database, NotSaved
from soluscope.rating.plan import Kind
from soluscope.rating.serve import open_plan
from soluscope.rating.settings import PlanConfig, RatingConfig

client = pytest.importorskip("starlette.testclient", reason="its client is not installed")

TOKEN = "secret-token"
HOST = "http://127.0.0.1:8000"
SMALL = PlanConfig(6, ["top", "full"], ["mid", "post"], n_examples=10)
Open = Callable[..., Any]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a study's folder with a plan of hostile texts."""
    study = tmp_path_factory.mktemp("runs") / "first"
    study.mkdir()
    open_plan(study, MadeUp(words=(*WORDS, *HOSTILE)), SMALL)
    return study


@pytest.fixture
def ratings(drawn: Path, tmp_path: Path) -> Database:
    """Return a copy of the plan without ratings."""
    path = tmp_path / "ratings.sqlite"
    with sqlite3.connect(drawn / "rating" / "ratings.sqlite") as source:
        source.execute("VACUUM INTO ?", (str(path),))
    return Database(path)


@pytest.fixture
def visit(ratings: Database) -> Open:
    """Return a function that opens the page as a new browser; all browsers use one server."""
    served = app.build(ratings, TOKEN)

    def opened(name: str = "", token: str = TOKEN) -> Any:
        browser = client.TestClient(served, base_url=HOST, headers={"origin": HOST})
        browser.get("/", params={"token": token})
        if name:
            assert browser.post("/begin", data={"name": name}).url.path == "/rate"
        return browser

    return opened


def answer(browser: Any, interpretable: bool, hypothesis: str = "a rule") -> Any:
    place = re.search(r'name="place" value="(\d+)"', browser.get("/rate").text)
    assert place
    fields = {
        "answer": "yes" if interpretable else "no",
        "hypothesis": hypothesis,
        "place": place[1],
    }
    return browser.post("/rate", data=fields)


# ---------------------------------------------------------------- answers


def test_answers_are_stored_in_order_with_hypothesis_and_seconds(
    visit: Open, ratings: Database
) -> None:
    ann = visit("ann")
    for number in range(4):
        answer(ann, number % 2 == 0, f"rule {number}")
    found = ratings.ratings()
    assert [(each.rater, each.interpretable, each.hypothesis) for each in found] == [
        ("ann", number % 2 == 0, f"rule {number}") for number in range(4)
    ]
    assert all(0 <= each.seconds < 60 for each in found)
    assert len({each.item for each in found}) == 4
    assert "Neuron 5 of" in ann.get("/rate").text


def test_undo_shows_the_same_neuron_with_its_answer_and_keeps_the_old_rating(
    visit: Open, ratings: Database
) -> None:
    ann = visit("ann")
    answer(ann, False)
    before = ann.get("/rate").text
    answer(ann, True, "fruit & <vegetables>")
    again = ann.post("/undo").text
    assert 'value="fruit &amp; &lt;vegetables&gt;"' in again
    assert re.search(r'value="yes" id="yes" checked', again)
    assert snippets_of(again) == snippets_of(before)
    assert len(ratings.ratings()) == 1
    answer(ann, False)
    assert [each.interpretable for each in ratings.ratings()] == [False, False]
    with sqlite3.connect(ratings.path) as connection:
        assert connection.execute("SELECT count(*), sum(undone) FROM rating").fetchone() == (3, 1)


def test_undo_without_an_answer_changes_nothing(visit: Open, ratings: Database) -> None:
    assert visit("ann").post("/undo").status_code == 200
    assert ratings.ratings() == []


def test_an_interpretable_neuron_needs_a_rule_and_an_answer_must_be_chosen(
    visit: Open, ratings: Database
) -> None:
    ann = visit("ann")
    reply = answer(ann, True, "  ")
    assert (reply.status_code, "Write the rule" in reply.text) == (400, True)
    reply = ann.post("/rate", data={"place": "0", "hypothesis": "kept text"})
    assert (reply.status_code, "Choose one" in reply.text) == (400, True)
    assert 'value="kept text"' in reply.text
    assert ratings.ratings() == []


def test_a_form_sent_twice_counts_once(visit: Open, ratings: Database) -> None:
    ann = visit("ann")
    for _ in range(3):
        ann.post("/rate", data={"place": "0", "answer": "no", "hypothesis": ""})
    assert len(ratings.ratings()) == 1


def test_a_pause_hides_the_neuron_and_stops_the_clock(
    visit: Open, ratings: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr(app.time, "monotonic", lambda: now[0])
    ann = visit("ann")
    ann.get("/rate")
    now[0] += 20
    paused = ann.post("/pause")
    assert paused.url.path == "/paused"
    assert snippets_of(paused.text) == []
    now[0] += 3600
    ann.get("/rate")
    now[0] += 5
    answer(ann, False)
    assert [each.seconds for each in ratings.ratings()] == [25]


def test_the_same_name_resumes_after_a_restart(ratings: Database) -> None:
    for _ in range(2):
        browser = client.TestClient(
            app.build(ratings, TOKEN), base_url=HOST, headers={"origin": HOST}
        )
        browser.get("/", params={"token": TOKEN})
        browser.post("/begin", data={"name": " Ann  B "})
        answer(browser, False)
    assert [each.rater for each in ratings.ratings()] == ["Ann_B", "Ann_B"]
    assert "Neuron 3 of" in browser.get("/rate").text


def test_two_raters_at_once_see_their_own_orders(visit: Open, ratings: Database) -> None:
    ann, bob = visit("ann"), visit("bob")
    for _ in range(3):
        answer(ann, False)
        answer(bob, True)
    assert ratings.raters() == {"ann": 3, "bob": 3}
    items = {name: ratings.rated(name) for name in ("ann", "bob")}
    assert items["ann"] != items["bob"]


def test_after_the_last_neuron_comes_the_end(visit: Open, ratings: Database) -> None:
    ann = visit("ann")
    for _ in ratings.items():
        answer(ann, False)
    assert "neurons are rated" in ann.get("/rate").text
    assert len(ratings.rated("ann")) == len(ratings.items())
    assert "Neuron" in ann.post("/undo").text


@pytest.mark.parametrize("name", ["", "  ", "a" * 41, "<b>", "../x", "ann;"])
def test_a_name_that_cannot_be_is_refused(visit: Open, name: str) -> None:
    reply = visit().post("/begin", data={"name": name})
    assert reply.status_code == 400
    assert "letters, digits" in reply.text
    assert "<b>" not in reply.text


# ---------------------------------------------------------------- blinding


class Shape(HTMLParser):
    """The tags of a page outside its examples, and the snippets inside."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.snippets: list[str] = []
        self.is_inside = False

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        self.is_inside |= tag == "li"
        if tag == "li":
            self.snippets.append("")
        if not self.is_inside:
            self.tags.append(f"{tag} {sorted(name for name, _ in attributes)}")

    def handle_endtag(self, tag: str) -> None:
        self.is_inside &= tag != "li"

    def handle_data(self, data: str) -> None:
        if self.is_inside:
            self.snippets[-1] += data


def shape_of(page: str) -> Shape:
    result = Shape()
    result.feed(page)
    return result


def snippets_of(page: str) -> list[str]:
    return shape_of(page).snippets


def test_no_response_shows_arm_run_stage_neuron_plant_or_repeat(
    visit: Open, ratings: Database
) -> None:
    """Read every response of a whole session. Arms, runs and neurons of the study have names that no text has."""
    items = ratings.items()
    hidden = [
        *ARMS,
        "untrained",
        "planted",
        "repeat",
        "norm",
        "\\bmid\\b",
        '\\bpost\\b(?!")',
        r"\b10\d\d\b",
    ]
    hidden += [kind.value for kind in Kind if kind is not Kind.STUDY]
    secret = re.compile("|".join(hidden))
    ann = visit("ann")
    pages = {}
    for number in range(len(items) + 1):
        page = ann.get("/rate")
        reply = answer(ann, False) if number < len(items) else page
        for each in (page, reply, *reply.history):
            everything = f"{each.url} {each.headers} {outside_of_examples(each.text)}"
            assert not secret.search(everything), secret.search(everything)
        pages[number] = page
    assert len({tuple(shape_of(pages[n].text).tags) for n in range(1, len(items))}) == 1
    names = {tuple(sorted(pages[n].headers)) for n in range(1, len(items))}
    assert len(names) == 1


def outside_of_examples(page: str) -> str:
    return re.sub(r'<ol class="examples">.*?</ol>', "", page, flags=re.DOTALL)


def test_a_repeat_is_the_same_page_but_for_its_number(visit: Open, ratings: Database) -> None:
    ann = visit("ann")
    items = ratings.items()
    seen: dict[int, str] = {}
    for _ in items:
        page = re.sub(
            r'Neuron \d+|value="\d+"|\d:\d\d|data-seconds="\d+"', "", ann.get("/rate").text
        )
        answer(ann, False)
        seen[ratings.rated("ann")[-1]] = page.replace(" disabled", "")
    repeated = [(i, each.repeats) for i, each in enumerate(items) if each.repeats is not None]
    assert repeated
    for i, first in repeated:
        assert first is not None
        assert seen[i] == seen[first]


def test_planted_examples_look_like_real_ones(ratings: Database) -> None:
    """Each has the same number of snippets, tokens and marks, and shades from 0 to the darkest."""
    by_kind: dict[Kind, set[tuple[int, int, int]]] = {}
    for number, item in enumerate(ratings.items()):
        shown = ratings.shown(number)
        assert max(max(each.shades) for each in shown) == 10
        by_kind.setdefault(item.kind, set()).update(
            (len(shown), len(each.tokens), each.at) for each in shown
        )
    assert set(by_kind) == {Kind.STUDY, Kind.UNTRAINED, Kind.RULE, Kind.MIXED}
    assert len({frozenset(shapes) for shapes in by_kind.values()}) == 1


def test_hostile_tokens_are_escaped_on_every_page(visit: Open, ratings: Database) -> None:
    ann = visit("ann")
    shown = ""
    for _ in range(8):
        shown += ann.get("/rate").text
        answer(ann, False)
    for text in HOSTILE[:2]:
        assert text not in shown
        assert text.replace("<", "&lt;").replace(">", "&gt;").replace("'", "&#39;") in shown
    assert '" onfocus' not in shown


# ---------------------------------------------------------------- safety


def test_every_answer_forbids_scripts_but_the_pages_own(visit: Open) -> None:
    ann = visit("ann")
    for path in ("/", "/rate", "/paused", "/style.css", "/keys.js", "/missing"):
        headers = ann.get(path).headers
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cache-control"] == "no-store"
    for page in ("/", "/rate"):
        text = ann.get(page).text
        assert not re.search(
            r"<script(?! src=\"/keys.js\">)|<style|\sstyle=|\son\w+=", outside_of_examples(text)
        )


def test_without_the_token_nothing_is_shown(visit: Open, ratings: Database) -> None:
    for token in ("", "wrong", TOKEN[:-1], TOKEN + "x"):
        browser = visit(token=token)
        for path in ("/", "/rate", "/style.css", "/missing"):
            reply = browser.get(path)
            assert reply.status_code == 403
            assert reply.text.count("\n") == 1
            assert "set-cookie" not in reply.headers
        assert browser.post("/begin", data={"name": "x"}).status_code == 403
        assert browser.post("/rate?token=" + TOKEN, data={"answer": "no"}).status_code == 403
    assert ratings.ratings() == []


def test_the_cookie_is_strict_and_of_this_port(visit: Open, ratings: Database) -> None:
    served = app.build(ratings, TOKEN)
    browser = client.TestClient(served, base_url=HOST)
    cookie = browser.get("/", params={"token": TOKEN}).headers["set-cookie"]
    assert cookie.startswith("soluscope-8000=")
    assert "HttpOnly; SameSite=Strict" in cookie
    assert TOKEN not in cookie


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://evil.test"},
        {"origin": "null"},
        {"origin": "http://127.0.0.1:9999"},
        {"origin": "http://localhost:8000"},
        {"host": "evil.test:8000"},
        {"host": "127.0.0.1.evil.test:8000"},
        {"host": "127.0.0.1"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site", "sec-fetch-mode": "no-cors"},
    ],
    ids=str,
)
def test_a_request_of_another_page_is_refused(
    visit: Open, ratings: Database, headers: dict[str, str]
) -> None:
    ann = visit("ann")
    fields = {"place": "0", "answer": "no", "hypothesis": ""}
    reply = ann.post("/rate", data=fields, headers=headers)
    assert reply.status_code == 403
    assert reply.text.count("\n") == 1
    assert ann.get("/rate", headers=headers).status_code == 403
    assert ratings.ratings() == []


def test_a_post_without_an_origin_is_refused(visit: Open, ratings: Database) -> None:
    ann = visit("ann")
    del ann.headers["origin"]
    assert ann.post("/rate", data={"place": "0", "answer": "no"}).status_code == 403
    assert ratings.ratings() == []


def test_a_long_request_is_refused(visit: Open) -> None:
    assert visit("ann").post("/rate", data={"hypothesis": "x" * 100_000}).status_code == 413


def test_a_full_disk_is_answered_in_the_form_and_loses_nothing(
    visit: Open, ratings: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SQLite itself refuses to grow the file, as on a full disk, until the limit is removed."""
    ann = visit("ann")
    answer(ann, False, "before")
    true_open = Database._open

    def limited(self: Database) -> sqlite3.Connection:
        connection = true_open(self)
        n_pages = connection.execute("PRAGMA page_count").fetchone()[0]
        connection.execute(f"PRAGMA max_page_count = {n_pages}")
        return connection

    monkeypatch.setattr(Database, "_open", limited)
    replies = [answer(ann, True, "y" * 400) for _ in range(30)]
    full = next(each for each in replies if each.status_code != 200)
    assert full.status_code == 507
    assert "not saved" in full.text
    assert "disk is full" in full.text
    assert "y" * 400 in full.text
    n_before = len(ratings.ratings())
    assert n_before == 1 + sum(each.status_code == 200 for each in replies)
    monkeypatch.setattr(Database, "_open", true_open)
    assert answer(ann, True, "after").status_code == 200
    assert len(ratings.ratings()) == n_before + 1


# ---------------------------------------------------------------- the database


def test_a_database_of_another_study_or_of_other_examples_is_refused(drawn: Path) -> None:
    with pytest.raises(
        UserError, match="holds ratings of the study 'first', wanted 'second'"
    ) as caught:
        open_plan(drawn, MadeUp(study="second"), PlanConfig())
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="drawn from other examples") as caught:
        open_plan(drawn, MadeUp(identity="b" * 64), PlanConfig())
    assert "\n" not in str(caught.value)


def test_another_plan_is_refused_and_no_setting_resumes(drawn: Path) -> None:
    same = MadeUp(words=(*WORDS, *HOSTILE))
    assert open_plan(drawn, same, RatingConfig(port=1)).plan()["n_neurons"] == 6
    assert open_plan(drawn, same, SMALL).plan()["n_neurons"] == 6
    with pytest.raises(
        UserError, match="drawn with n_neurons=6, but the command asks for n_neurons=7"
    ) as caught:
        open_plan(drawn, same, PlanConfig(7, ["top", "full"], ["mid", "post"], n_examples=10))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"no database", b"SQLite format 3\x00" + b"\xff" * 5000])
def test_another_file_is_refused_in_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "ratings.sqlite"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"ratings\.sqlite") as caught:
        Database(path).check(MadeUp(), None)
    assert "\n" not in str(caught.value)


def test_a_damaged_database_is_refused_in_one_line(ratings: Database) -> None:
    content = bytearray(ratings.path.read_bytes())
    content[4096:8192] = b"\xff" * 4096
    ratings.path.write_bytes(content)
    with pytest.raises(UserError, match=r"ratings\.sqlite") as caught:
        ratings.check(MadeUp(), None)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE rating SET interpretable = 1 - interpretable WHERE id = 1",
        "UPDATE rating SET undone = 1 WHERE id = 2",
        "UPDATE rating SET rater = 'eve' WHERE id = 2",
        "UPDATE rating SET seconds = 9e999",
        "DELETE FROM rating WHERE id = 2",
        "DELETE FROM rating",
        "UPDATE item SET arm = run",
        "UPDATE item SET shown = '[]'",
        "DELETE FROM item WHERE id = (SELECT max(id) FROM item)",
        "UPDATE fact SET value = '{}' WHERE name = 'plan'",
        "DELETE FROM fact WHERE name = 'silent'",
        "DROP INDEX one_rating",
        "CREATE TRIGGER t AFTER INSERT ON rating BEGIN DELETE FROM rating; END",
    ],
)
def test_a_value_that_was_changed_in_the_file_is_noticed(ratings: Database, statement: str) -> None:
    for item in range(2):
        ratings.rate("ann", item, True, "a rule", 1.5)
    ratings.check(MadeUp(), None)
    with sqlite3.connect(ratings.path) as connection:
        connection.execute(statement)
    with pytest.raises(UserError, match=r"ratings\.sqlite is broken .*: restore a copy") as caught:
        ratings.check(MadeUp(), None)
    assert "\n" not in str(caught.value)


def test_a_file_of_a_sender_with_fitting_checksums_and_hostile_names_is_refused(
    ratings: Database,
) -> None:
    ratings.rate("../x", 0, True, "", 1.0)
    with pytest.raises(UserError, match="letters, digits"):
        ratings.ratings()


def test_a_copy_of_the_file_alone_has_all_ratings(ratings: Database, tmp_path: Path) -> None:
    """The server holds the file open, as when it is killed or copied while people rate."""
    ratings.hold()
    for item in range(3):
        ratings.rate("ann", item, False, "", 1.0)
        copy = Database(tmp_path / f"copy{item}.sqlite")
        copy.path.write_bytes(ratings.path.read_bytes())
        assert copy.raters() == {"ann": item + 1}


def test_a_process_killed_while_it_draws_a_plan_leaves_no_file_and_the_next_one_draws_it(
    tmp_path: Path,
) -> None:
    def killed(*_: object) -> str:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError

    child = os.fork()
    if child == 0:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(database, "_of_plan", killed)  # the tables and items are written
            open_plan(tmp_path, MadeUp(), SMALL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    left = [path.name for path in (tmp_path / "rating").iterdir()]
    assert any(name.endswith(".part") for name in left)
    assert "ratings.sqlite" not in left
    assert open_plan(tmp_path, MadeUp(), SMALL).items()
    assert {path.name for path in (tmp_path / "rating").iterdir()} == {".lock", "ratings.sqlite"}


@pytest.mark.parametrize("end", ["", "-wal", "-shm", "-journal"])
def test_a_pipe_a_folder_or_a_journal_in_the_place_of_a_file_is_refused(
    drawn: Path, tmp_path: Path, end: str
) -> None:
    for make in (os.mkfifo, Path.mkdir, *([Path.touch] if end == "-journal" else [])):
        study = tmp_path / make.__name__
        (study / "rating").mkdir(parents=True)
        path = study / "rating" / "ratings.sqlite"
        if end:
            path.write_bytes((drawn / "rating" / "ratings.sqlite").read_bytes())
        make(Path(f"{path}{end}"))
        with pytest.raises(UserError, match=rf"ratings\.sqlite{end} .*: move it away") as caught:
            open_plan(study, MadeUp(), SMALL)
        assert "\n" not in str(caught.value)


def test_no_plan_is_drawn_beside_the_log_of_a_missing_file(tmp_path: Path) -> None:
    """SQLite would apply the log to the new file."""
    (tmp_path / "rating").mkdir()
    (tmp_path / "rating" / "ratings.sqlite-wal").write_bytes(b"ratings")
    with pytest.raises(UserError, match="may have ratings: restore"):
        open_plan(tmp_path, MadeUp(), SMALL)


@pytest.mark.parametrize("name", ["rating", "rating/ratings.sqlite", "rating/ratings.sqlite-wal"])
def test_a_link_that_leads_out_of_the_study_is_refused(
    drawn: Path, tmp_path: Path, name: str
) -> None:
    study, outside = tmp_path / "first", tmp_path / "outside"
    for target in (outside, outside / "missing"):
        shutil.copytree(drawn, study)
        outside.mkdir(exist_ok=True)
        path = study / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        path.symlink_to(target)
        with pytest.raises(UserError, match=rf"{path.name} is a link that leads out of"):
            open_plan(study, MadeUp(), SMALL)
        assert not [*outside.iterdir()]
        shutil.rmtree(study)


def test_a_file_that_breaks_while_people_rate_is_answered_in_one_line(
    visit: Open, ratings: Database
) -> None:
    ann = visit("ann")
    answer(ann, False)
    with sqlite3.connect(ratings.path) as connection:
        connection.execute("UPDATE item SET shown = '{'")
    reply = ann.get("/rate")
    assert reply.status_code == 500
    assert reply.text.startswith(f"{ratings.path} is broken (")
    assert reply.text.count("\n") == 1


def test_a_folder_that_cannot_be_written_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(NotSaved, match="cannot write") as caught:
        Database(tmp_path / "missing" / "ratings.sqlite").rate("ann", 0, True, "", 1.0)
    assert "\n" not in str(caught.value)


def test_every_commit_waits_for_the_disk(ratings: Database) -> None:
    connection = ratings._open()
    assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert connection.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL
    connection.close()
    assert database.WAIT_S >= 10
