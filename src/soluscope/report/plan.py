"""How many seeds a study needs: to reach a p below .05, and to detect a difference that matters.

Source: protocol.md section 5, "Planning".
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from soluscope import results
from soluscope.errors import UserError
from soluscope.report.findings import comparisons, seeds
from soluscope.results import MARGIN, SIGNIFICANT, Measurement, Record, Term, of_kind
from soluscope.terminal import console

POWER = 0.8
"""Share of studies in which a difference of `MARGIN` is to be detected."""
MOST_SEEDS = 1000


@dataclass(frozen=True)
class Need:
    """The seeds that one comparison of a study needs."""

    term: Term
    arm: str
    against: str
    n_seeds: int
    """Seeds of the study."""
    seed_sd: float
    """Standard deviation of the difference over seeds, in nats per token."""
    document_se: float
    """Standard error of the difference from the choice of documents, in nats per token; 0 if it is unknown."""
    needed: int | None
    """Fewest seeds that detect a true difference of `MARGIN` in 80% of studies. None: no number does, because the
    documents are too few."""


def least_p(n_seeds: int, n_tests: int = 1) -> float:
    """Return the lowest p that the sign-flip test can give with this many seeds, after Holm's correction."""
    return min(1.0, n_tests * 2.0 ** (1 - n_seeds))


def seeds_to_reject(n_tests: int = 1) -> int:
    """Return the fewest seeds with which the sign-flip test of one of `n_tests` can reach a p below .05."""
    return next(n for n in range(1, 64) if least_p(n, n_tests) < SIGNIFICANT)


def seeds_to_detect(seed_sd: float, document_se: float = 0.0) -> int | None:
    """Return the fewest seeds with which a t test detects a true difference of `MARGIN` in 80% of studies.

    The error has two parts: seed_sd^2 / n, and the documents' part, which more seeds do not reduce. Student's t
    widens the test of few seeds.

    Returns:
        None means that no number of seeds suffices.
    """
    from scipy.stats import norm
    from scipy.stats import t as student_t

    for n in range(2, MOST_SEEDS + 1):
        error = math.sqrt(seed_sd**2 / n + document_se**2)
        if error * (student_t.ppf(1 - SIGNIFICANT / 2, n - 1) + norm.ppf(POWER)) <= MARGIN:
            return n
    return None


def plan(records: Sequence[Record]) -> Iterator[Need]:
    """Yield the seeds that each headline comparison of a study needs, judged by the spread of its seeds."""
    from scipy.stats import norm

    losses: dict[str, dict[int, float]] = {}
    for row in of_kind(records, Measurement):
        if row.probe == "loss" and row.value is not None and row.seed is not None:
            losses.setdefault(row.arm, {})[row.seed] = row.value
    for term in (Term.BENEFIT, Term.STATIC):
        for each in comparisons(records, term):
            here, there = losses.get(each.arm, {}), losses.get(each.against, {})
            differences = [there[seed] - here[seed] for seed in here.keys() & there.keys()]
            if len(differences) < 2:
                continue
            spread, error = statistics.stdev(differences), 0.0
            for other in comparisons(records, term, each.arm, each.against, cluster="document"):
                if other.low is not None and other.high is not None:
                    error = (other.high - other.low) / (2 * float(norm.ppf(0.975)))
            yield Need(
                term, each.arm, each.against, len(differences), spread, error,
                seeds_to_detect(spread, error),
            )  # fmt: skip


def cannot_reject(n_seeds: int, n_tests: int) -> str:
    """Return a sentence if no test over so few seeds can reach a p below .05; empty otherwise."""
    least = least_p(n_seeds, n_tests)
    if n_seeds < 1 or least < SIGNIFICANT:
        return ""
    arms = "" if n_tests < 2 else f" after correction for {n_tests} arms"
    return (
        f"With {seeds(n_seeds)} no test over seeds can reach p < {SIGNIFICANT}{arms}: the least possible p is "
        f"{least:.2g}. {seeds_to_reject(n_tests)} seeds are needed; with fewer a study can only estimate."
    )


def show(study_dir: Path) -> None:
    """Print the seeds that the comparisons of a study need.

    Raises:
        UserError: if the study has no results, or no comparison over two seeds.
    """
    from rich.table import Table

    needs = list(plan(results.read(study_dir / "results.jsonl")))
    if not needs:
        raise UserError(
            f"{study_dir} has no comparison with a per-token norm over two seeds or more: train and probe plain "
            "SoLU, a static arm and an arm with a per-token norm at the same two seeds"
        )
    table = Table(
        title=f"seeds to detect {MARGIN} nats in {POWER:.0%} of studies", title_justify="left"
    )
    for heading in (
        "comparison",
        "seeds here",
        "sd over seeds",
        "se from documents",
        "seeds needed",
    ):
        table.add_column(
            heading, overflow="fold", justify="left" if heading == "comparison" else "right"
        )
    for need in needs:
        table.add_row(
            f"{need.against} minus {need.arm} ({need.term})", str(need.n_seeds), f"{need.seed_sd:.4f}",
            f"{need.document_se:.4f}" if need.document_se else "unknown",
            "more documents" if need.needed is None else str(need.needed),
        )  # fmt: skip
    terminal = console()
    terminal.print(table)
    n_tests = len({need.arm for need in needs if need.term is Term.STATIC})
    terminal.print(
        f"A p below {SIGNIFICANT} needs {seeds_to_reject(max(1, n_tests))} seeds, whatever their spread. The "
        f"spread is itself an estimate from {seeds(min(need.n_seeds for need in needs))}.",
        highlight=False,
    )
