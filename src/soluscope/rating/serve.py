"""The server of the rating page, on this machine only."""

from __future__ import annotations

import secrets
from pathlib import Path

from soluscope.files import check_folder, check_links
from soluscope.rating import app
from soluscope.rating.database import NAME, Database, check_files
from soluscope.rating.plan import draw
from soluscope.rating.settings import PlanConfig, RatingConfig
from soluscope.rating.shown import Source
from soluscope.results import RATINGS
from soluscope.runs.folder import lock
from soluscope.serving import server
from soluscope.terminal import answer, say
from soluscope.text import plural


def open_plan(study_dir: Path, source: Source, config: PlanConfig) -> Database:
    """Return the database of a study's ratings; draw its plan if there is none.

    A plan that was drawn with other settings is refused. Settings at their defaults ask for any plan.

    Raises:
        UserError: if the database belongs to another study or plan, or the plan cannot be drawn or stored.
    """
    path = study_dir / RATINGS / NAME
    check_links(path.parent, study_dir)
    check_folder(path.parent)
    database = Database(path)
    with lock(path.parent, wait=True):  # another process may draw the plan at the same moment
        check_files(path)
        if not path.exists():
            database.create(source, config, draw(source, config))
    asked = None if config.of_plan() == PlanConfig().of_plan() else config
    database.check(source, asked)
    return database


def serve(study_dir: Path, source: Source, config: RatingConfig) -> None:
    """Serve the page until Ctrl-C, and print its address.

    Raises:
        UserError: for the reasons that `open_plan` gives, or if the port is in use.
    """
    database = open_plan(study_dir, source, config)
    listening = server.listening(config.port)
    token = secrets.token_urlsafe(32)
    items = database.items()
    say(f"{len(items)} neurons to rate, in {database.path}")
    for rater, n in database.raters().items():
        say(f"{rater}: {n} of {len(items)} {plural(len(items), 'neuron')} rated")
    say("Open this link in a browser; Ctrl-C ends the page. Answers are saved one by one.")
    answer(server.link(listening, token))
    server.run(app.build(database, token), listening)
