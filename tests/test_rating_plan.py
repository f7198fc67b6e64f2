"""The plan of a blind rating: its neurons, its planted neurons, and the order in which a person sees them."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from _rating import ARMS, MadeUp

from soluscope.config import load_typed
from soluscope.errors import UserError
from soluscope.rating import planted
from soluscope.rating.plan import Kind, Plan, draw, order
from soluscope.rating.settings import PlanConfig, RatingConfig
from soluscope.rating.shown import N_SHADES, Example, shade, snippets, visible

SMALL = PlanConfig(n_neurons=12, n_examples=10)


@pytest.fixture(scope="module")
def plan() -> Plan:
    """Return a plan of both modes and both stages."""
    return draw(MadeUp(), PlanConfig(12, ["top", "full"], ["mid", "post"], n_examples=10))


def test_each_arm_has_as_many_neurons_evenly_from_its_runs(plan: Plan) -> None:
    studied = [each for each in plan.items if each.kind is Kind.STUDY and each.repeats is None]
    for arm in ARMS:
        neurons = {(each.run, each.neuron) for each in studied if each.arm == arm}
        assert Counter(run for run, _ in neurons) == {f"{arm}-s0": 6, f"{arm}-s1": 6}
    cells = Counter((each.arm, each.stage) for each in studied)
    assert cells == {("zzplain", "post"): 24, ("zznormed", "mid"): 24, ("zznormed", "post"): 24}


def test_a_tenth_is_planted_or_untrained_and_a_tenth_is_repeated(plan: Plan) -> None:
    kinds = Counter(each.kind for each in plan.items if each.repeats is None)
    assert kinds[Kind.STUDY] == 72
    assert [kinds[each] for each in (Kind.UNTRAINED, Kind.RULE, Kind.MIXED)] == [2, 3, 2]
    repeats = [each for each in plan.items if each.repeats is not None]
    assert len(repeats) == round(0.1 * (72 + 2))
    for each in repeats:
        assert each.repeats is not None
        first = plan.items[each.repeats]
        assert first.shown == each.shown
        assert (first.run, first.neuron, first.repeats) == (each.run, each.neuron, None)


def test_equal_seeds_draw_equal_plans_and_other_seeds_others() -> None:
    assert draw(MadeUp(), SMALL).items == draw(MadeUp(), SMALL).items
    other = PlanConfig(n_neurons=12, n_examples=10, seed=1)
    assert draw(MadeUp(), SMALL).items != draw(MadeUp(), other).items


def test_a_neuron_with_too_few_examples_is_counted_and_not_rated() -> None:
    plan = draw(MadeUp(n_neurons=10), PlanConfig(n_neurons=60, n_examples=10))
    assert plan.silent == {"zzplain": 6, "zznormed": 6}  # 3 of each run
    studied = [each for each in plan.items if each.kind is Kind.STUDY and each.repeats is None]
    assert len(studied) == 2 * 2 * 7


def test_a_study_without_a_neuron_to_show_is_refused() -> None:
    with pytest.raises(UserError, match="no neuron of first has 10 examples"):
        draw(MadeUp(n_neurons=3), SMALL)


def test_every_person_sees_every_item_once_and_a_repeat_a_third_of_the_way_later() -> None:
    plan = draw(MadeUp(), PlanConfig(n_neurons=40, n_examples=10))
    seen = {name: order(plan.items, 0, name) for name in ("ann", "bob")}
    assert seen["ann"] != seen["bob"]
    for items in seen.values():
        assert sorted(items) == list(range(len(plan.items)))
        place = {item: at for at, item in enumerate(items)}
        gaps = [
            place[i] - place[each.repeats]
            for i, each in enumerate(plan.items)
            if each.repeats is not None
        ]
        assert min(gaps) > 0.25 * len(items)


def test_the_position_in_the_order_says_nothing_about_the_arm() -> None:
    """Over many persons, each arm's mean position is the middle: 400 orders leave a standard error below .01."""
    plan = draw(MadeUp(), SMALL)
    sums: dict[str, list[float]] = {}
    for number in range(400):
        for at, item in enumerate(order(plan.items, 0, f"p{number}")):
            each = plan.items[item]
            if each.repeats is None:
                sums.setdefault(f"{each.arm} {each.kind}", []).append(at / len(plan.items))
    means = [np.mean(of) for of in sums.values()]
    assert max(means) - min(means) < 0.1


# ---------------------------------------------------------------- planted neurons


def text() -> planted.Text:
    source = MadeUp()
    return planted.Text(
        each for neuron in source.neurons()[:80] for each in source.examples(neuron, "post", "top")
    )


def marked_rules(examples: list[Example]) -> Counter[str | None]:
    return Counter(planted.rule_of(each.tokens[each.at]) for each in examples)


@pytest.mark.parametrize("seed", range(5))
def test_one_rule_explains_every_firing_of_a_planted_neuron(seed: int) -> None:
    source, rng = MadeUp(), np.random.default_rng(seed)
    template = source.examples(source.neurons()[10], "post", "top")
    found = planted.of_one_rule(text(), template, rng)
    assert found
    rule, examples = found
    assert marked_rules(examples) == {rule: len(template)}
    largest = [each.activations[each.at] for each in examples]
    assert largest == [each.activations[each.at] for each in template]
    for each in examples:
        strong = [v > planted.BESIDE * each.activations[each.at] for v in each.activations]
        assert strong == [planted.rule_of(token) == rule for token in each.tokens]


@pytest.mark.parametrize("seed", range(5))
def test_no_rule_explains_more_than_a_third_of_a_neuron_of_four_rules(seed: int) -> None:
    source, rng = MadeUp(), np.random.default_rng(seed)
    template = source.examples(source.neurons()[10], "post", "top")
    found = planted.of_many_rules(text(), template, rng)
    assert found
    counts = marked_rules(found[1])
    assert len(counts) == 4
    assert max(counts.values()) <= len(template) / 3
    assert ", ".join(sorted(map(str, counts))) == ", ".join(sorted(found[0].split(", ")))


def test_no_token_follows_two_rules() -> None:
    tokens = [
        *MadeUp().words,
        " The",
        "((",
        " Is",
        "0",
        " a",
        " with",
        "\n\n",
        " If",
    ]
    for token in tokens:
        followed = [n for n, pattern in planted._PATTERNS.items() if pattern.match(token)]
        assert len(followed) <= 1, token


def test_text_without_a_rule_gives_no_planted_neuron() -> None:
    source = MadeUp(words=(" blue", " walk"))
    plan = draw(source, PlanConfig(n_neurons=12, n_examples=10, planted=0.5))
    assert {each.kind for each in plan.items} == {Kind.STUDY, Kind.UNTRAINED}


# ---------------------------------------------------------------- shades and texts


def test_shades_hide_the_size_of_the_activations() -> None:
    source = MadeUp()
    examples = source.examples(source.neurons()[10], "post", "top")
    for factor in (1e-6, 1e6):
        scaled = [
            Example(each.tokens, tuple(factor * value for value in each.activations), each.at)
            for each in examples
        ]
        assert snippets(scaled) == snippets(examples)


@pytest.mark.parametrize(
    ("value", "largest", "wanted"),
    [(-1, 2, 0), (0, 2, 0), (2, 2, N_SHADES), (1, 2, 5), (1e-9, 2, 1), (1, 0, 0), (math.nan, 2, 0)],
)
def test_shade_is_the_share_of_the_largest(value: float, largest: float, wanted: int) -> None:
    assert shade(value, largest) == wanted


def test_characters_that_cannot_be_seen_are_shown() -> None:
    assert visible("\n") == "\u21b5\n"
    assert visible("\t x") == "\u21e5\t x"
    assert visible("\x1b[2J") == "\\x1b[2J"
    assert visible("  ") == "\u2423\u2423"


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("n_neurons=0", "n_neurons=0 must be from 1 to 20000"),
        ("n_examples=5", "n_examples=5 must be from 10 to 50"),
        ("modes=[]", r"modes=\[\] names none: give modes=top or \[top,full\]"),
        ("modes=[tpo]", "no mode called 'tpo'. Did you mean 'top'?"),
        ("stages=[mid,mid]", "names one of them twice"),
        ("planted=2", "planted=2.0 must be from 0 to 0.5"),
        ("port=99999", "port=99999 must be from 0 to 65535"),
        ("seed=-1", "seed=-1 must be 0 or more"),
    ],
)
def test_a_setting_that_cannot_be_is_refused_in_one_line(word: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_typed(RatingConfig, [word])
    assert "\n" not in str(caught.value)


def test_an_unknown_arm_is_refused() -> None:
    with pytest.raises(UserError, match=r"no arm called 'zzplane'. Did you mean 'zzplain'\?"):
        draw(MadeUp(), PlanConfig(n_neurons=12, n_examples=10, arms=["zzplane"]))
