"""From ratings to records: shares by arm, their differences, agreement, planted neurons, and power.

Ratings are never completed or corrected: a number without ratings is left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import combinations

import numpy as np

from soluscope.comparison.stats import MIN_CLUSTERS
from soluscope.rating import agreement, power
from soluscope.rating.database import Database, Rating
from soluscope.rating.mixed import Shares, fit
from soluscope.rating.plan import ANSWERS, Kind
from soluscope.results import Rated
from soluscope.results import Rating as Term

UNTRAINED = "untrained"
"""Name of the cell of neurons before training, which belongs to all arms."""
FEW = f"fewer than {MIN_CLUSTERS} neurons"


def analyse(database: Database, commit: str, reference: str = "") -> list[Rated]:
    """Return the records of a study's ratings; empty without ratings.

    Args:
        commit: commit of the code that analyses.
        reference: arm with which the others are compared; by default the first one.
    """
    ratings = database.ratings()
    study = database.facts()["study"]
    found: list[Rated] = []
    for mode in dict.fromkeys(each.mode for each in ratings):
        of_mode = [each for each in ratings if each.mode == mode]
        cells = [each for each in of_mode if each.kind in (Kind.STUDY, Kind.UNTRAINED)]
        found += _shares(study, mode, cells, reference) if cells else []
        found += _between(study, mode, of_mode)
        found += _known(study, mode, of_mode)
    found += _within(study, ratings)
    found += _times(study, ratings)
    found += _detectable(study, ratings, found)
    return [_with_commit(each, commit) for each in found]


def _with_commit(record: Rated, commit: str) -> Rated:
    return type(record)(**(vars(record) | {"commit": commit}))


# --- shares ---------------------------------------------------------------------------------------


def _shares(study: str, mode: str, ratings: Sequence[Rating], reference: str) -> Iterator[Rated]:
    """Yield the shares of all cells and their differences."""
    cells = [_cell(each) for each in ratings]
    shares = fit(
        [each.interpretable for each in ratings],
        cells,
        [each.rater for each in ratings],
        [f"{each.kind}/{each.run}/{each.neuron}" for each in ratings],
    )
    neurons: dict[str, set[tuple[str, int | None]]] = {}
    counts: dict[str, int] = {}
    for cell, each in zip(cells, ratings, strict=True):
        neurons.setdefault(cell, set()).add((each.run, each.neuron))
        counts[cell] = counts.get(cell, 0) + 1
    for cell in shares.cells:
        arm, stage = _parts(cell)
        is_untrained = arm == UNTRAINED
        yield _number(
            Term.SHARE, study, shares.share(cell), [cell], neurons, counts, mode=mode, stage=stage,
            arm="" if is_untrained else arm, untrained=is_untrained,
        )  # fmt: skip
    yield from _differences(study, mode, shares, neurons, counts, reference)


def _differences(
    study: str,
    mode: str,
    shares: Shares,
    neurons: dict[str, set[tuple[str, int | None]]],
    counts: dict[str, int],
    reference: str,
) -> Iterator[Rated]:
    """Yield each arm's share minus the reference's, and each arm's share after the norm minus that before it."""
    arms = list(dict.fromkeys(_parts(cell)[0] for cell in shares.cells))
    arms = [each for each in arms if each != UNTRAINED]
    first = reference if reference in arms else next(iter(arms), "")
    for cell in shares.cells:
        arm, stage = _parts(cell)
        # An arm without a norm has the same activations at both stages, and is rated once.
        other = next(
            (_named(first, at) for at in (stage, "post") if _named(first, at) in counts), None
        )
        if arm not in (first, UNTRAINED) and other:
            yield _number(
                Term.DIFFERENCE, study, shares.difference(cell, other), [cell, other], neurons, counts,
                mode=mode, stage=stage, arm=arm, against=first,
            )  # fmt: skip
    for arm in arms:
        before, after = _named(arm, "mid"), _named(arm, "post")
        if before in counts and after in counts:
            yield _number(
                Term.STAGES, study, shares.difference(after, before), [before, after], neurons, counts,
                mode=mode, arm=arm,
            )  # fmt: skip


def _number(
    term: Term,
    study: str,
    bounded: tuple[float, float, float],
    cells: Sequence[str],
    neurons: dict[str, set[tuple[str, int | None]]],
    counts: dict[str, int],
    **names: str | bool,
) -> Rated:
    """Return a record of a share or of a difference; without bounds if a cell has few neurons."""
    value, low, high = bounded
    enough = min(len(neurons[each]) for each in cells) >= MIN_CLUSTERS
    return Rated(
        term=term,
        study=study,
        value=value,
        unit="share",
        low=low if enough else None,
        high=high if enough else None,
        n=sum(counts[each] for each in cells),
        n_clusters=len(set().union(*(neurons[each] for each in cells))),
        cluster="neuron",
        note="" if enough else FEW,
        **names,  # type: ignore[arg-type]
    )


def _cell(rating: Rating) -> str:
    return _named(rating.arm if rating.kind is Kind.STUDY else UNTRAINED, rating.stage)


def _named(arm: str, stage: str) -> str:
    return f"{arm} {stage}"  # names of arms have no spaces


def _parts(cell: str) -> tuple[str, str]:
    arm, _, stage = cell.rpartition(" ")
    return arm, stage


# --- raters ---------------------------------------------------------------------------------------


def _between(study: str, mode: str, ratings: Sequence[Rating]) -> Iterator[Rated]:
    """Yield the kappa of each two raters on the items that both have rated; repeats are left out."""
    answers = _first_answers(ratings)
    for one, other in combinations(sorted(answers), 2):
        common = sorted(answers[one].keys() & answers[other].keys())
        pairs = [(answers[one][item], answers[other][item]) for item in common]
        if pairs:
            yield _kappa(Term.BETWEEN, study, pairs, mode=mode, rater=one, against=other)


def _within(study: str, ratings: Sequence[Rating]) -> Iterator[Rated]:
    """Yield each rater's kappa with themselves, from the items that they have rated twice, in all modes."""
    answers = _first_answers(ratings)
    for rater, first in sorted(answers.items()):
        pairs = [
            (first[each.repeats], each.interpretable)
            for each in ratings
            if each.rater == rater and each.repeats is not None and each.repeats in first
        ]
        if pairs:
            yield _kappa(Term.WITHIN, study, pairs, rater=rater)


def _kappa(
    term: Term,
    study: str,
    pairs: Sequence[tuple[bool, bool]],
    rater: str,
    mode: str = "",
    against: str = "",
) -> Rated:
    found = agreement.kappa([one for one, _ in pairs], [other for _, other in pairs])
    is_defined = np.isfinite(found.value)
    agreed = sum(one == other for one, other in pairs)
    note = f"equal answers: {agreed} of {len(pairs)}"
    return Rated(
        term=term,
        study=study,
        value=found.value if is_defined else None,
        unit="kappa",
        low=found.low,
        high=found.high,
        n=len(pairs),
        n_clusters=len(pairs),
        cluster="neuron",
        note=note if is_defined else f"{note}, and all answers are the same",
        rater=rater,
        mode=mode,
        against=against,
    )


def _first_answers(ratings: Iterable[Rating]) -> dict[str, dict[int, bool]]:
    """Return each rater's answers by item, without repeats."""
    found: dict[str, dict[int, bool]] = {}
    for each in ratings:
        if each.repeats is None:
            found.setdefault(each.rater, {})[each.item] = each.interpretable
    return found


def _known(study: str, mode: str, ratings: Sequence[Rating]) -> Iterator[Rated]:
    """Yield each rater's share of right answers to planted neurons."""
    for rater in sorted({each.rater for each in ratings}):
        right = [
            each.interpretable == ANSWERS[each.kind]
            for each in ratings
            if each.rater == rater and each.kind in ANSWERS
        ]
        if right:
            value, low, high = agreement.share(sum(right), len(right))
            yield Rated(
                term=Term.KNOWN, study=study, value=value, low=low, high=high, unit="share",
                n=len(right), n_clusters=len(right), cluster="neuron", mode=mode, rater=rater,
            )  # fmt: skip


def _times(study: str, ratings: Sequence[Rating]) -> Iterator[Rated]:
    for rater in sorted({each.rater for each in ratings}):
        seconds = [each.seconds for each in ratings if each.rater == rater]
        yield Rated(
            term=Term.SECONDS, study=study, value=float(np.median(seconds)), unit="s", n=len(seconds),
            rater=rater,
        )  # fmt: skip


def _detectable(study: str, ratings: Sequence[Rating], found: Sequence[Rated]) -> Iterator[Rated]:
    """Yield the difference that a study of this size finds in 85% of cases."""
    n_by_arm: dict[str, set[tuple[str, int | None]]] = {}
    for each in ratings:
        if each.kind is Kind.STUDY:
            n_by_arm.setdefault(each.arm, set()).add((each.run, each.neuron))
    if len(n_by_arm) < 2:
        return
    kappas = [each.value for each in found if each.term is Term.BETWEEN and each.value is not None]
    kappa = float(np.clip(np.mean(kappas), 0, 1)) if kappas else power.KAPPA
    n, n_raters = min(map(len, n_by_arm.values())), len({each.rater for each in ratings})
    least = power.detectable(n, n_raters, kappa)
    if least is not None:
        yield Rated(
            term=Term.DETECTABLE, study=study, value=least, unit="share", n=n,
            note=f"{n} neurons per arm, raters: {n_raters}, kappa between raters: {kappa:.2f}",
        )  # fmt: skip
