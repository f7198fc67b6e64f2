"""The analysis of a study's ratings, stored so that the study's results and its report contain it."""

from __future__ import annotations

from pathlib import Path

from soluscope import results
from soluscope.errors import UserError
from soluscope.evaluation.stored import store
from soluscope.evaluation.suite import write_results
from soluscope.files import check_links
from soluscope.rating.analysis import analyse
from soluscope.rating.database import NAME, Database
from soluscope.report import rating
from soluscope.results import RATINGS, Rated, Setting, of_kind
from soluscope.runs.weights import commit
from soluscope.terminal import answer, console


def publish(study_dir: Path) -> list[Rated]:
    """Compute the numbers of a study's ratings, store and print them, and add them to results.jsonl.

    Raises:
        UserError: if there are no ratings, or they cannot be read or written.
    """
    check_links(study_dir / RATINGS, study_dir)
    database = Database(study_dir / RATINGS / NAME)
    found = analyse(database, commit(), _reference(study_dir))
    if not found:
        raise UserError(
            f"{database.path} holds no ratings yet: make some with 'soluscope rate {study_dir}'"
        )
    store(study_dir / RATINGS, RATINGS, found)
    console().print(rating.table(found))
    if any(study_dir.glob("*/probes/loss.jsonl")):
        write_results(study_dir)
        answer(
            f"the ratings are in {study_dir / 'results.jsonl'}: 'soluscope report {study_dir}' shows them"
        )
    else:
        answer(f"the ratings are stored: 'soluscope probe {study_dir}' adds them to the report")
    return found


def _reference(study_dir: Path) -> str:
    """Return the arm of the baseline variant, with which the others are compared; empty if it is not known."""
    path = study_dir / "results.jsonl"
    if not path.is_file():
        return ""
    arms = (each.arm for each in of_kind(results.read(path), Setting) if each.role == "baseline")
    return next(arms, "")
