"""The analysis of a study's ratings and automatic proxies, stored so that its results and report contain them."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from soluscope import results
from soluscope.errors import UserError
from soluscope.evaluation.stored import store
from soluscope.evaluation.suite import write_results
from soluscope.files import check_links
from soluscope.proxies import Complete
from soluscope.rating import calibration, scored
from soluscope.rating.analysis import analyse
from soluscope.rating.database import NAME, Database
from soluscope.rating.language_model import KEY, over_http
from soluscope.rating.settings import ProxyConfig
from soluscope.report import proxies, rating
from soluscope.results import PROXIES, RATINGS, Proxied, Rated, Record, Setting, of_kind
from soluscope.runs.folder import lock
from soluscope.runs.weights import commit
from soluscope.terminal import answer, console, say


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
    console().print(rating.table(found))
    _store(study_dir, RATINGS, found)
    return found


def publish_proxies(
    study_dir: Path,
    config: ProxyConfig,
    complete: Complete | None = None,
    say: Callable[[str], None] = say,
) -> list[Proxied]:
    """Compute the numbers of the automatic proxies, store and print them, and add them to results.jsonl.

    Args:
        study_dir: a study with stored neurons.
        config: neurons, stages, and the address of a language model.
        complete: a language model as a Python function, in place of the configuration's.
        say: function called with a line about each run.

    Raises:
        UserError: if there are no stored neurons, the language model does not answer, or files cannot be read or
            written.
    """
    if complete is None and config.lm_url:
        complete = over_http(config.lm_url, config.lm_model, os.environ.get(KEY, ""))
    folder = study_dir / RATINGS / PROXIES
    folder.mkdir(parents=True, exist_ok=True)
    check_links(study_dir / RATINGS, study_dir)
    database = Database(study_dir / RATINGS / NAME)
    answers = calibration.answers_of(database.ratings()) if database.path.is_file() else {}
    rated = [each for each, _ in answers]
    scores = scored.of_runs(study_dir, folder, config, complete, rated, say)
    planted = scored.of_planted(folder, config, complete)
    known = scored.proxies(asks=complete is not None)
    labels = {name: (proxy.label, proxy.unit) for name, proxy in known.items()}
    found = [
        *calibration.records(
            study_dir.resolve().name, scores, planted, answers, labels, commit(), _reference(study_dir)
        )
    ]  # fmt: skip
    console().print(proxies.table(found))
    _store(study_dir, PROXIES, found)
    return found


def _store(study_dir: Path, name: str, found: Sequence[Record]) -> None:
    """Store records in the study and, once it has been probed, in its results.jsonl."""
    is_probed = any(study_dir.glob("*/probes/loss.jsonl"))
    with lock(study_dir, wait=True):  # an evaluation of the study writes the same results
        store(study_dir / RATINGS, name, found)
        if is_probed:
            write_results(study_dir)
    if is_probed:
        answer(
            f"the numbers are in {study_dir / 'results.jsonl'}: 'soluscope report {study_dir}' shows them"
        )
    else:
        answer(f"the numbers are stored: 'soluscope probe {study_dir}' adds them to the report")


def _reference(study_dir: Path) -> str:
    """Return the arm of the baseline variant, with which the others are compared; empty if it is not known."""
    path = study_dir / "results.jsonl"
    if not path.is_file():
        return ""
    arms = (each.arm for each in of_kind(results.read(path), Setting) if each.role == "baseline")
    return next(arms, "")
