"""The editor's page, and the study's neuron pages with links to it: plain forms, which work without a script."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, PrefixLoader
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, RedirectResponse, Response
from starlette.routing import Route

from soluscope.editor.compare import Line, compare
from soluscope.editor.models import Models
from soluscope.errors import UserError
from soluscope.files import check_links
from soluscope.neurons import site
from soluscope.neurons.schema import FOLDER, STAGES, Stage
from soluscope.neurons.stored import Neurons
from soluscope.report.templates import environment
from soluscope.serving.guard import Guard
from soluscope.serving.requests import constant, form

COMMAND = "soluscope neurons --serve"
PAGES = f"/{FOLDER}/{site.PAGE}"
EDITOR = "/editor"
SHADES = 10
"""Number of shades of each of the two colours."""
NAMES: dict[Stage, str] = {
    "pre": "before the nonlinearity (pre)", "mid": "before the norm (mid)", "post": "after the norm (post)",
}  # fmt: skip


def ready(study_dir: Path) -> list[Neurons]:
    """Return a study's stored neurons; write its pages if they are missing or describe other neurons.

    Raises:
        UserError: if no neurons are stored, or the pages cannot be written.
    """
    found = site.parts(study_dir)
    place = study_dir / FOLDER / site.PAGE
    check_links(place, study_dir)
    report = site.report_of(study_dir)
    if not place.is_file() or place.read_text(encoding="utf8") != site.page(
        study_dir.name, found, report=report
    ):
        site.build(study_dir)
    return found


def build(study_dir: Path, models: Models, token: str) -> Guard:
    """Return the application for the neurons of one study, for browsers with the token."""
    pages = _Pages(study_dir, models)
    templates = Path(__file__).parent / "templates"
    style = _environment().get_template("editor/editor.css.j2").render(shades=range(SHADES + 1))
    routes = [
        Route("/", pages.first),
        Route(PAGES, pages.neurons),
        Route(f"/{FOLDER}/{site.DATA}/{{name}}.js", pages.data),
        Route(EDITOR, pages.editor, methods=["GET", "POST"]),
        Route("/editor.css", lambda _: Response(style, media_type="text/css")),
        Route("/editor.js", constant(templates / "editor.js", "text/javascript")),
    ]
    return Guard(Starlette(routes=routes), token, COMMAND, lambda: None)


@dataclass(frozen=True)
class _Asked:
    """The fields of the editor."""

    number: int
    """Place of the model among the study's stored neurons."""
    neuron: int
    text: str
    edited: str


class _Pages:
    """The pages of one study."""

    def __init__(self, study_dir: Path, models: Models) -> None:
        self.study_dir = study_dir
        self.models = models
        self.found = models.found

    def first(self, _: Request) -> Response:
        """Show the neurons to a browser that comes from the terminal's link."""
        return RedirectResponse(PAGES, status_code=303)

    def neurons(self, _: Request) -> Response:
        """Show the neurons, with links to the editor."""
        text = site.page(self.study_dir.name, self.found, editor=EDITOR)
        return HTMLResponse(text, headers={"content-security-policy": site.policy()})

    def data(self, request: Request) -> Response:
        """Send a data file of the neuron pages."""
        name = request.path_params["name"]
        path = self.study_dir / FOLDER / site.DATA / f"{name}.js"
        if not re.fullmatch(r"[\w-]+", name) or path.is_symlink() or not path.is_file():
            return Response("There is no such file.\n", 404, media_type="text/plain")
        return FileResponse(path, media_type="text/javascript")

    def editor(self, request: Request) -> Response:
        """Show a neuron on a text and on the edited text."""
        try:
            asked = self._asked({**request.query_params, **form(request)})
        except UserError as error:
            return _plain(str(error), 404)
        about = self.found[asked.number].about
        stages = [stage for stage in STAGES if stage != "post" or about.has_mid_norm]
        values: dict[str, Any] = {
            "asked": asked, "key": site.key(asked.number), "most": about.n_neurons - 1, "pages": PAGES,
            "models": [(site.key(number), site.label(each)) for number, each in enumerate(self.found)],
            "has_norm": about.has_mid_norm, "names": NAMES,
        }  # fmt: skip
        try:
            lines = self._lines(asked)
        except UserError as error:
            return _page(400, problem=str(error), lines=[], passages=[], is_edited=False, **values)
        is_edited = any(line.changed for line in lines)
        passages = [(stage, _passages(lines, stage, is_edited)) for stage in stages]
        return _page(200, problem="", lines=lines, passages=passages, is_edited=is_edited, **values)

    def _asked(self, fields: dict[str, str]) -> _Asked:
        """Return the fields of a request.

        Raises:
            UserError: naming the field that does not fit the study.
        """
        keys = [site.key(number) for number in range(len(self.found))]
        if fields.get("of") not in keys:
            raise UserError(
                f"of={fields.get('of', '')!r:.60} is no model: give one of {', '.join(keys)}"
            )
        number = keys.index(fields["of"])
        neuron = _whole("neuron", fields, self.found[number].about.n_neurons)
        text, edited = (fields.get(name, "").replace("\r\n", "\n") for name in ("text", "edited"))
        if "example" in fields:
            text = self._text_of_example(number, neuron, fields)
        return _Asked(number, neuron, text, edited or text)

    def _text_of_example(self, number: int, neuron: int, fields: dict[str, str]) -> str:
        tokens = self.found[number].windows(neuron)
        return self.models.decode(number, tokens[_whole("example", fields, len(tokens))])

    def _lines(self, asked: _Asked) -> list[Line]:
        if not asked.text:
            return []
        seen = self.models.see(asked.number, asked.neuron, asked.text, asked.edited)
        return compare(*seen)


def _whole(name: str, fields: dict[str, str], n: int) -> int:
    """Return the field `name`, a whole number below n."""
    given = fields.get(name, "")
    if not re.fullmatch(r"[0-9]{1,9}", given) or int(given) >= n:
        raise UserError(f"{name}={given!r:.60} is not a whole number from 0 to {n - 1}")
    return int(given)


Shaded = tuple[str, str, str]
"""A token, the class of its colour, and the value as text."""


def _passages(lines: list[Line], stage: Stage, is_edited: bool) -> list[tuple[str, list[Shaded]]]:
    """Return named rows of coloured tokens: the text, and if it is edited, the edited text and the difference.

    The text and the edited text share the scale of their colours.
    """
    texts = [(line.token, line.values[stage][0]) for line in lines]
    if not is_edited:
        return [("text", _shaded(texts, _largest(texts)))]
    edited = [(line.edited_token, line.values[stage][1]) for line in lines]
    differences = [(line.edited_token, line.difference(stage)) for line in lines]
    largest = _largest(texts + edited)
    return [
        ("text", _shaded(texts, largest)),
        ("edited", _shaded(edited, largest)),
        ("difference", _shaded(differences, _largest(differences))),
    ]


Valued = list[tuple[str | None, float | None]]


def _largest(tokens: Valued) -> float:
    return max((abs(value) for _, value in tokens if value is not None), default=0.0) or 1.0


def _shaded(tokens: Valued, largest: float) -> list[Shaded]:
    found = []
    for token, value in tokens:
        if token is None:
            continue
        shade = 0 if value is None else round(SHADES * abs(value) / largest)
        colour = "high" if value is not None and value > 0 else "low"
        found.append((token, f"{colour}{shade}", number(value)))
    return found


def number(value: float | None) -> str:
    """Return a number as text; a dash for a token of one text only."""
    return "\u2013" if value is None else f"{value:.4g}"


def in_a_line(token: str | None) -> str:
    """Return a token for a cell of the table: a line end as an arrow, and a dash for no token."""
    return "\u2013" if token is None else token.replace("\n", "\u21b5")


def _plain(text: str, status: int) -> Response:
    return Response(f"{text}\n", status, media_type="text/plain")


def _page(status: int, **values: Any) -> Response:
    text = (
        _environment()
        .get_template("editor/editor.html.j2")
        .render(number=number, in_a_line=in_a_line, **values)
    )
    return HTMLResponse(text, status)


@cache
def _environment() -> Environment:
    """Return the templates of the editor, and the report's style sheet."""
    packages = {"editor": "soluscope.editor", "report": "soluscope.report"}
    return environment(
        PrefixLoader({name: PackageLoader(package) for name, package in packages.items()})
    )
