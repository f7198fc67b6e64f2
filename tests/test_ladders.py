"""Ladders of a gain, an entropy penalty and a width: means over seeds, differences, and the page."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from _records import words
from scipy import stats as scipy_stats
from test_compare import LINEAGES, SIX, make_losses, terms

from soluscope.comparison.compare import compare
from soluscope.comparison.doses import doses
from soluscope.report import names
from soluscope.report.ladders import BEFORE, blocks
from soluscope.report.sections import build
from soluscope.results import (
    AtDose,
    ChoicePoint,
    Comparison,
    Ladder,
    Measurement,
    Record,
    Setting,
    Term,
    Untrained,
    of_kind,
)

GAINS = (1.0, 16.0, 316.0)
MAX_P = {1.0: 0.3, 16.0: 0.1, 316.0: 0.05}
LOSS = {1.0: 5.2, 16.0: 5.0, 316.0: 5.1}
SEEDS = range(3)
WOBBLE = (-0.01, 0.0, 0.02)
"""Added to the numbers of each seed."""


def setting(arm: str, variant: str = "solu_gain", role: str = "static", **values: float) -> Setting:
    known = {"d_model": 64.0, "d_mlp": 256.0, "lr": 0.001} | values
    return Setting(study="s", arm=arm, variant=variant, values=known, role=role, n=3)


def rows(
    arm: str, probe: str, quantity: str, statistic: str, value: float, variant: str = "solu_gain"
) -> list[Record]:
    """Return a number of each seed, and the number .5 before training."""
    found: list[Record] = []
    for seed, more in zip(SEEDS, WOBBLE, strict=True):
        about: dict[str, Any] = {
            "study": "s", "run": f"{arm}-s{seed}", "arm": arm, "variant": variant, "seed": seed, "probe": probe,
            "quantity": quantity, "statistic": statistic, "stream": "natural", "unit": "unit",
        }  # fmt: skip
        found += [
            Measurement(**about, value=value + more, low=value, high=value + 1),
            Untrained(**about, value=0.5, difference=value + more - 0.5),
        ]
    return found


def gains() -> list[Record]:
    """Return three gains with a loss, a largest p and a kurtosis, and arms that belong to no ladder of a gain."""
    records: list[Record] = [
        words("engagement"),
        words("neuron_statistics"),
        setting("solu", "solu", "plain"),
        setting("solu_ln", "solu_ln", "per_token", kappa=41.94),
        setting("solu_gain-p", gain=16.0, entropy_penalty=-0.1, role="other"),
    ]
    for gain in GAINS:
        arm = f"solu_gain-{gain:g}"
        records.append(setting(arm, gain=gain, lr=0.001 * gain))
        records += rows(arm, "loss", "loss", "mean", LOSS[gain])[::2]  # losses have no twin
        records += rows(arm, "engagement", "max_p", "median", MAX_P[gain])
        records += rows(arm, "neuron_statistics", "excess kurtosis: mid", "", 10 / gain)
        records += [
            replace(row, value=0.0) for row in rows(arm, "engagement", "r", "median", 0.0)
        ]  # not drawn
    return records


def find(records: list[AtDose], **fields: Any) -> AtDose:
    (found,) = (row for row in records if all(getattr(row, k) == v for k, v in fields.items()))
    return found


def test_a_number_at_a_dose_is_the_mean_over_seeds_with_students_interval() -> None:
    row = find(doses(gains()), quantity="max_p", x=16.0, untrained=False, since=None)
    by_seed = 0.1 + np.array(WOBBLE)
    half = scipy_stats.t.ppf(0.975, 2) * scipy_stats.sem(by_seed)
    assert (row.setting, row.n, row.proxy) == (Ladder.GAIN, 3, False)
    assert (row.value, row.low, row.high) == pytest.approx(
        (by_seed.mean(), by_seed.mean() - half, by_seed.mean() + half)
    )


def test_differences_from_the_smallest_gain_are_paired_by_seed() -> None:
    found = doses(gains())
    row = find(found, quantity="loss", x=316.0, since=1.0)
    assert (row.value, row.low, row.high) == pytest.approx(
        (-0.1, -0.1, -0.1)
    )  # the seeds' wobble cancels
    assert not [row for row in found if row.since == row.x]
    without = [each for each in gains() if getattr(each, "run", "") != "solu_gain-1-s2"]
    assert find(doses(without), quantity="loss", x=316.0, since=1.0).n == 2


def test_the_twin_before_training_and_the_proxies_are_marked() -> None:
    found = doses(gains())
    twin = find(found, quantity="max_p", x=1.0, untrained=True)
    assert (twin.value, twin.since) == (0.5, None)
    assert not [row for row in found if row.untrained and row.quantity == "loss"]
    assert {row.quantity for row in found if row.proxy} == {"excess kurtosis: mid"}


def test_a_rate_that_was_not_chosen_and_too_few_doses_are_left_out() -> None:
    passed = ChoicePoint(study="s", arm="solu_gain-316", chosen_arm="solu_gain-x", setting="lr", x=1.0, value=5.0,
                         unit="nats", cluster="seed")  # fmt: skip
    assert doses([*gains(), passed]) == []


def penalties(variant: str = "solu", **values: float) -> list[Record]:
    records: list[Record] = [words("engagement")]
    for weight in (0.0, -0.1, 0.1, 0.3):
        arm, more = f"{variant}-{weight:g}", {"entropy_penalty": weight} if weight else {}
        records.append(setting(arm, variant, "other" if weight else "plain", **values, **more))
        records += rows(arm, "engagement", "exp_entropy", "median", 50 + 100 * weight, variant)
    return records


def test_penalties_are_compared_with_no_penalty() -> None:
    found = [row for row in doses(penalties()) if row.since is not None]
    assert {row.setting for row in found} == {Ladder.ENTROPY}
    assert {(row.x, row.since): round(row.value, 6) for row in found} == {
        (-0.1, 0.0): -10.0, (0.1, 0.0): 10.0, (0.3, 0.0): 30.0,
    }  # fmt: skip


def test_gains_with_a_penalty_each_form_ladders_of_their_own() -> None:
    """Two gains with four penalties each: two ladders, which the gain distinguishes; no ladder of two gains."""
    low, high = penalties("solu_gain", gain=4.0), penalties("solu_gain", gain=64.0)  # words twice
    moved = [replace(each, arm=f"{each.arm}-64") for each in high]
    found = doses([*low, *moved])
    assert {row.setting for row in found} == {Ladder.ENTROPY}
    assert {row.fixed for row in found} == {"gain 4", "gain 64"}
    assert len(found) == len(set(found)) == 2 * (4 + 4 + 3)  # trained, before training, differences


def widths() -> list[Record]:
    """Return three widths of solu_ln at two kappas, and of a twin whose measured gain differs by width."""
    records: list[Record] = []
    for i, d_mlp in enumerate((256.0, 1024.0, 4096.0)):
        for kappa in (4e-5, 41.94):
            arm = f"solu_ln-{kappa}-{d_mlp:g}"
            records.append(setting(arm, "solu_ln", "per_token", d_mlp=d_mlp, kappa=kappa))
            records += rows(arm, "loss", "loss", "mean", 5 - i, "solu_ln")[::2]
        arm = f"twin-{d_mlp:g}"
        records.append(
            setting(arm, "solu_frozen_ln", d_mlp=d_mlp, gain=50.0 * d_mlp, matched_kappa=41.94)
        )
        records += rows(arm, "loss", "loss", "mean", 5 - i, "solu_frozen_ln")[::2]
    return records


def test_widths_of_one_kappa_form_a_ladder_and_a_matched_gain_is_no_setting() -> None:
    found = [row for row in doses(widths()) if row.since is None]
    assert {(row.variant, row.fixed) for row in found if row.setting is Ladder.WIDTH} == {
        ("solu_ln", "kappa 4e-05"), ("solu_ln", "kappa 41.94"), ("solu_frozen_ln", ""),
    }  # fmt: skip
    assert sorted({row.x for row in found}) == [256.0, 1024.0, 4096.0]


# --- the comparison -------------------------------------------------------------------------------


def test_an_arm_with_a_penalty_is_compared_but_stands_for_no_role() -> None:
    """The penalised arms are the best of all: without this rule, they would be the plain and the static arm."""
    means = SIX | {"solu-p": 2.5, "solu_gain-p": 2.4, "solu_ln-p": 2.3}
    penalised = {arm: {"entropy_penalty": 0.1} for arm in means if arm.endswith("-p")}
    losses = make_losses(means, n_seeds=4, settings=penalised)
    records = compare("s", losses, "abc", LINEAGES)
    for term in (Term.BENEFIT, Term.STATIC, Term.STEP, Term.SHARE):
        assert not [row for row in terms(records, term) if "-p" in row.arm + row.against]
    differences = terms(records, Term.DIFFERENCE)
    assert {row.arm for row in differences} >= {"solu-p", "solu_gain-p", "solu_ln-p"}
    assert not [row for row in differences if row.against.endswith("-p")]
    roles = {each.arm: each.role for each in of_kind(records, Setting)}
    assert (roles["solu"], roles["solu-p"]) == ("plain", "other")


# --- the page -------------------------------------------------------------------------------------


def panels(section: Any, plot: int = 0) -> dict[str, list[Any]]:
    """Return the traces with values of each panel of a figure, by the panel's title."""
    figure = section.plots[plot].figure
    titles = [each.text for each in figure.layout.annotations]
    axes = ["x" if i == 0 else f"x{i + 1}" for i in range(len(titles))]
    return {
        title.replace("<br>", " "): [t for t in figure.data if (t.xaxis or "x") == axis and t.name]
        for title, axis in zip(titles, axes, strict=True)
    }


def section_of(records: list[Record], name: str) -> Any:
    (section,) = (each for each in build([*records, *doses(records)]) if each.name == name)
    return section


def test_the_gain_section_draws_each_number_its_twin_and_the_trade_off() -> None:
    section = section_of(gains(), "gain")
    found = panels(section)
    assert list(found) == ["loss", "max_p", "excess kurtosis: mid (proxy)"]
    drawn = {trace.name: trace for trace in found["max_p"]}
    assert [*drawn["solu_gain"].x] == [*GAINS]
    assert [*drawn["solu_gain"].y] == pytest.approx([MAX_P[x] + np.mean(WOBBLE) for x in GAINS])
    assert [*drawn[BEFORE].y] == [0.5] * 3
    assert len(found["loss"]) == 1
    (trade,) = panels(section, 1)["excess kurtosis: mid"]
    assert [*trade.customdata] == ["1", "16", "316"]
    assert [*trade.y] == pytest.approx([LOSS[x] + np.mean(WOBBLE) for x in GAINS])
    assert [*trade.x] == pytest.approx([10 / x + np.mean(WOBBLE) for x in GAINS])
    sentence = section.blocks[0].items[0]
    assert sentence.startswith(
        "solu_gain: from gain 1 to 316 (3 seeds), these numbers change by: loss -0.1 ["
    )
    assert "excess kurtosis: mid (a proxy)" in sentence
    assert "The loss is least at gain 16: 5.0033 [" in sentence


def test_penalties_are_equally_far_apart_on_their_axis() -> None:
    section = section_of(penalties(), "entropy")
    axis = section.plots[0].figure.layout.xaxis
    assert (axis.type, [*axis.ticktext]) == ("linear", ["-0.1", "0", "0.1", "0.3"])
    (trace, _) = panels(section)["exp_entropy"]
    assert [*trace.x] == [0, 1, 2, 3]
    assert len(section.plots) == 1  # without a loss and a proxy there is no trade-off


def test_the_width_section_draws_losses_minus_the_baseline() -> None:
    records = widths()
    for d_mlp in (256.0, 1024.0, 4096.0):
        base = setting(f"gelu-{d_mlp:g}", "gelu", "baseline", d_mlp=d_mlp)
        arm = f"solu_ln-41.94-{d_mlp:g}"
        records += [base, *(
            Comparison(study="s", term=Term.DIFFERENCE, arm=arm, variant="solu_ln", against=base.arm, n=3,
                       cluster=cluster, value=-d_mlp, low=-d_mlp - 1, high=-d_mlp + 1, unit="nats")
            for cluster in ("seed", "document")
        )]  # fmt: skip
    found = panels(section_of(records, "width"))
    assert list(found) == ["loss", "loss minus the baseline"]
    (trace,) = found["loss minus the baseline"]
    assert (trace.name, [*trace.y]) == ("solu_ln, kappa 41.94", [-256.0, -1024.0, -4096.0])


def test_without_three_doses_there_is_no_section() -> None:
    few = [each for each in gains() if each.arm != "solu_gain-316"]
    assert blocks([*few, *doses(few)], Ladder.GAIN) == []


def test_arms_with_a_penalty_are_named_by_it() -> None:
    settings: Mapping[str, Setting] = {
        each.arm: replace(each, label="SoLU")
        for each in of_kind(penalties("solu_gain", gain=4.0), Setting)
    }
    changed = [
        replace(each, role="static") if each.role == "plain" else each for each in settings.values()
    ]
    found = names.arms(changed)
    assert found["solu_gain-0"] == "SoLU, static gain"
    assert found["solu_gain-0.3"] == "SoLU, entropy penalty 0.3"
    assert {each.variant for each in names.named(changed)} == {"SoLU, static gain"}
