"""The page on which people rate neurons: plain forms, a style sheet, and a script for the keyboard.

An item is named by its place in the person's own order. No address, header or text of the page depends on the
arm, the stage, the run, or on whether an item is planted, untrained or a repeat.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route

from soluscope.errors import UserError
from soluscope.rating.database import LONGEST, Database, NotSaved, name_of
from soluscope.rating.plan import order
from soluscope.rating.settings import FULL
from soluscope.report.templates import environment
from soluscope.serving.guard import Guard
from soluscope.serving.requests import constant, form

TEMPLATES = Path(__file__).parent / "templates"
QUESTION = (
    "Can 80% or more of these {firings} be explained by a single rule or category, such as the word apple, or any "
    "phrase about music?"
)
"""The instruction of Elhage et al. 2022, section 6.1."""
FIRINGS = {
    False: "strongest firings",
    True: "firings, from the strongest to the weakest,",
}


@dataclass
class Session:
    """A browser that has presented the token."""

    rater: str = ""
    spent: dict[int, float] = field(default_factory=dict)
    """Seconds before the last pause, by item."""
    since: tuple[int, float] | None = None
    """The item in view, and the time at which it came into view."""
    undone: tuple[bool, str] | None = None
    """Answer and hypothesis that were just taken back; the form shows them again."""


def build(database: Database, token: str) -> Guard:
    """Return the application for the ratings of one study, for browsers with the token."""
    page = _Page(database)
    routes = [
        Route("/", page.welcome),
        Route("/begin", page.begin, methods=["POST"]),
        Route("/rate", page.item),
        Route("/rate", page.rate, methods=["POST"]),
        Route("/undo", page.undo, methods=["POST"]),
        Route("/pause", page.pause, methods=["POST"]),
        Route("/paused", page.paused),
        Route("/style.css", constant(TEMPLATES / "style.css", "text/css")),
        Route("/keys.js", constant(TEMPLATES / "keys.js", "text/javascript")),
    ]
    served = Starlette(routes=routes, exception_handlers={UserError: _broken})
    return Guard(served, token, "soluscope rate", Session)


class _Page:
    """The pages of one study's ratings."""

    def __init__(self, database: Database) -> None:
        self.database = database
        database.hold()
        self.items = database.items()
        self.seed = int(database.plan()["seed"])

    def welcome(self, request: Request) -> Response:
        """Show the form for the person's name."""
        return _page("welcome", rater=_session(request).rater, n=len(self.items))

    def begin(self, request: Request) -> Response:
        """Begin or resume the ratings of a person."""
        try:
            name = name_of(form(request).get("name", ""))
        except UserError as error:
            return _page("welcome", 400, rater="", n=len(self.items), problem=str(error))
        session = _session(request)
        session.rater, session.since, session.undone = name, None, None
        session.spent.clear()
        return _to("/rate")

    def item(self, request: Request) -> Response:
        """Show the next neuron, or the end."""
        session = _session(request)
        if not session.rater:
            return _to("/")
        return self._current(session)

    def rate(self, request: Request) -> Response:
        """Store an answer and continue with the next neuron."""
        session, sent = _session(request), form(request)
        if not session.rater:
            return _to("/")
        queue, done = self._queue(session.rater)
        if sent.get("place") != str(len(done)) or len(done) == len(queue):
            return _to("/rate")  # the form of another tab, or sent twice
        answer, hypothesis = sent.get("answer"), sent.get("hypothesis", "").strip()[:LONGEST]
        if answer not in ("yes", "no"):
            problem = "Choose one of the two answers first."
            return self._current(session, 400, problem, (None, hypothesis))
        if answer == "yes" and not hypothesis:
            problem = (
                "Write the rule in a few words first, because you called the neuron interpretable."
            )
            return self._current(session, 400, problem, (True, ""))
        item = self._next(queue, done)
        try:
            self.database.rate(
                session.rater, item, answer == "yes", hypothesis, _seconds(session, item)
            )
        except NotSaved as error:
            problem = f"This answer is not saved: {error}. Then send it again."
            return self._current(session, 507, problem, (answer == "yes", hypothesis))
        session.since, session.undone = None, None
        return _to("/rate")

    def undo(self, request: Request) -> Response:
        """Take back the last answer and show its neuron again."""
        session = _session(request)
        if not session.rater:
            return _to("/")
        try:
            session.undone = self.database.undo(session.rater)
        except NotSaved as error:
            return self._current(session, 507, f"The answer is not taken back: {error}.")
        session.since = None
        return _to("/rate")

    def pause(self, request: Request) -> Response:
        """Hide the neuron and stop the clock."""
        session = _session(request)
        if session.since:
            item = session.since[0]
            session.spent[item] = _seconds(session, item)
            session.since = None
        return _to("/paused")

    def paused(self, request: Request) -> Response:
        """Show that the clock has stopped."""
        session = _session(request)
        if not session.rater:
            return _to("/")
        queue, done = self._queue(session.rater)
        return _page("paused", rater=session.rater, n_done=len(done), n=len(queue))

    def _queue(self, rater: str) -> tuple[list[int], list[int]]:
        """Return a person's items in order, and the rated ones."""
        return order(self.items, self.seed, rater), self.database.rated(rater)

    def _next(self, queue: list[int], done: list[int]) -> int:
        rated = {*done}
        return next(item for item in queue if item not in rated)

    def _current(
        self,
        session: Session,
        status: int = 200,
        problem: str = "",
        given: tuple[bool | None, str] | None = None,
    ) -> Response:
        queue, done = self._queue(session.rater)
        if len(done) == len(queue):
            return _page("done", status, rater=session.rater, n=len(queue), problem=problem)
        item = self._next(queue, done)
        if session.since is None or session.since[0] != item:
            session.since = (item, time.monotonic())
        answer, hypothesis = given or session.undone or (None, "")
        is_full = self.items[item].mode == FULL
        return _page(
            "rate",
            status,
            rater=session.rater,
            n_done=len(done),
            n=len(queue),
            question=QUESTION.format(firings=FIRINGS[is_full]),
            snippets=self.database.shown(item),
            seconds=int(_seconds(session, item)),
            problem=problem,
            answer=answer,
            hypothesis=hypothesis,
            longest=LONGEST,
        )


def _seconds(session: Session, item: int) -> float:
    """Return the seconds for which a person has had an item in view, pauses left out."""
    running = session.since is not None and session.since[0] == item
    now = time.monotonic() - session.since[1] if running and session.since else 0.0
    return session.spent.get(item, 0.0) + now


def _session(request: Request) -> Session:
    session: Session = request.scope["session"]
    return session


def _to(path: str) -> Response:
    return RedirectResponse(path, status_code=303)


def _broken(_: Request, error: Exception) -> Response:
    """Answer with the error of a broken file of ratings as one line of plain text."""
    return PlainTextResponse(f"{error}\n", 500)


def _page(name: str, status: int = 200, **values: Any) -> Response:
    text = _environment().get_template(f"{name}.html.j2").render({"problem": "", **values})
    return HTMLResponse(text, status)


@cache
def _environment() -> Environment:
    return environment(PackageLoader("soluscope.rating"))
