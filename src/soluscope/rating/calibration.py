"""From the numbers of the automatic proxies to records: means by arm, and how well each proxy finds known answers.

A proxy is not a rating. Its AUC on planted neurons, on neurons before training and on neurons that people have
rated says how far it agrees with known answers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
from scipy.stats import ttest_ind

from soluscope.comparison import auc
from soluscope.comparison.stats import MIN_CLUSTERS, Interval, bootstrap_mean
from soluscope.rating.database import Rating
from soluscope.rating.plan import Kind
from soluscope.rating.scored import FOUR_CLASSES, ONE_CLASS, Rated, Score
from soluscope.results import Proxied, ProxyTerm

Answers = dict[tuple[Rated, str], float]
"""Mean answer to a rated neuron at a stage: 1 if everybody called it interpretable."""


def answers_of(ratings: Iterable[Rating]) -> Answers:
    """Return the mean answers to neurons of the study's models, trained or not; repeats and modes count alike."""
    given: dict[tuple[Rated, str], list[bool]] = defaultdict(list)
    for each in ratings:
        if each.kind in (Kind.STUDY, Kind.UNTRAINED) and each.neuron is not None:
            rated = (each.run, each.kind is Kind.STUDY, each.neuron)
            given[rated, each.stage].append(each.interpretable)
    return {key: float(np.mean(values)) for key, values in given.items()}


def records(
    study: str,
    scores: Sequence[Score],
    planted: Sequence[Score],
    answers: Answers,
    labels: dict[str, tuple[str, str]],
    commit: str,
    reference: str = "",
) -> Iterator[Proxied]:
    """Yield the records of all proxies.

    Args:
        study: name of the study.
        scores: numbers of the study's neurons.
        planted: numbers of the planted neurons.
        answers: from `answers_of`; empty without ratings.
        labels: label and unit of each proxy by name.
        commit: commit of the code that analyses.
        reference: arm with which the others are compared; by default the first one.
    """
    for name, (label, unit) in labels.items():
        of_proxy = [each for each in scores if each.proxy == name]
        make = partial(Proxied, study=study, proxy=name, label=label, commit=commit)
        for stage in dict.fromkeys(each.stage for each in of_proxy):
            at_stage = [each for each in of_proxy if each.stage == stage]
            yield from _of_arms(at_stage, partial(make, stage=stage), unit, reference)
            yield from _calibration(
                at_stage, [each for each in planted if (each.proxy, each.stage) == (name, stage)],
                answers, partial(make, stage=stage),
            )  # fmt: skip
        yield from _stages(of_proxy, make, unit)


def _of_arms(scores: Sequence[Score], make: Any, unit: str, reference: str) -> Iterator[Proxied]:
    """Yield the means of the arms, trained and not, each arm's mean minus the reference's, and its AUC."""
    arms = list(dict.fromkeys(each.arm for each in scores))
    first = reference if reference in arms else next(iter(arms), "")
    values = {
        (arm, trained): _values(
            each for each in scores if (each.arm, each.trained, each.drawn) == (arm, trained, True)
        )
        for arm in arms
        for trained in (True, False)
    }
    for (arm, trained), (some, n_none) in values.items():
        if some:
            note = f"without a number: {n_none} neurons" if n_none else ""
            found = bootstrap_mean(some, np.ones(len(some)))
            yield _number(found, make, unit, ProxyTerm.MEAN, arm=arm, untrained=not trained, note=note)  # fmt: skip
    for arm in arms:
        own, others = values[arm, True][0], values[first, True][0]
        if arm != first and own and others:
            found = _difference(own, others)
            yield _number(found, make, unit, ProxyTerm.DIFFERENCE, arm=arm, against=first)
        untrained = values[arm, False][0]
        if own and untrained:
            yield _number(auc.interval(own, untrained), make, "AUC", ProxyTerm.TWIN, arm=arm)


def _stages(scores: Sequence[Score], make: Any, unit: str) -> Iterator[Proxied]:
    """Yield each arm's mean after the mid norm minus the mean before it, over the same neurons."""
    by_arm: dict[str, dict[tuple[str, int], dict[str, float]]] = defaultdict(
        lambda: defaultdict(dict)
    )
    for each in scores:
        if each.trained and each.drawn and each.value is not None:
            by_arm[each.arm][each.run, each.neuron][each.stage] = each.value
    for arm, neurons in by_arm.items():
        moved = [at["post"] - at["mid"] for at in neurons.values() if len(at) == 2]
        if moved:
            found = bootstrap_mean(moved, np.ones(len(moved)))
            yield _number(found, make, unit, ProxyTerm.STAGES, arm=arm)


def _calibration(
    scores: Sequence[Score], planted: Sequence[Score], answers: Answers, make: Any
) -> Iterator[Proxied]:
    """Yield the AUCs between planted neurons of known answer, and between neurons by people's answers."""
    one, four = (
        _values(each for each in planted if each.arm == name)[0]
        for name in (ONE_CLASS, FOUR_CLASSES)
    )
    if one and four:
        note = f"means {np.mean(one):.2f} and {np.mean(four):.2f}"
        yield _number(auc.interval(one, four), make, "AUC", ProxyTerm.PLANTED, note=note)
    groups: dict[bool, list[float]] = {True: [], False: []}
    for each in scores:
        answer = answers.get(((each.run, each.trained, each.neuron), each.stage), 0.5)
        if each.value is not None and answer != 0.5:  # as many yes as no decide nothing
            groups[answer > 0.5].append(each.value)
    if groups[True] and groups[False]:
        yield _number(auc.interval(groups[True], groups[False]), make, "AUC", ProxyTerm.RATINGS)


def _values(scores: Iterable[Score]) -> tuple[list[float], int]:
    """Return the numbers, and how many neurons have none."""
    every = [each.value for each in scores]
    some = [value for value in every if value is not None]
    return some, len(every) - len(some)


def _difference(own: Sequence[float], others: Sequence[float]) -> Interval:
    """Return the difference of the means of two groups of neurons, with Welch's interval."""
    n, value = len(own) + len(others), float(np.mean(own) - np.mean(others))
    if min(len(own), len(others)) < MIN_CLUSTERS:
        return Interval(value, None, None, n, n)
    bounds = ttest_ind(own, others, equal_var=False).confidence_interval()
    return Interval(value, float(bounds.low), float(bounds.high), n, n)


def _number(found: Interval, make: Any, unit: str, term: ProxyTerm, **names: Any) -> Proxied:
    few = found.low is None
    note = names.pop("note", "") or ("too few neurons for an interval" if few else "")
    return make(  # type: ignore[no-any-return]
        term=term, value=found.value, low=found.low, high=found.high, unit=unit, n=found.n,
        n_clusters=found.n_clusters, cluster="neuron", note=note, **names,
    )  # fmt: skip
