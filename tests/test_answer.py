"""The answer's sentences, on tables of typed verdicts: every branch, and the claims that no sentence may make."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pandas as pd
import pytest
from _records import LN, number

from soluscope.comparison.compare import Lineage, compare
from soluscope.report import answer, evidence, verdicts, words
from soluscope.report.findings import at_best_rate
from soluscope.results import (
    BOS_TOKENS,
    HIGH_GAIN,
    OUTPUT_SIZE,
    SCALED_SIZE,
    ChoicePoint,
    Comparison,
    Located,
    Part,
    Record,
    Setting,
    Step,
    Term,
    Verdict,
    Where,
    of_kind,
)

CHAIN = (
    Step("solu"),
    Step("solu_frozen_ln", "centring and one gain"),
    Step("solu_ln_det", "a per-token scale in the forward pass"),
    Step("solu_ln", "the gradient through the per-token scale"),
)
ARMS: list[Record] = [
    replace(LN, chain=CHAIN),
    replace(LN, arm="solu", variant="solu", role="plain", twin="", chain=CHAIN[:1]),
    replace(LN, arm="static", variant="solu_frozen_ln", role="static", twin="", chain=CHAIN[:2]),
]
BASE = Comparison(
    study="synthetic", term=Term.BENEFIT, arm="solu_ln", variant="solu_ln", against="solu", value=0.0,
    unit="nats / token", cluster="seed", n=8, n_clusters=8,
)  # fmt: skip
RATES = "7 rates from 0.0005 to 0.032"
NEEDLESS = "no per-token scale is needed"
"""The words of the only sentence that calls a per-token scale needless."""


def row(term: Term, value: float | None, half: float | None = 0.001, **fields: Any) -> Comparison:
    """Return a comparison with an interval of width 2 `half`; None: without an interval."""
    low, high = (None, None) if half is None or value is None else (value - half, value + half)
    return replace(BASE, term=term, value=value, low=low, high=high, **fields)


def static(value: float, half: float = 0.001, p_adj: float = 0.0078, **fields: Any) -> Comparison:
    return row(Term.STATIC, value, half, against="static", p_adj=p_adj, **fields)


def share(value: float | None, half: float | None = 0.05, **fields: Any) -> Comparison:
    return row(Term.SHARE, value, half, against="static", **fields)


def ratio(size: float) -> Record:
    """Return |o| / |r0| of the static arm."""
    return number(
        OUTPUT_SIZE, SCALED_SIZE, size, 0.1 * size, statistic="median", arm="static",
        run="static-s0", variant="solu_frozen_ln",
    )  # fmt: skip


def text(*records: Record) -> str:
    return words.answer([*ARMS, *records])


@pytest.mark.parametrize(
    ("records", "said"),
    [
        ([row(Term.BENEFIT, 0.03)], "The norm of solu_ln lowers the loss (8 seeds). How much of that needs a per-"),
        ([row(Term.BENEFIT, -0.03)], "The norm of solu_ln raises the loss (8 seeds): plain SoLU has the lower"),
        (
            [row(Term.BENEFIT, -0.002, verdict=Verdict.EQUIVALENT)],
            "The norm of solu_ln changes the loss by less than 0.005 nats (8 seeds): it is equivalent",
        ),
        ([row(Term.BENEFIT, 0.01, 0.02)], "do not settle whether LayerNorm lowers the loss (solu_ln): intervals"),
        ([row(Term.BENEFIT, 0.01, None, n=1)], "1 seed does not settle whether LayerNorm lowers the loss"),
        (
            [row(Term.BENEFIT, 0.03), static(0.02), share(0.6)],
            "lowers the loss (8 seeds), and the static arms trained here do not reach all of this (corrected p = "
            "0.0078). That does not yet show that a scale for each token is needed",
        ),
        ([row(Term.BENEFIT, 0.03), static(0.02, p_adj=0.2), share(0.6)], "It is not shown that the static arms"),
        (
            [row(Term.BENEFIT, 0.03), static(0.002, verdict=Verdict.EQUIVALENT), share(0.06, 0.01)],
            "The best static arm trained here misses some of it, but too little to matter.",
        ),
        ([row(Term.BENEFIT, 0.006), static(0.0), share(None)], ", but by too little to measure the share"),
        ([row(Term.BENEFIT, 0.03), static(0.01), share(0.3, None)], "No interval can be given for the share"),
        ([row(Term.BENEFIT, 0.03), static(0.0), share(0.01)], "It is not shown that the static arms miss any"),
        (
            [row(Term.BENEFIT, 0.03), static(-0.01), share(-0.3), ratio(0.5)],
            ", but a static gain lowers it more: no per-token scale is needed.",
        ),
        (
            [row(Term.BENEFIT, 0.03), static(-0.01), share(-0.3), ratio(30)],
            "lowers it more. But ln_final (the model's last LayerNorm) gives that static arm a scale",
        ),
        (
            [row(Term.BENEFIT, 0.03), static(-0.01), share(-0.3)],
            "lowers it more. It was not measured whether ln_final (the model's last LayerNorm) gives that",
        ),
        ([row(Term.BENEFIT, -0.03), static(-0.04), ratio(1)], "better than solu_ln, by 0.0400 [0.0390, 0.0410]"),
        ([row(Term.BENEFIT, -0.03), static(0.02)], "worse than solu_ln, by 0.0200 [0.0190, 0.0210]"),
        (
            [row(Term.BENEFIT, -0.03), static(0.0, verdict=Verdict.EQUIVALENT), ratio(200)],
            "The best static arm is as good as solu_ln. But ln_final (the model's last LayerNorm) gives that",
        ),
    ],
)  # fmt: skip
def test_the_tuned_loss_has_a_sentence_for_each_verdict(
    records: Sequence[Record], said: str
) -> None:
    assert said in text(*records)


def parts(
    whole: float, one_gain: float | None, scale: float, gradient: float | None, half: float = 0.001
) -> list[Record]:
    """Return the sensitivities of a chain, whose plain arm has .2, and their parts."""
    values = {Part.ALL: whole, Part.ONE_GAIN: one_gain, Part.SCALE: scale, Part.GRADIENT: gradient}
    rows: list[Record] = [
        row(
            Term.SENSITIVITY_PART, value, half, part=part, note=f"{RATES}; to {part}",
            against="static" if part is Part.SCALE and one_gain is not None else "solu",
            verdict=Verdict.EQUIVALENT if abs(value) + half < 0.005 else Verdict.DIFFERENT,
            adds="a per-token scale in the forward pass"
            + "; the gradient through the per-token scale" * (gradient is None),
        )
        for part, value in values.items()
        if value is not None
    ]  # fmt: skip
    rows += [
        row(Term.SENSITIVITY, 0.2, arm="solu", against="", note=f"{RATES}; best rate 0.001"),
        row(Term.SENSITIVITY, 0.2 - whole, against="", note=f"{RATES}; best rate 0.004"),
    ]
    return rows


@pytest.mark.parametrize(
    ("records", "said"),
    [
        (
            parts(0.15, 0.14, 0.008, 0.002),
            "LayerNorm widens the range of good learning rates in solu_ln (8 seeds, 7 rates from 0.0005 to 0.032, "
            "alpha 1): averaged over these rates its loss lies 0.0500 nats above that at its best rate, and that "
            "of solu 0.2000, 0.1500 [0.1490, 0.1510] less. Of the wider range, one gain for all tokens brings "
            "0.1400 [0.1390, 0.1410] (shown); a scale for each token brings 0.0080 [0.0070, 0.0090] (shown); the "
            "gradient through that scale brings 0.0020 [0.0010, 0.0030] (too little to matter). It was not "
            "measured whether ln_final gives static a scale for each token at these rates.",
        ),
        ([*parts(0.15, 0.14, 0.01, None), ratio(30)], "The part of the scale contains: a per-token scale in the"),
        ([*parts(0.15, 0.14, 0.01, None), ratio(30)], "so the part of one gain may contain it."),
        (parts(0.15, None, 0.15, None), "one gain for all tokens brings cannot be measured without a static arm"),
        (parts(0.15, 0.17, -0.02, None), "scale for each token brings -0.0200 [-0.0210, -0.0190] (it takes away)"),
        (parts(0.15, 0.15, 0.0, None, half=0.1), "(not settled)"),
        (parts(-0.1, -0.1, 0.0, 0.0), "LayerNorm narrows the range of good learning rates in solu_ln (8 seeds, 7"),
        (parts(0.001, 0.0, 0.001, 0.0), "LayerNorm leaves the range of good learning rates as it is in solu_ln"),
        (parts(0.1, 0.1, 0.0, 0.0, half=0.2), "It is not settled whether LayerNorm widens the range of good"),
    ],
)  # fmt: skip
def test_the_learning_rate_has_a_sentence_for_each_verdict(
    records: Sequence[Record], said: str
) -> None:
    assert said in text(row(Term.BENEFIT, -0.03), *records)


def test_robustness_without_an_interval_is_not_judged() -> None:
    found = [
        replace(each, low=None, high=None) if each.term is Term.SENSITIVITY_PART else each
        for each in of_kind(parts(0.15, 0.1, 0.05, 0.0), Comparison)
    ]
    assert (
        "It is not known for new seeds how LayerNorm changes the range of good learning rates"
        in text(*found)
    )


def test_robustness_belongs_to_the_first_sentences_and_the_first_tiles() -> None:
    records = [*ARMS, row(Term.BENEFIT, -0.03), static(0.0), *parts(0.15, 0.14, 0.01, 0.0)]
    tuned, robust = words.first_answer(records)
    assert tuned.startswith("The norm of solu_ln raises the loss")
    assert robust.startswith("LayerNorm widens the range of good learning rates")
    (tile,) = answer._rates(records)
    assert tile.value == "0.1500 nats"
    assert words.headline(records)[1].startswith(
        f"{robust} Of the wider range, one gain for all tokens"
    )


def test_arms_at_other_rates_and_scales_keep_their_sentence_on_the_learning_rate() -> None:
    """An arm of the line need not be at the best point of its surface, so the tuned records lack it."""
    elsewhere = [
        replace(each, matched=True) if isinstance(each, Setting) else each
        for each in [*ARMS, *parts(0.15, 0.14, 0.01, 0.0)]
    ]
    assert "widens the range" in words.answer(elsewhere)
    assert any("widens the range" in sentence for sentence in words.headline(elsewhere))


def located(verdict: Where, bos: Comparison | None = None, design: str = "") -> list[Record]:
    found = Located(
        study="synthetic", arm="solu_ln", variant="solu_ln", against="static", where=verdict, n=8,
        design=design,
    )  # fmt: skip
    return [found, *([] if bos is None else [replace(bos, design=design)])]


def at_bos(value: float, half: float = 0.001, verdict: Verdict | None = None) -> Comparison:
    return row(Term.WHERE, value, half, against="static", group=BOS_TOKENS, verdict=verdict)


@pytest.mark.parametrize("verdict", Where)
def test_each_place_has_its_sentence(verdict: Where) -> None:
    said = text(row(Term.BENEFIT, 0.03), *located(verdict), ratio(1))
    assert f"By token, solu_ln against static (8 seeds): {verdicts.PLACES[verdict]}" in said
    assert len(set(verdicts.PLACES.values())) == len(Where)


@pytest.mark.parametrize(
    ("bos", "said"),
    [
        (at_bos(0.3), "At BOS it loses 0.3000 [0.2990, 0.3010] nats more."),
        (at_bos(-0.3), "At BOS it loses 0.3000 [0.2990, 0.3010] nats less."),
        (at_bos(0.0, verdict=Verdict.EQUIVALENT), "At BOS the two are equivalent."),
        (at_bos(0.0, 0.1), "At BOS the difference is not settled."),
    ],
)
def test_bos_has_its_sentence(bos: Comparison, said: str) -> None:
    assert said in text(row(Term.BENEFIT, 0.03), *located(Where.HIGH_GAIN, bos))


def test_each_fixed_scale_of_the_output_has_its_verdicts() -> None:
    records = [
        row(Term.BENEFIT, -0.03), *located(Where.OPEN),
        row(Term.BENEFIT, 0.03, design="alpha matched"), static(0.02, design="alpha matched"),
        share(0.6, design="alpha matched"), *located(Where.DIFFUSE, at_bos(0.2), "alpha matched"),
    ]  # fmt: skip
    said = text(*records)
    fixed = said[said.index("With alpha matched to plain GELU's share of the stream: ") :]
    assert "the static arms trained here do not reach all of this" in fixed
    assert verdicts.PLACES[Where.DIFFUSE] in fixed
    assert "At BOS it loses 0.2000" in fixed
    assert "With alpha = 1" not in said
    assert verdicts.PLACES[Where.OPEN] in said[: said.index("With alpha matched")]


@pytest.mark.parametrize("size", [None, 4.0, 4.9, 30.0])
def test_no_sentence_calls_a_scale_needless_where_ln_final_supplies_one(size: float | None) -> None:
    """All combinations of typed verdicts; only a measured small |o| / |r0| allows such a sentence."""
    benefits = [
        row(Term.BENEFIT, x, verdict=v)
        for x, v in ((0.03, None), (-0.03, None), (0, Verdict.EQUIVALENT))
    ]
    statics = [static(0.0, verdict=Verdict.EQUIVALENT), static(-0.02), static(0.02)]
    shares = [share(-0.4), share(0.01), share(0.6), share(None)]
    size_of = [] if size is None else [ratio(size)]
    said = set()
    for benefit, beside, of_it, place in itertools.product(benefits, statics, shares, Where):
        for design in ("", "alpha 1"):
            rows = (replace(each, design=design) for each in (benefit, beside, of_it))
            said.add(
                text(*rows, *located(place, design=design), *parts(0.15, 0.15, 0.0, 0.0), *size_of)
            )
    # The interval of 4.9 reaches 5.4, and that of 4 reaches 4.4: below the threshold of 5.
    assert any(NEEDLESS in each for each in said) == (size == 4.0)
    as_good = [
        each for each in said if "static arm is as good" in each or "than at others." in each
    ]
    assert as_good
    assert all("ln_final" in each for each in as_good) == (size != 4.0)


@pytest.mark.parametrize("size", [None, 4.0, 4.9, 30.0])
def test_a_zero_at_high_gain_counts_only_where_ln_final_supplies_no_scale(
    size: float | None,
) -> None:
    records = [LN, *located(Where.NOT_HIGH_GAIN), *([] if size is None else [ratio(size)])]
    records.append(row(Term.WHERE, 0.0, group=HIGH_GAIN, verdict=Verdict.EQUIVALENT))
    (found,) = (seen for row, seen in evidence.matrix(records) if row.name.startswith("where:"))
    told = "inconsistent" if size == 4.0 else "not settled"
    assert found[0].verdicts[evidence.HYPOTHESES.index("H-smear")] == told
    assert any("ln_final" in each for each in found[0].observed) == (size != 4.0)


def test_a_rate_of_the_line_that_was_no_candidate_is_not_compared() -> None:
    """It was trained at the reported seeds only, so it is no point of the choice, and needs no warning."""

    def setting(arm: str, lr: float, family: str = "at 4e-5") -> Setting:
        return replace(LN, arm=arm, values={"lr": lr}, rate="was set by hand", family=family)

    point = ChoicePoint(
        study="synthetic", arm="best", variant="solu_ln", value=1.0, unit="nats", setting="lr", x=0.004,
        chosen_arm="best",
    )  # fmt: skip
    other = setting("other", 0.016, "at 41.94")
    records = [point, setting("best", 0.004), setting("line", 0.016), other]
    assert {each.arm for each in at_best_rate(records)} == {"best", "other"}
    (warning,) = words.untuned(records)
    assert "not tuned: other (the rate was set by hand)" in warning
    assert words.untuned(records[:-1]) == []


def chain_of(*names: str) -> tuple[Step, ...]:
    return tuple(Step(name, f"part {name}" if i else "") for i, name in enumerate(names))


VARIANTS = [step.variant for step in CHAIN]
LINEAGES = {
    name: Lineage(role, "", chain_of(*VARIANTS[: i + 1]))
    for i, (name, role) in enumerate(
        zip(VARIANTS, ("plain", "static", "per_token", "per_token"), strict=True)
    )
}
AT_RATES = {
    "solu": (3.0, 3.15, 3.3), "solu_frozen_ln": (3.1, 3.2, 3.25),
    "solu_ln_det": (3.1, 3.14, 3.19), "solu_ln": (3.2, 3.24, 3.29),
}  # fmt: skip
"""Losses at three rates: mean losses above the best of .15, .0833, .0433 and .0433 nats."""


def line_table(variants: Sequence[str] = VARIANTS, n_seeds: int = 3) -> pd.DataFrame:
    """Return losses on 30 equal documents along a line of rates, equal in all seeds."""
    return pd.DataFrame(
        {
            "run": f"{name}-lr{lr}-s{seed}", "arm": f"{name}-lr{lr}", "variant": name, "seed": seed,
            "split": split, "document": f"{split}{document:02d}", "loss_sum": 100 * loss, "n_tokens": 100,
            "config": name, "family": name, "d_model": 64, "d_mlp": 256, "n_layers": 1, "n_heads": 4,
            "ctx": 64, "tokens": 1e6, "lr": lr,
        }
        for name in variants
        for lr, loss in zip((0.001, 0.004, 0.016), AT_RATES[name], strict=True)
        for seed in range(n_seeds)
        for split in ("select", "report")
        for document in range(30)
    )  # fmt: skip


def of_ln(term: Term, variants: Sequence[str] = VARIANTS) -> list[Comparison]:
    records = compare("study", line_table(variants), "", LINEAGES, ())
    rows = (row for row in of_kind(records, Comparison) if row.term is term)
    return [row for row in rows if row.variant == "solu_ln"]


def test_parts_of_the_robustness_add_up_and_follow_the_roles() -> None:
    found = {each.part: each for each in of_ln(Term.SENSITIVITY_PART)}
    assert list(found) == list(Part)
    values = {part: each.value for part, each in found.items()}
    means = [sum(AT_RATES[name]) / 3 - AT_RATES[name][0] for name in VARIANTS]
    assert values[Part.ALL] == pytest.approx(means[0] - means[3], abs=1e-12)
    assert values[Part.ONE_GAIN] == pytest.approx(means[0] - means[1], abs=1e-12)
    assert values[Part.SCALE] == pytest.approx(means[1] - means[2], abs=1e-12)
    assert values[Part.GRADIENT] == pytest.approx(0, abs=1e-12)
    assert found[Part.GRADIENT].verdict is Verdict.EQUIVALENT
    assert found[Part.SCALE].verdict is Verdict.DIFFERENT
    assert found[Part.SCALE].step == ("solu_frozen_ln", "solu_ln_det")


def test_a_missing_arm_joins_the_parts_on_its_two_sides() -> None:
    without_det = {
        each.part: each
        for each in of_ln(Term.SENSITIVITY_PART, ["solu", "solu_frozen_ln", "solu_ln"])
    }
    assert list(without_det) == [Part.ALL, Part.ONE_GAIN, Part.SCALE]
    assert without_det[Part.SCALE].adds == "part solu_ln_det; part solu_ln"
    without_static = {each.part for each in of_ln(Term.SENSITIVITY_PART, ["solu", "solu_ln"])}
    assert without_static == {Part.ALL, Part.SCALE}
    assert not of_ln(Term.SENSITIVITY_PART, ["solu_frozen_ln", "solu_ln"])  # no plain arm


def test_a_benefit_within_the_margin_is_called_equivalent() -> None:
    """At the best rates, LN is worse than plain SoLU by .2; moved by that, the two are equal."""
    moved = line_table()
    moved.loc[moved["variant"] == "solu_ln", "loss_sum"] -= 0.2 * 100
    for table, verdict in ((line_table(), Verdict.DIFFERENT), (moved, Verdict.EQUIVALENT)):
        found = {
            each.verdict
            for each in of_kind(compare("study", table, "", LINEAGES, ()), Comparison)
            if (each.term, each.variant, each.lr) == (Term.BENEFIT, "solu_ln", None)
        }
        assert found == {verdict}
