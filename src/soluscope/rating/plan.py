"""The plan of a rating: the neurons that people judge, drawn once with a seed.

An item is one neuron at one stage in one mode. Besides the study's neurons there are planted neurons of known
answer, neurons of the untrained models, and repeats of items for each person's agreement with themselves.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import islice
from typing import TypeVar

import numpy as np

from soluscope.errors import UserError
from soluscope.plugins import check_name
from soluscope.rating import planted
from soluscope.rating.settings import PlanConfig
from soluscope.rating.shown import Example, Neuron, Snippet, Source, snippets

T = TypeVar("T")
REPEAT_AFTER = (0.35, 0.4)
"""Distance between an item and its repeat, as a share of a person's items: drawn between these two numbers."""
N_TEXTS = 400
"""Neurons whose examples are the text of the planted neurons."""


class Kind(StrEnum):
    """Origin of an item."""

    STUDY = "study"
    UNTRAINED = "untrained"
    """A neuron of a run before training. Its answer is not known; nothing was learned that it could show."""
    RULE = "one rule"
    """A planted neuron that one rule explains."""
    MIXED = "four rules"
    """A planted neuron of which no rule explains more than a quarter."""


ANSWERS = {Kind.RULE: True, Kind.MIXED: False}
"""Known answers: True where a person should call the neuron interpretable."""


@dataclass(frozen=True)
class Item:
    """One neuron to judge. Everything but `shown` and `mode` is hidden from the person who judges it."""

    kind: Kind
    mode: str
    stage: str
    shown: tuple[Snippet, ...]
    arm: str = ""
    run: str = ""
    neuron: int | None = None
    rule: str = ""
    """Rule or rules of a planted neuron."""
    repeats: int | None = None
    """Index of the item that this one repeats."""


@dataclass
class Plan:
    """Items in random order, and the neurons that could not be shown."""

    items: list[Item] = field(default_factory=list)
    silent: dict[str, int] = field(default_factory=dict)
    """By arm: drawn neurons with too few examples, which are not rated. Most of them never fire."""


def draw(source: Source, config: PlanConfig) -> Plan:
    """Draw the items of a plan; equal examples, settings and seeds give equal plans.

    Raises:
        UserError: if the study has no such arm, or no neuron with enough examples.
    """
    rng = np.random.default_rng([config.seed, int(source.identity[:12], 16)])
    plan = Plan()
    studied: list[Item] = []
    for arm in _arms(source, config):
        studied += _of_arm(source, arm, config, plan, rng)
    if not studied:
        raise UserError(
            f"no neuron of {source.study} has {config.n_examples} examples in different documents: set "
            "n_examples= lower, or store more with 'soluscope neurons ... n_tokens='"
        )
    items = [*studied, *_known(source, config, len(studied), rng)]
    order = rng.permutation(len(items))  # so that an item's number shows nothing
    plan.items = [items[i] for i in order]
    originals = [
        i for i, each in enumerate(plan.items) if each.kind in (Kind.STUDY, Kind.UNTRAINED)
    ]
    n_repeated = round(config.repeated * len(originals))
    for i in sorted(rng.permutation(originals)[:n_repeated].tolist()):
        plan.items.append(_repeat(plan.items[i], i))
    return plan


def order(items: Sequence[Item], seed: int, rater: str) -> list[int]:
    """Return the order in which a person sees the items: random, with repeats long after their originals.

    The first items of an order are a random sample, so a person may stop at any item.
    """
    number = int(hashlib.sha256(rater.encode()).hexdigest()[:12], 16)
    rng = np.random.default_rng([seed, number])
    places = rng.uniform(0, 1, len(items))
    for i, each in enumerate(items):
        if each.repeats is not None:
            first, distance = rng.uniform(0, 1 - REPEAT_AFTER[1]), rng.uniform(*REPEAT_AFTER)
            places[each.repeats], places[i] = first, first + distance
    return [int(i) for i in np.argsort(places, kind="stable")]


def _arms(source: Source, config: PlanConfig) -> list[str]:
    known = list(dict.fromkeys(each.arm for each in source.neurons() if each.trained))
    for arm in config.arms:
        check_name("arm", arm, known)
    return config.arms or known


def _of_arm(
    source: Source, arm: str, config: PlanConfig, plan: Plan, rng: np.random.Generator
) -> list[Item]:
    """Return the items of an arm: the same neurons in every mode and at every stage."""
    stages = [each for each in config.stages if each in source.stages(arm)]
    stages = stages or ["post"]  # without a norm, mid is post
    cells = [(mode, stage) for mode in config.modes for stage in stages]

    def usable(neurons: Iterable[Neuron]) -> Iterator[list[Item]]:
        """Yield the items of each neuron with enough examples, and count the others."""
        for neuron in neurons:
            found = {(mode, stage): source.examples(neuron, stage, mode) for mode, stage in cells}
            if min(map(len, found.values())) < config.n_examples:
                plan.silent[arm] = plan.silent.get(arm, 0) + 1
                continue
            yield [
                _item(Kind.STUDY, neuron, mode, stage, examples, config)
                for (mode, stage), examples in found.items()
            ]

    of_arm = [each for each in source.neurons() if each.arm == arm and each.trained]
    drawn = in_turn([usable(of_run) for of_run in _by_run(of_arm, rng)])
    return [item for of_neuron in islice(drawn, config.n_neurons) for item in of_neuron]


def _by_run(neurons: Iterable[Neuron], rng: np.random.Generator) -> list[list[Neuron]]:
    """Return the neurons of each run in random order."""
    by_run: dict[str, list[Neuron]] = {}
    for each in neurons:
        by_run.setdefault(each.run, []).append(each)
    return [[of[i] for i in rng.permutation(len(of))] for of in by_run.values()]


def in_turn(iterators: Sequence[Iterator[T]]) -> Iterator[T]:
    """Yield one element of each iterator in turn, until all have ended."""
    left = list(iterators)
    while left:
        for each in [*left]:
            try:
                yield next(each)
            except StopIteration:
                left.remove(each)


def spread(examples: Sequence[Example], n: int) -> list[Example]:
    """Return `n` of the examples, evenly from the first to the last."""
    places = np.linspace(0, len(examples) - 1, n).round().astype(int)
    return [examples[i] for i in places]


def _item(
    kind: Kind,
    neuron: Neuron,
    mode: str,
    stage: str,
    examples: Sequence[Example],
    config: PlanConfig,
) -> Item:
    shown = snippets(spread(examples, config.n_examples))
    return Item(kind, mode, stage, shown, neuron.arm, neuron.run, neuron.index)


def _known(
    source: Source, config: PlanConfig, n_studied: int, rng: np.random.Generator
) -> Iterator[Item]:
    """Yield planted neurons of one rule and of four rules, and untrained neurons: a third of `planted` each."""
    n = round(config.planted * n_studied)
    arms = _arms(source, config)
    trained = [each for each in source.neurons() if each.trained and each.arm in arms]
    untrained = [each for each in source.neurons() if not each.trained and each.arm in arms]
    n_untrained = n // 3 if untrained else 0
    yield from _untrained(source, config, untrained, n_untrained, rng)
    drawn = [trained[i] for i in rng.permutation(len(trained))]
    cells = [(mode, stage) for mode in config.modes for stage in config.stages]
    text = planted.Text(
        example
        for neuron in drawn[:N_TEXTS]
        for example in source.examples(neuron, "post", config.modes[0])
    )
    makers = {Kind.RULE: planted.of_one_rule, Kind.MIXED: planted.of_many_rules}
    templates = iter(drawn)
    for number in range(n - n_untrained):
        mode, stage = cells[number // 2 % len(cells)]
        template = _template(source, templates, mode, stage, config)
        kind = list(makers)[number % 2]
        made = makers[kind](text, template, rng) if template else None
        if made:
            rule, examples = made
            yield Item(kind, mode, stage, snippets(examples), rule=rule)


def _template(
    source: Source, neurons: Iterator[Neuron], mode: str, stage: str, config: PlanConfig
) -> list[Example]:
    """Return the examples of the next neuron that has enough; empty if every neuron is used."""
    for neuron in neurons:
        at = stage if stage in source.stages(neuron.arm) else "post"
        examples = source.examples(neuron, at, mode)
        if len(examples) >= config.n_examples:
            return spread(examples, config.n_examples)
    return []


def _untrained(
    source: Source, config: PlanConfig, neurons: Sequence[Neuron], n: int, rng: np.random.Generator
) -> Iterator[Item]:
    """Yield items of `n` neurons of untrained models, evenly from the runs, in turn in each mode and stage."""
    cells = [(mode, stage) for mode in config.modes for stage in config.stages]
    number = 0
    for neuron in in_turn([iter(each) for each in _by_run(neurons, rng)]):
        if number == n:
            return
        mode, stage = cells[number % len(cells)]
        stage = stage if stage in source.stages(neuron.arm) else "post"
        examples = source.examples(neuron, stage, mode)
        if len(examples) >= config.n_examples:
            number += 1
            yield _item(Kind.UNTRAINED, neuron, mode, stage, examples, config)


def _repeat(item: Item, number: int) -> Item:
    return Item(
        item.kind,
        item.mode,
        item.stage,
        item.shown,
        item.arm,
        item.run,
        item.neuron,
        item.rule,
        number,
    )
