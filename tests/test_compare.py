"""Comparisons of variants, from losses whose differences are known."""

from __future__ import annotations

import json
import math
from dataclasses import fields, replace

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from conftest import tiny_config

from soluscope.comparison import stats
from soluscope.comparison.compare import SETTINGS, Lineage, choices, confirm
from soluscope.comparison.compare import compare as compare_with
from soluscope.config import to_yaml
from soluscope.errors import UserError
from soluscope.evaluation.suite import _lineages, _settings
from soluscope.report import findings
from soluscope.report.words import _optimism, unchosen
from soluscope.results import (
    ChoicePoint,
    Comparison,
    Grid,
    Measurement,
    NoChoice,
    Record,
    ScalingCurve,
    Setting,
    Step,
    Term,
    Untrained,
    Verdict,
    of_kind,
)
from soluscope.runs.folder import Run
from soluscope.runs.weights import Facts

pytestmark = pytest.mark.arithmetic

N_DOCUMENTS = 40
ALIKE = {
    "d_model": 64, "d_mlp": 256, "n_layers": 1, "n_heads": 4, "ctx": 64, "tokens": 1_843_200,
    "lr": 0.002, "kappa": np.nan, "gain": np.nan,
}  # fmt: skip
"""Settings that all arms of a study share, unless a test sets others."""


def make_losses(
    arms: dict[str, float],
    n_seeds: int = 8,
    select: dict[str, float] | None = None,
    seed_noise: float = 0.0005,
    document_noise: float = 0.0,
    worse: dict[str, float] | None = None,
    settings: dict[str, dict[str, float | str]] | None = None,
) -> pd.DataFrame:
    """Return losses with the given mean per token for each arm, and noise per seed.

    An arm is named `variant` or `variant-more`. `worse` is added to the losses of single runs. `settings`
    holds the settings of arms that differ from `ALIKE`.
    """
    random = np.random.default_rng(0)
    counts = {split: random.integers(50, 200, N_DOCUMENTS) for split in ("select", "report")}
    document_level = random.normal(size=N_DOCUMENTS)
    rows = []
    for arm, mean in arms.items():
        for seed in range(n_seeds):
            for split in ("select", "report"):
                level = (select or arms)[arm] if split == "select" else mean
                level += (worse or {}).get(f"{arm}-s{seed}", 0.0)
                per_token = level + seed_noise * random.normal() + document_level
                per_token = per_token + document_noise * random.normal(size=N_DOCUMENTS)
                rows += [
                    {
                        "run": f"{arm}-s{seed}",
                        "arm": arm,
                        "variant": arm.split("-")[0],
                        "seed": seed,
                        "split": split,
                        "document": f"{split}{i:03d}",
                        "loss_sum": per_token[i] * counts[split][i],
                        "n_tokens": counts[split][i],
                        "config": f"hash of {arm}",
                        "family": arm,
                        **ALIKE,
                        **(settings or {}).get(arm, {}),
                    }
                    for i in range(N_DOCUMENTS)
                ]
    return pd.DataFrame(rows)


def chain(*variants: str) -> tuple[Step, ...]:
    """Return a chain in which each variant adds a step to the previous variant."""
    return tuple(Step(name, f"what {name} adds" if i else "") for i, name in enumerate(variants))


LINEAGES = {
    "gelu": Lineage("baseline", "", chain("gelu")),
    "gelu_ln": Lineage("baseline", "", chain("gelu", "gelu_ln")),
    "solu": Lineage("plain", "", chain("solu")),
    "solu_gain": Lineage("static", "", chain("solu", "solu_gain")),
    "solu_frozen_ln": Lineage("static", "", chain("solu", "solu_gain", "solu_frozen_ln")),
    "solu_ln": Lineage(
        "per_token", "solu_frozen_ln", chain("solu", "solu_gain", "solu_frozen_ln", "solu_ln")
    ),
}
"""Stated here, since the comparison uses only these fields of a variant."""


def compare(study: str, losses: pd.DataFrame, commit: str, **more: Lineage) -> list[Record]:
    """Compare with `LINEAGES` and with the lineages of further variants, by name."""
    return compare_with(study, losses, commit, LINEAGES | more)


SIX = {
    "gelu": 3.00,
    "gelu_ln": 3.01,
    "solu": 3.10,
    "solu_ln": 3.02,
    "solu_frozen_ln": 3.04,
    "solu_gain": 3.06,
}


def find(records, term, cluster="seed", lr=None, **fields):
    """Return the only comparison of `term` that has these fields."""
    (record,) = (
        each
        for each in terms(records, term)
        if (each.cluster, each.lr) == (cluster, lr)
        and all(getattr(each, key) == value for key, value in fields.items())
    )
    return record


def terms(records, *wanted):
    """Return the comparisons of these terms."""
    return [each for each in of_kind(records, Comparison) if each.term in wanted]


def curve_points(records, setting):
    """Return the points of the curves on which a setting was chosen."""
    return [each for each in of_kind(records, ChoicePoint) if each.setting == setting]


def test_loss_of_an_arm_is_the_mean_over_its_seeds():
    losses = make_losses(SIX)
    row = find(compare("study", losses, "abc"), Term.LOSS, arm="solu")
    report = losses[(losses.arm == "solu") & (losses.split == "report")]
    sums = report.groupby("seed")[["loss_sum", "n_tokens"]].sum()
    per_seed = sums.loss_sum / sums.n_tokens
    low, high = scipy.stats.t.interval(0.95, 7, per_seed.mean(), scipy.stats.sem(per_seed))
    assert row.value == pytest.approx(per_seed.mean())
    assert (row.low, row.high) == pytest.approx((low, high))
    assert (row.n, row.study, row.commit, row.config) == (8, "study", "abc", "hash of solu")


def test_every_arm_is_compared_with_gelu_with_solu_and_with_solu_ln():
    rows = compare("study", make_losses(SIX), "abc")
    pairs = {(row.arm, row.against, row.cluster) for row in terms(rows, Term.DIFFERENCE)}
    assert len(pairs) == 3 * 2 * 5
    row = find(rows, Term.DIFFERENCE, arm="solu_gain", against="gelu")
    assert row.value == pytest.approx(0.06, abs=0.001)
    assert row.low < row.value < row.high
    assert "sign-flip p = 0.00781" in row.note
    fixed = find(rows, Term.DIFFERENCE, "document", arm="solu_gain", against="gelu")
    assert fixed.value == pytest.approx(row.value)
    assert (row.n_clusters, fixed.n_clusters) == (8, N_DOCUMENTS)


def test_the_interval_for_trained_models_is_narrower_than_the_one_for_new_seeds():
    rows = compare(
        "study", make_losses(SIX, n_seeds=2, seed_noise=0.01, document_noise=0.01), "abc"
    )
    new, fixed = find(rows, Term.BENEFIT), find(rows, Term.BENEFIT, "document")
    assert new.low < fixed.low < fixed.high < new.high


def test_only_seeds_that_both_arms_have_are_compared():
    losses = make_losses(SIX, n_seeds=4)
    losses = losses[(losses.arm != "solu_ln") | (losses.seed >= 1)]
    row = find(compare("study", losses, "abc"), Term.BENEFIT)
    assert row.n == 3
    assert [row.n for row in terms(compare("study", losses, "abc"), Term.LOSS)].count(4) == 5


def test_phi_dyn_is_the_share_that_was_put_in():
    rows = compare("study", make_losses(SIX), "abc")
    row = find(rows, Term.SHARE)
    assert row.value == pytest.approx(0.02 / 0.08, abs=0.02)
    assert row.low < 0.25 < row.high
    assert row.high - row.low < 0.05
    assert "seeds and documents resampled; Fieller's is 0.2" in row.note
    assert find(rows, Term.BENEFIT).value == pytest.approx(0.08, abs=0.001)
    assert find(rows, Term.STATIC).value == pytest.approx(0.02, abs=0.001)
    assert find(rows, Term.STATIC).verdict is Verdict.DIFFERENT
    assert find(rows, Term.STATIC).note.startswith("different: farther than 0.005 nats")


def test_the_primary_family_is_corrected_for_every_solu_ln_arm():
    # One arm is better than the static arm at all eight seeds; the other is as good as the static arm.
    arms = {"solu": 3.1, "solu_gain": 3.06, "solu_ln-k42": 3.02, "solu_ln-k0": 3.0601}
    rows = compare("study", make_losses(arms), "abc")
    p = {name: find(rows, Term.STATIC, arm=name).p for name in ("solu_ln-k42", "solu_ln-k0")}
    assert p["solu_ln-k42"] == 2 / 256
    assert p["solu_ln-k0"] > 0.05
    for term in (Term.STATIC, Term.SHARE):
        for name in p:
            row = find(rows, term, arm=name)
            assert row.p == p[name]
            assert row.p_adj == pytest.approx(stats.holm(p)[name])
        assert find(rows, term, arm="solu_ln-k42").p_adj == pytest.approx(4 / 256)
    note = find(rows, Term.SHARE, arm="solu_ln-k42").note
    assert "sign-flip p of its numerator = 0.00781; Holm-adjusted p = 0.0156 over 2 arms" in note


def test_an_undefined_phi_dyn_has_no_p_and_its_numerator_stays_in_the_family():
    arms = {"solu": 3.03, "solu_gain": 3.06, "solu_ln-k42": 3.02, "solu_ln-k0": 3.04}
    rows = compare("study", make_losses(arms), "abc")
    undefined = find(rows, Term.SHARE, arm="solu_ln-k0")
    assert (undefined.value, undefined.p, undefined.p_adj) == (None, None, None)
    assert find(rows, Term.SHARE, arm="solu_ln-k42").p_adj == pytest.approx(4 / 256)
    assert find(rows, Term.STATIC, arm="solu_ln-k0").p_adj == pytest.approx(4 / 256)


def test_p_is_of_differences_over_seeds_and_of_nothing_else():
    rows = of_kind(compare("study", make_losses(SIX), "abc"), Comparison)
    assert find(rows, Term.DIFFERENCE, arm="solu", against="gelu").p == 2 / 256
    assert find(rows, Term.BENEFIT).p == 2 / 256
    assert {row.p for row in rows if row.cluster != "seed" or row.term is Term.LOSS} == {None}
    adjusted = {row.term for row in rows if row.p_adj is not None}
    assert adjusted == {Term.STATIC, Term.SHARE}
    one_seed = of_kind(compare("study", make_losses(SIX, n_seeds=1), "abc"), Comparison)
    assert {(row.p, row.p_adj) for row in one_seed} == {(None, None)}


def test_phi_dyn_of_few_seeds_has_fiellers_interval():
    row = find(compare("study", make_losses(SIX, n_seeds=3), "abc"), Term.SHARE)
    assert row.note.startswith("Fieller's interval: 3 seeds are too few to resample")
    assert row.low < 0.25 < row.high


@pytest.mark.parametrize(
    ("changes", "n_seeds", "why"),
    [
        ({"solu": 2.95}, 8, "the plain arm is better"),
        ({"solu": 3.0201}, 8, "the interval contains 0"),
        ({"solu": 3.0245}, 8, "the lower bound is not above 0.005 nats"),
        ({}, 1, "with one seed, which gives no interval for new seeds"),
    ],
)
def test_phi_dyn_is_undefined_where_there_is_no_gain(changes, n_seeds, why):
    rows = compare("study", make_losses(SIX | changes, n_seeds=n_seeds), "abc")
    row = find(rows, Term.SHARE)
    assert row.value is None
    assert (row.low, row.high) == (None, None)
    assert row.verdict is Verdict.UNDEFINED
    assert row.note.startswith("undefined, because no benefit of LN is established")
    assert why in row.note
    assert find(rows, Term.STATIC).value == pytest.approx(0.02, abs=0.002)


def test_two_seeds_that_differ_do_not_establish_a_gain():
    losses = make_losses(SIX, n_seeds=2, worse={"solu-s1": 0.03})
    rows = compare("study", losses, "abc")
    assert find(rows, Term.BENEFIT, "document").low > 0.05
    assert "the interval contains 0" in find(rows, Term.SHARE).note


def test_equal_static_arm_is_called_equivalent():
    rows = compare("study", make_losses(SIX | {"solu_gain": 3.0201}), "abc")
    assert find(rows, Term.STATIC).verdict is Verdict.EQUIVALENT
    assert find(rows, Term.STATIC).note.startswith("equivalent: closer than 0.005 nats")


def test_the_static_arm_is_chosen_on_select_even_where_report_disagrees():
    arms = SIX | {"solu_gain-c4": 3.05, "solu_gain-c79": 3.00}
    select = arms | {"solu_gain-c4": 3.01, "solu_gain-c79": 3.09}
    rows = compare("study", make_losses(arms, select=select), "abc")
    row = find(rows, Term.STATIC)
    assert row.value == pytest.approx(0.03, abs=0.001)
    assert row.against == "solu_gain-c4"
    assert row.choice.startswith("solu_gain-c4, chosen on the select split: ")
    assert "solu_gain-c79 (3." in row.choice


def test_every_solu_ln_arm_has_its_own_contrasts():
    arms = {"solu": 3.1, "solu_gain": 3.06, "solu_ln-k42": 3.02, "solu_ln-k0": 3.04}
    rows = compare("study", make_losses(arms), "abc")
    assert find(rows, Term.BENEFIT, arm="solu_ln-k42").value == pytest.approx(0.08, abs=0.001)
    assert find(rows, Term.BENEFIT, arm="solu_ln-k0").value == pytest.approx(0.06, abs=0.001)
    assert find(rows, Term.SHARE, arm="solu_ln-k42").value == pytest.approx(0.5, abs=0.02)
    assert find(rows, Term.SHARE, arm="solu_ln-k0").value == pytest.approx(1 / 3, abs=0.02)


@pytest.mark.parametrize(
    ("missing", "steps"),
    [
        ((), ["solu solu_gain", "solu_gain solu_frozen_ln", "solu_frozen_ln solu_det", "solu_det solu_ln"]),
        (("solu_det",), ["solu solu_gain", "solu_gain solu_frozen_ln", "solu_frozen_ln solu_ln"]),
        (("solu_det", "solu_gain"), ["solu solu_frozen_ln", "solu_frozen_ln solu_ln"]),
        (("solu_det", "solu_gain", "solu_frozen_ln"), ["solu solu_ln"]),
    ],
)  # fmt: skip
def test_steps_along_the_chain_sum_to_the_benefit_of_ln_over_the_members_there_are(missing, steps):
    """A variant with a per-token norm may be a step in the chain of another such variant."""
    long = chain("solu", "solu_gain", "solu_frozen_ln", "solu_det", "solu_ln")
    lineages = {
        "solu_ln": Lineage("per_token", "solu_frozen_ln", long),
        "solu_det": Lineage("per_token", "", long[:-1]),
    }
    arms = {name: loss for name, loss in (SIX | {"solu_det": 3.03}).items() if name not in missing}
    rows = compare("study", make_losses(arms, document_noise=0.1), "abc", **lineages)
    made = [row for row in terms(rows, Term.STEP) if row.arm == "solu_ln"]
    assert [" ".join(row.step) for row in made] == steps
    assert [row.against for row in made] == [step.split()[0] for step in steps]
    assert sum(row.value for row in made) == pytest.approx(
        find(rows, Term.BENEFIT, arm="solu_ln").value, abs=1e-12
    )
    added = [row.adds.split("; ") for row in made]
    assert [name for names in added for name in names] == [step.adds for step in long[1:]]
    assert [names[-1] for names in added] == [f"what {step.split()[1]} adds" for step in steps]


def test_missing_arms_leave_their_records_out():
    rows = compare("study", make_losses({"gelu": 3.0, "solu": 3.1}), "abc")
    assert {row.term for row in of_kind(rows, Comparison)} == {Term.LOSS, Term.DIFFERENCE}
    rows = compare("study", make_losses({"solu_ln": 3.0}), "abc")
    assert {row.term for row in of_kind(rows, Comparison)} == {Term.LOSS}


# ---------------------------------------------------------------- roles

WITHOUT_GELU_LN = {name: loss for name, loss in SIX.items() if name != "gelu_ln"}


def test_a_new_static_variant_can_be_the_best_static_arm():
    rows = compare("study", make_losses(WITHOUT_GELU_LN), "abc")
    before = find(rows, Term.STATIC)
    assert (before.value, before.verdict) == (pytest.approx(0.02, abs=0.001), Verdict.DIFFERENT)
    assert find(rows, Term.SHARE).value == pytest.approx(0.25, abs=0.01)

    scalar = Lineage("static", "", chain("solu", "solu_scalar"))
    arms = WITHOUT_GELU_LN | {"solu_scalar": 3.02}
    rows = compare("study", make_losses(arms), "abc", solu_scalar=scalar)
    after = find(rows, Term.STATIC)
    assert (after.value, after.verdict) == (pytest.approx(0, abs=0.001), Verdict.EQUIVALENT)
    assert find(rows, Term.SHARE).value == pytest.approx(0, abs=0.01)
    assert (after.against, find(rows, Term.SHARE).against) == ("solu_scalar", "solu_scalar")
    assert after.choice.startswith("solu_scalar, chosen on the select split: ")


RMS = {
    "solu_frozen_rms": Lineage("static", "", chain("solu", "solu_frozen_rms")),
    "solu_rms": Lineage(
        "per_token", "solu_frozen_rms", chain("solu", "solu_frozen_rms", "solu_rms")
    ),
}


def test_a_second_per_token_variant_has_its_own_gain_static_arm_and_chain():
    arms = SIX | {"solu_frozen_rms": 3.07, "solu_rms": 3.05}
    rows = compare("study", make_losses(arms), "abc", **RMS)
    assert find(rows, Term.BENEFIT, arm="solu_rms").value == pytest.approx(0.05, abs=0.001)
    # The best static arm is chosen from all chains.
    static = find(rows, Term.STATIC, arm="solu_rms")
    assert static.value == pytest.approx(-0.01, abs=0.001)
    assert static.against == "solu_frozen_ln"
    steps = {arm: [row.step for row in terms(rows, Term.STEP) if row.arm == arm] for arm in arms}
    assert steps["solu_rms"] == [("solu", "solu_frozen_rms"), ("solu_frozen_rms", "solu_rms")]
    assert len(steps["solu_ln"]) == 3
    references = {row.against for row in terms(rows, Term.DIFFERENCE)}
    assert references == {"gelu", "solu", "solu_ln", "solu_rms"}
    primary = [row for row in terms(rows, Term.STATIC) if row.p_adj is not None]
    assert {row.arm for row in primary} == {"solu_ln", "solu_rms"}

    probed = [row for arm in arms for row in trained(arm, [1.0] * 3)]
    found = {row.arm for row in confirm([*probed, *rows], {"specificity": "A"})}
    assert found == {"solu_ln", "solu_rms"}


def test_the_reference_is_the_best_baseline_that_has_none_before_it():
    relu = Lineage("baseline", "", chain("relu"))
    rows = compare("study", make_losses(SIX | {"relu": 2.99, "gelu_ln": 2.9}), "abc", relu=relu)
    assert {row.against for row in terms(rows, Term.DIFFERENCE)} == {"relu", "solu", "solu_ln"}


def test_the_gain_is_over_the_plain_arm_at_the_root_of_the_arms_own_chain():
    lineages = {
        "sharp": Lineage("plain", "", chain("sharp")),
        "sharp_ln": Lineage("per_token", "", chain("sharp", "sharp_ln")),
    }
    arms = SIX | {"sharp": 3.3, "sharp_ln": 3.1}
    rows = compare("study", make_losses(arms), "abc", **lineages)
    assert find(rows, Term.BENEFIT, arm="sharp_ln").against == "sharp"
    assert find(rows, Term.BENEFIT, arm="sharp_ln").value == pytest.approx(0.2, abs=0.001)
    assert find(rows, Term.BENEFIT, arm="solu_ln").against == "solu"


def test_rows_do_not_depend_on_the_order_of_the_losses():
    losses = make_losses(SIX, n_seeds=2)
    shuffled = losses.sample(frac=1, random_state=1)
    assert compare("study", losses, "abc") == compare("study", shuffled, "abc")


def test_a_run_on_other_documents_is_named():
    losses = make_losses(SIX, n_seeds=2)
    other = (losses.run == "gelu_ln-s1") & (losses.document == "report003")
    with pytest.raises(UserError, match="run 'gelu_ln-s1' was not measured on the same documents"):
        compare("study", losses[~other], "abc")
    fewer_tokens = losses.assign(n_tokens=losses.n_tokens - other)
    with pytest.raises(UserError, match="'gelu_ln-s1'"):
        compare("study", fewer_tokens, "abc")


def test_two_runs_of_one_arm_and_seed_are_refused():
    losses = make_losses({"solu": 3.0}, n_seeds=1)
    twice = pd.concat([losses, losses.assign(run="solu-s0-again")])
    with pytest.raises(UserError, match="second run of arm 'solu' with seed 0"):
        compare("study", twice, "abc")


def test_a_missing_split_is_named():
    losses = make_losses({"solu": 3.0}, n_seeds=1)
    with pytest.raises(UserError, match="lacks the select or the report split"):
        compare("study", losses[losses.split == "report"], "abc")


def test_too_few_documents_give_no_interval_and_no_phi():
    losses = make_losses(SIX)
    few = losses[losses.document.str[-3:].astype(int) < stats.MIN_CLUSTERS - 1]
    rows = compare("study", few, "abc")
    assert find(rows, Term.BENEFIT).low is None
    assert "29 documents are too few for an interval" in find(rows, Term.SHARE).note


def trained(arm, changes, quantity="A", probe="specificity"):
    """Return a probe's numbers in an arm's runs, and the changes by training, one per seed; None: undefined."""
    made = []
    for seed, change in enumerate(changes):
        about = {
            "study": "s", "probe": probe, "quantity": quantity, "unit": "share", "commit": "c",
            "run": f"{arm}-s{seed}", "arm": arm, "variant": arm.split("-")[0], "seed": seed,
            "stream": "natural",
        }  # fmt: skip
        made += [Measurement(**about, value=1.0), Untrained(**about, value=0.5, difference=change)]
    return made


def settings_of(*arms, **lineages):
    """Return the settings that the comparison stores for arms of one size and rate."""
    made = compare("s", make_losses(dict.fromkeys(arms, 3.0), 2), "c", **lineages)
    return of_kind(made, Setting)


def test_a_probe_is_confirmed_by_what_training_changed():
    """Changes .1, .2, .3, .4, .5, .6 at six seeds: p = 2 / 2^6, which Holm multiplies by the three tests."""
    rows = [
        *trained("solu_ln", [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]),
        *trained("solu_ln", [0.0] * 6, "B", "scale_causes"),
        *trained("solu_ln", [None] * 6, "C", "gain_variation"),
        *trained("solu_frozen_ln", [1.0] * 6),
        *settings_of("solu_ln", "solu_frozen_ln"),
    ]
    asked = {"specificity": "A", "scale_causes": "B", "gain_variation": "C", "rotation": "D"}
    first, second, third = confirm(rows, asked)
    assert (first.term, first.probe, first.quantity) == (Term.PROBE, "specificity", "A")
    assert (first.arm, first.value) == ("solu_ln", pytest.approx(0.35))
    assert (first.p, first.p_adj) == pytest.approx((2 / 64, 6 / 64))
    assert (first.cluster, first.n) == ("seed", 6)
    assert (second.value, second.p, second.p_adj) == (0, 1, 1)
    # An undefined number stays in the family, which must not depend on the results.
    assert (third.value, third.p, third.p_adj) == (None, None, 1)
    assert "undefined" in third.note


def test_a_study_without_numbers_before_training_confirms_nothing():
    rows = [row for row in trained("solu_ln", [0.1] * 3) if isinstance(row, Measurement)]
    assert confirm([*rows, *settings_of("solu_ln")], {"specificity": "A"}) == []


def test_a_probe_is_confirmed_in_each_arm_at_its_chosen_rate():
    arms = {"solu_ln-d64": 3.02, "solu_ln-d128-lr1": 2.52, "solu_ln-d128-lr2": 2.58}
    told = {arm: LARGE if "d128" in arm else {} for arm in arms}
    for arm, lr in (("solu_ln-d128-lr1", 0.001), ("solu_ln-d128-lr2", 0.002)):
        told[arm] = LARGE | {"lr": lr, "family": "solu_ln-d128"}
    compared = compare("s", make_losses(arms, 3, settings=told), "c")
    probed = [row for arm in arms for row in trained(arm, [1.0] * 3)]
    found = confirm([*probed, *compared], {"specificity": "A"})
    assert {row.arm for row in found} == {"solu_ln-d64", "solu_ln-d128-lr1"}


# ---------------------------------------------------------------- sizes

LARGE = {"d_model": 128, "d_mlp": 512, "n_heads": 8}
NUMBERS = (
    "term",
    "arm",
    "against",
    "step",
    "cluster",
    "value",
    "low",
    "high",
    "p",
    "n",
    "n_clusters",
)


def two_sizes() -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Return the losses of both sizes, of the small size, and of the large size, which is always better."""
    small = {f"{arm}-d64": loss for arm, loss in SIX.items()}
    large = {f"{arm}-d128": loss - 0.5 for arm, loss in SIX.items()}
    both = make_losses(small | large, settings=dict.fromkeys(large, LARGE))
    is_small = both.arm.isin(small)
    return both, both[is_small], both[~is_small]


def test_two_sizes_are_compared_as_if_each_were_alone():
    both, *alone = two_sizes()

    def numbers_of(losses):
        compared = of_kind(compare("study", losses, "abc"), Comparison)
        return [[getattr(row, name) for name in NUMBERS] for row in compared]

    together = numbers_of(both)
    apart = [numbers for losses in alone for numbers in numbers_of(losses)]
    assert sorted(together, key=str) == sorted(apart, key=str)


def test_a_larger_model_does_not_stand_for_a_smaller_one():
    rows = compare("study", two_sizes()[0], "abc")
    for size in ("d64", "d128"):
        row = find(rows, Term.STATIC, arm=f"solu_ln-{size}")
        assert row.value == pytest.approx(0.02, abs=0.001)
        assert row.choice.startswith(f"solu_frozen_ln-{size}, chosen")
        assert find(rows, Term.SHARE, arm=f"solu_ln-{size}").value == pytest.approx(0.25, abs=0.02)
    for row in terms(rows, Term.DIFFERENCE):
        other = "d64" if row.arm.endswith("d128") else "d128"
        assert other not in row.against


def test_each_record_of_several_sizes_says_which_and_of_one_does_not():
    both, small, _ = two_sizes()
    rows = compare("study", both, "abc")
    for row in rows:
        if not isinstance(row, ScalingCurve):  # is about all sizes
            width = (
                "d_model 128, d_mlp 512, n_heads 8" if row.arm.endswith("d128") else "d_model 64"
            )
            assert row.size.startswith(width)
    assert {row.size for row in compare("study", small, "abc")} == {""}


def test_more_training_is_another_size():
    arms = {"solu": 3.1, "solu_ln": 3.02, "solu-long": 2.9, "solu_ln-long": 2.7}
    told = {arm: {"tokens": 10_000_000} for arm in arms if arm.endswith("long")}
    rows = compare("study", make_losses(arms, settings=told), "abc")
    assert find(rows, Term.BENEFIT, arm="solu_ln").value == pytest.approx(0.08, abs=0.001)
    assert find(rows, Term.BENEFIT, arm="solu_ln-long").value == pytest.approx(0.2, abs=0.001)
    assert find(rows, Term.BENEFIT, arm="solu_ln").size == "tokens 1843200"


def test_sizes_may_be_measured_on_other_targets():
    """The first token of a context is no target, so another context length gives another number of targets."""
    both, *_ = two_sizes()
    large = both.arm.str.endswith("d128")
    longer = both.assign(n_tokens=both.n_tokens + large, ctx=both.ctx.where(~large, 128))
    rows = compare("study", longer, "abc")
    assert find(rows, Term.BENEFIT, arm="solu_ln-d64").value == pytest.approx(0.08, abs=0.001)


def test_the_primary_family_holds_the_arms_of_all_sizes():
    rows = compare("study", two_sizes()[0], "abc")
    adjusted = [row for row in terms(rows, Term.STATIC) if row.p_adj is not None]
    assert [row.p_adj for row in adjusted] == pytest.approx([4 / 256] * 2)


# ---------------------------------------------------------------- rates, gains, settings


def tuned(**optimum: float) -> tuple[dict[str, float], dict[str, dict[str, float | str]]]:
    """Return arms at four rates and their settings; the loss rises by .01 nats per doubling from the optimum."""
    arms, told = {}, {}
    for variant, best in optimum.items():
        for lr in (0.001, 0.002, 0.004, 0.008):
            arm = f"{variant}-lr{lr}"
            arms[arm] = SIX[variant] + 0.01 * abs(math.log2(lr / best))
            told[arm] = {"lr": lr, "family": variant}
    return arms, told


OPTIMA = {"gelu": 0.002, "solu": 0.008, "solu_frozen_ln": 0.004, "solu_ln": 0.002}


def test_arms_are_compared_at_their_own_best_rates():
    arms, told = tuned(**OPTIMA)
    rows = compare("study", make_losses(arms, settings=told), "abc")
    chosen = {f"{variant}-lr{lr}" for variant, lr in OPTIMA.items()}
    for term in (Term.DIFFERENCE, Term.BENEFIT, Term.STATIC, Term.SHARE):
        assert {row.arm for row in terms(rows, term) if row.lr is None} <= chosen
    row = find(rows, Term.BENEFIT, arm="solu_ln-lr0.002")
    assert row.value == pytest.approx(0.08, abs=0.001)
    assert row.choice == "solu-lr0.008, the best of 4 rates on the select split over 8 seeds"
    assert find(rows, Term.SHARE).value == pytest.approx(0.25, abs=0.02)
    assert sum(step.value for step in terms(rows, Term.STEP)) == pytest.approx(row.value, abs=1e-12)


def test_the_rate_is_chosen_on_select_and_the_curve_holds_its_losses():
    arms, told = tuned(**OPTIMA)
    select = arms | {"solu_ln-lr0.004": 2.9}
    losses = make_losses(arms, select=select, settings=told)
    rows = compare("study", losses, "abc")
    curve = [row for row in curve_points(rows, "lr") if row.variant == "solu_ln"]
    assert [row.x for row in curve] == [0.001, 0.002, 0.004, 0.008]
    assert {row.chosen_arm for row in curve} == {"solu_ln-lr0.004"}
    for row in curve:
        mine = losses[(losses.arm == row.arm) & (losses.split == "select")]
        by_seed = mine.groupby("seed")[["loss_sum", "n_tokens"]].sum()
        assert row.value == pytest.approx((by_seed.loss_sum / by_seed.n_tokens).mean())
        assert row.low < row.value < row.high
    assert find(rows, Term.BENEFIT).arm == "solu_ln-lr0.004"


def test_an_optimum_at_an_edge_of_its_grid_is_said():
    arms, told = tuned(solu=0.008, solu_ln=0.002, gelu=0.001)
    rows = compare("study", make_losses(arms, settings=told), "abc")
    chosen = {row.arm: (row.grid, row.note) for row in curve_points(rows, "lr") if row.grid}
    assert chosen == {
        "gelu-lr0.001": (Grid.LOWER_EDGE, "chosen over 8 seeds, at the lower edge of the grid"),
        "solu-lr0.008": (Grid.UPPER_EDGE, "chosen over 8 seeds, at the upper edge of the grid"),
        "solu_ln-lr0.002": (Grid.INSIDE, "chosen over 8 seeds, inside the grid"),
    }


def curve_of(losses: pd.DataFrame) -> dict[float, ChoicePoint]:
    """Return the points of the only curve of rates, by rate."""
    return {row.x: row for row in curve_points(compare("s", losses, "c"), "lr")}


def easy_first(**optimum: float) -> pd.DataFrame:
    """Return losses at four rates and three seeds. Seed 0 is easy: .5 nats below the other two seeds."""
    arms, told = tuned(**optimum)
    easy = {f"{arm}-s0": -0.5 for arm in arms}
    return make_losses(arms, n_seeds=3, worse=easy, settings=told)


def test_a_rate_does_not_win_by_its_seeds():
    """The worst rate was trained at the easy seed only. No rate has all three seeds."""
    losses = easy_first(solu_ln=0.002)
    lacks = {0.008: (1, 2), 0.001: (1,), 0.002: (2,), 0.004: (1,)}
    for lr, seeds in lacks.items():
        losses = losses[(losses.lr != lr) | ~losses.seed.isin(seeds)]
    curve = curve_of(losses)
    assert {row.chosen_arm for row in curve.values()} == {"solu_ln-lr0.002"}
    assert {row.n for row in curve.values()} == {1}


def test_a_rate_with_fewer_seeds_does_not_replace_one_with_all():
    """The best rate has two of three seeds, so it is shown but not chosen. The other rates keep three seeds."""
    losses = easy_first(solu_ln=0.008)
    losses = losses[(losses.arm != "solu_ln-lr0.008") | (losses.seed < 2)]
    curve = curve_of(losses)
    assert {row.chosen_arm for row in curve.values()} == {"solu_ln-lr0.004"}
    assert {lr: row.n for lr, row in curve.items()} == {0.001: 3, 0.002: 3, 0.004: 3, 0.008: 2}
    # The edge belongs to the rates that may be chosen.
    assert curve[0.004].grid is Grid.UPPER_EDGE
    assert {lr: row.eligible for lr, row in curve.items()} == {
        0.001: True,
        0.002: True,
        0.004: True,
        0.008: False,
    }
    assert curve[0.008].note == "not eligible: 2 of 3 seeds"


def test_rates_that_share_no_seed_are_not_chosen_from_and_named():
    losses = easy_first(solu_ln=0.002)
    losses = losses[losses.lr.isin([0.002, 0.008])]
    losses = losses[(losses.lr == 0.008) == (losses.seed == 0)]
    rows = compare("s", losses, "c")
    assert not of_kind(rows, ChoicePoint)
    (row,) = of_kind(rows, NoChoice)
    assert (row.arms, row.note) == (("solu_ln-lr0.002", "solu_ln-lr0.008"), "they share no seed")
    assert not terms(rows, Term.DIFFERENCE)


def test_static_arms_that_share_no_seed_are_not_chosen_from_and_named():
    arms = {"solu": 3.1, "solu_gain": 3.06, "solu_frozen_ln": 3.04, "solu_ln": 3.02}
    losses = make_losses(arms, n_seeds=4)
    losses = losses[(losses.arm != "solu_gain") | (losses.seed < 2)]
    losses = losses[(losses.arm != "solu_frozen_ln") | (losses.seed >= 2)]
    rows = compare("s", losses, "c")
    assert not terms(rows, Term.STATIC, Term.SHARE)
    assert find(rows, Term.BENEFIT).n == 4
    (row,) = of_kind(rows, NoChoice)
    assert row.arms == ("solu_frozen_ln", "solu_gain")


def test_arms_of_a_chains_member_that_share_no_seed_are_passed_over_and_named():
    lineages = {
        "solu_ln": Lineage("per_token", "", chain("solu", "solu_det", "solu_ln")),
        "solu_det": Lineage("per_token", "", chain("solu", "solu_det")),
    }
    losses = make_losses({"solu": 3.1, "solu_det-a": 3.06, "solu_det-b": 3.06, "solu_ln": 3.02}, 4)
    losses = losses[(losses.arm != "solu_det-a") | (losses.seed < 2)]
    losses = losses[(losses.arm != "solu_det-b") | (losses.seed >= 2)]
    rows = compare("s", losses, "c", **lineages)
    steps = [row.step for row in terms(rows, Term.STEP) if row.arm == "solu_ln"]
    assert steps == [("solu", "solu_ln")]
    (row,) = of_kind(rows, NoChoice)
    assert row.arms == ("solu_det-a", "solu_det-b")


def test_two_points_are_no_grid():
    arms = {"solu": 3.1, "solu_ln": 3.02, "solu_gain-a": 3.06, "solu_gain-b": 3.04}
    told = {"solu_gain-a": {"gain": 8.0}, "solu_gain-b": {"gain": 32.0}}
    rows = compare("study", make_losses(arms, settings=told), "abc")
    curve = {row.arm: (row.grid, row.note) for row in curve_points(rows, "gain")}
    assert curve == {
        "solu_gain-a": (None, ""),
        "solu_gain-b": (Grid.TOO_FEW, "chosen over 8 seeds, 2 points are too few for a grid"),
    }


def test_two_arms_at_one_rate_of_a_curve_are_refused_by_name():
    arms, told = tuned(solu=0.004, solu_ln=0.002)
    arms["solu_ln-again"] = 3.02
    told["solu_ln-again"] = {"lr": 0.004, "family": "solu_ln"}
    with pytest.raises(
        UserError, match=r"arms 'solu_ln-again' and 'solu_ln-lr0.004' of 'study' .* \(0\.004\)"
    ):
        compare("study", make_losses(arms, n_seeds=2, settings=told), "abc")


def test_a_common_rate_gives_what_a_study_of_that_rate_gives():
    arms, told = tuned(**OPTIMA)
    losses = make_losses(arms, settings=told)
    rows = compare("study", losses, "abc")
    for lr in (0.001, 0.002, 0.004, 0.008):
        alone = compare("study", losses[losses.lr == lr], "abc")
        for term in (Term.BENEFIT, Term.STATIC, Term.SHARE):
            there = find(alone, term)
            here = find(rows, term, lr=lr)
            assert (here.value, here.low, here.high) == (there.value, there.low, there.high)
            assert (here.arm, here.tuned_arm) == (f"solu_ln-lr{lr}", "solu_ln-lr0.002")
            assert here.p_adj is None
    assert find(rows, Term.BENEFIT, lr=0.001).value == pytest.approx(0.1, abs=0.001)


def test_a_rate_that_not_all_have_is_not_common():
    arms, told = tuned(solu=0.008, solu_ln=0.002, solu_gain=0.002)
    losses = make_losses(arms, settings=told)
    rows = compare("study", losses[losses.arm != "solu-lr0.001"], "abc")
    shared = {row.lr for row in terms(rows, Term.SHARE)}
    assert shared == {None, 0.002, 0.004, 0.008}


def test_one_rate_under_two_names_is_no_choice_of_rates():
    arms = {"solu": 3.1, "solu_ln": 3.02, "solu_ln-again": 3.03}
    told = {arm: {"family": arm.split("-")[0]} for arm in arms}
    rows = compare("study", make_losses(arms, settings=told), "abc")
    apart = compare("study", make_losses(arms), "abc")
    kept, others = ([replace(each, family="") if isinstance(each, Setting) else each for each in found]
                    for found in (rows, apart))  # fmt: skip
    assert kept == others
    assert find(rows, Term.BENEFIT, arm="solu_ln-again").value == pytest.approx(0.07, abs=0.001)


def test_gains_are_chosen_each_at_its_best_rate():
    arms, told = {"solu": 3.1, "solu_ln": 3.02}, {}
    for gain, loss, best in ((8.0, 3.06, 0.002), (32.0, 3.04, 0.004), (128.0, 3.05, 0.008)):
        for lr in (0.001, 0.002, 0.004, 0.008):
            arm = f"solu_gain-gain{gain}-lr{lr}"
            arms[arm] = loss + 0.01 * abs(math.log2(lr / best))
            told[arm] = {"lr": lr, "gain": gain, "family": f"gain {gain}"}
    rows = compare("study", make_losses(arms, settings=told), "abc")
    curve = curve_points(rows, "gain")
    assert [(row.x, row.arm) for row in curve] == [
        (8, "solu_gain-gain8.0-lr0.002"),
        (32, "solu_gain-gain32.0-lr0.004"),
        (128, "solu_gain-gain128.0-lr0.008"),
    ]
    assert {row.chosen_arm for row in curve} == {"solu_gain-gain32.0-lr0.004"}
    assert [row.note for row in curve] == ["", "chosen over 8 seeds, inside the grid", ""]
    assert find(rows, Term.STATIC).value == pytest.approx(0.02, abs=0.001)


def test_where_nothing_is_chosen_there_are_no_curves():
    told = {
        "solu_ln": {"kappa": 42.0},
        "solu_gain": {"gain": 30.0},
        "solu_frozen_ln": {"gain": 31.0},
    }
    rows = compare("study", make_losses(SIX, settings=told), "abc")
    assert not of_kind(rows, ChoicePoint)
    assert {row.lr for row in of_kind(rows, Comparison)} == {None}


def test_each_kappa_has_its_own_share_against_the_same_static_arm():
    arms = {"solu": 3.1, "solu_gain": 3.06, "solu_frozen_ln": 3.07}
    arms |= {"solu_ln-a": 3.02, "solu_ln-b": 3.05}
    told = {"solu_ln-a": {"kappa": 4e-5}, "solu_ln-b": {"kappa": 41.94}}
    rows = compare("study", make_losses(arms, settings=told), "abc")
    kappa = {
        each.arm: each.values["kappa"] for each in of_kind(rows, Setting) if "kappa" in each.values
    }
    share = {kappa[row.arm]: row.value for row in terms(rows, Term.SHARE)}
    assert share == pytest.approx({4e-5: 0.5, 41.94: 0.2}, abs=0.03)
    for arm in kappa:
        assert find(rows, Term.STATIC, arm=arm).against == "solu_gain"


def test_settings_and_roles_are_stored_so_that_names_need_not_be_parsed():
    told = {"solu_ln": {"kappa": 41.94}, "solu_gain": {"gain": 30.0, "lr": 0.004}}
    settings = {
        each.arm: each
        for each in of_kind(compare("s", make_losses(SIX, settings=told), "c"), Setting)
    }
    alike = {name: value for name, value in ALIKE.items() if not math.isnan(value)}
    assert settings.keys() == SIX.keys()
    assert settings["solu"].values == alike
    assert settings["solu_ln"].values == alike | {"kappa": 41.94}
    assert settings["solu_gain"].values == alike | {"gain": 30, "lr": 0.004}
    for name, each in settings.items():
        assert Lineage(each.role, each.twin, each.chain) == LINEAGES[name]
        assert (each.variant, each.n) == (name, 8)


def test_an_arm_of_role_other_is_compared_and_changes_no_other_record():
    """The arms have the lowest and the highest loss of all, and two gains, so any choice would be visible."""
    told = {"expu-a": {"gain": 8.0}, "expu-b": {"gain": 9.0}}
    losses = make_losses(SIX | {"expu-a": 2.5, "expu-b": 3.9}, settings=told)
    rows = compare("study", losses, "abc", expu=Lineage("other", "", chain("expu")))
    about = [each for each in rows if each.arm in told]
    rest = [each for each in rows if each.arm not in told]
    assert rest == compare("study", losses[~losses["arm"].isin(told)], "abc")
    differences = {(row.arm, row.against) for row in terms(about, Term.DIFFERENCE)}
    assert differences == {(arm, of) for arm in told for of in ("gelu", "solu", "solu_ln")}
    assert {row.term for row in of_kind(about, Comparison)} == {Term.LOSS, Term.DIFFERENCE}
    assert {each.role for each in of_kind(about, Setting)} == {"other"}


def test_a_gain_that_was_measured_by_seed_is_one_setting():
    losses = make_losses({"solu_gain": 3.06}, n_seeds=3)
    losses["gain"] = losses.seed.map({0: 38.0, 1: 39.0, 2: 41.0})
    rows = compare("study", losses, "abc")
    assert [each.values["gain"] for each in of_kind(rows, Setting)] == [39.0]


@pytest.mark.parametrize("name", ["lr", "kappa", "d_mlp", "tokens"])
def test_an_arm_of_two_settings_is_refused(name):
    losses = make_losses({"solu": 3.1, "solu_ln": 3.0}, n_seeds=2)
    other = (losses.arm == "solu_ln") & (losses.seed == 1)
    losses[name] = np.where(other, 7.0, 5.0)
    with pytest.raises(UserError, match=rf"runs of arm 'solu_ln' differ in {name} \(5 and 7\)"):
        compare("study", losses, "abc")


def test_runs_that_differ_in_seed_and_rate_alone_are_of_one_family(tiny_study, tmp_path):
    trained = tiny_study / "solu_ln-s0"

    def settings(**changes):
        """Return the settings that the suite reads from the folder of a run with these words."""
        words = [f"{key.replace('__', '.')}={value}" for key, value in changes.items()]
        config = tiny_config(tmp_path, "variant=solu_ln", *words)
        facts = json.loads((trained / "model.json").read_text())
        facts |= {"eps": 0.001, "d_mlp": 128, "lr": config.train.lr, "gain": None}
        facts |= {"study": config.study, "seed": config.seed}
        folder = tmp_path / "run"
        folder.mkdir(exist_ok=True)
        (folder / "config.yaml").write_text(to_yaml(config))
        (folder / "model.json").write_text(json.dumps(facts))
        return _settings(Run(folder))

    first = settings(train__lr=0.001, seed=0, tag="a")
    assert first.keys() >= {*SETTINGS, "family"}
    assert (first["lr"], first["kappa"]) == (0.001, pytest.approx(0.001 * 128**2))
    assert math.isnan(first["gain"])
    assert settings(train__lr=0.004, seed=3, tag="b")["family"] == first["family"]
    assert settings(train__lr=0.001, mid__kappa=3)["family"] != first["family"]
    assert settings(train__lr=0.001, train__weight_decay=0)["family"] != first["family"]


def test_runs_of_one_variant_whose_file_has_changed_between_them_are_refused_by_name():
    def facts(run, **changes):
        lineage = {"role": "static", "twin": "", "chain": chain("solu", "solu_gain")}
        others = {field.name: None for field in fields(Facts)}
        return Facts(**others | {"run": run, "variant": "solu_gain"} | lineage | changes)

    two = [facts("solu_gain-s0"), facts("solu_gain-s1")]
    assert _lineages(two) == {"solu_gain": replace(LINEAGES["solu_gain"], label="SoLU")}
    other = facts("solu_gain-s2", role="per_token")
    with pytest.raises(
        UserError, match="runs 'solu_gain-s0' and 'solu_gain-s2' of variant"
    ) as refused:
        _lineages([*two, other])
    assert "delete the line 'role' from both model.json files" in str(refused.value)


# ---------------------------------------------------------------- select seeds


GAINS = {"solu_gain-g1": 3.03, "solu_gain-g8": 3.06, "solu_gain-g64": 3.09}
KNOWN = {"solu": 3.10, "solu_ln": 3.02, **GAINS}


def with_select_seeds(losses, select_seeds=(5, 6, 7)):
    return compare_with("study", losses, "abc", LINEAGES, select_seeds)


def test_select_seeds_choose_and_are_never_reported():
    # At the seeds 5 to 7 the largest gain is best, at the reported seeds the smallest.
    worse = {
        f"{arm}-s{seed}": 0.1 for arm in ("solu_gain-g1", "solu_gain-g8") for seed in (5, 6, 7)
    }
    losses = make_losses(KNOWN, n_seeds=8, worse=worse)
    records = with_select_seeds(losses)
    static = find(records, Term.STATIC)
    assert static.against == "solu_gain-g64"
    assert static.value == pytest.approx(0.07, abs=0.002)
    assert (static.n, static.optimism, static.n_candidates) == (5, 0, 3)
    assert find(records, Term.BENEFIT).n == 5
    without = losses[losses.seed < 5]
    assert find(compare("study", without, "abc"), Term.STATIC).against == "solu_gain-g1"
    # The numbers of the reported seeds are those of a study without the other seeds.
    same = find(compare("study", without, "abc"), Term.DIFFERENCE, arm="solu", against="solu_ln")
    assert find(records, Term.DIFFERENCE, arm="solu", against="solu_ln").value == same.value


def test_arms_that_were_only_tried_out_have_a_curve_and_no_loss():
    losses = make_losses(
        KNOWN, n_seeds=8,
        settings={f"solu_gain-g{g}": {"gain": float(g), "family": f"gain {g}"} for g in (1, 8, 64)},
    )  # fmt: skip
    tried = losses.arm.isin(["solu_gain-g8", "solu_gain-g64"]) & (losses.seed < 5)
    records = with_select_seeds(losses[~tried])
    assert {row.arm for row in terms(records, Term.LOSS)} == {"solu", "solu_ln", "solu_gain-g1"}
    assert [point.x for point in curve_points(records, "gain")] == [1, 8, 64]
    assert {each.arm: each.n for each in of_kind(records, Setting)} == {
        "solu": 5, "solu_ln": 5, "solu_gain-g1": 5, "solu_gain-g8": 0, "solu_gain-g64": 0
    }  # fmt: skip
    assert {each.arm for each in findings.tuned(records)} == {"solu", "solu_ln", "solu_gain-g1"}


def test_a_chosen_arm_without_reported_seeds_is_named():
    losses = make_losses(KNOWN, n_seeds=8)
    missing = (losses.arm == "solu_gain-g1") & (losses.seed < 5)
    records = with_select_seeds(losses[~missing])
    (named,) = of_kind(records, NoChoice)
    assert named.arms == ("solu_gain-g1",)
    assert not terms(records, Term.STATIC)
    (sentence,) = unchosen(records)
    assert sentence.startswith("solu_gain-g1 is missing: it was chosen at the select seeds")


def test_the_chosen_arms_are_the_best_rate_of_each_and_the_best_gain_of_each_static_variant():
    arms = {"solu-a": 3.10, "solu-b": 3.20, "solu_ln-a": 3.3, "solu_ln-b": 3.02, **GAINS}
    settings = {
        arm: {"family": arm[:-2], "lr": {"a": 0.001, "b": 0.002}[arm[-1]]} for arm in list(arms)[:4]
    }
    losses = make_losses(arms, n_seeds=8, settings=settings)
    losses = losses[losses.seed >= 5]
    made = choices(losses, LINEAGES, {5, 6, 7})
    assert made.arms == {"solu-a", "solu_ln-b", "solu_gain-g1"}
    assert made.losses.keys() == set(arms)
    assert made.losses["solu-b"] - made.losses["solu-a"] == pytest.approx(0.1, abs=0.01)
    apart = losses[(losses.arm != "solu-a") | (losses.seed == 5)]
    apart = apart[(apart.arm != "solu-b") | (apart.seed == 6)]
    with pytest.raises(UserError, match="no choice is possible between solu-a, solu-b: they share"):
        choices(apart, LINEAGES, {5, 6, 7})


SURFACE = {
    # arm: (loss, learning rate, alpha, alpha is matched to the baseline)
    "gelu-a": (3.000, 0.001, 1.0, False), "gelu-b": (3.050, 0.002, 1.0, False),
    "gelu-c": (3.150, 0.004, 1.0, False),
    "solu-a": (3.090, 0.001, 1.0, False), "solu-b": (3.150, 0.002, 1.0, False),
    "solu-c": (3.300, 0.004, 1.0, False),
    "solu-d": (3.080, 0.001, 0.25, False), "solu-e": (3.085, 0.001, 2.0, True),
    "solu_ln-a": (3.070, 0.001, 1.0, False), "solu_ln-b": (3.060, 0.002, 1.0, False),
    "solu_ln-c": (3.080, 0.004, 1.0, False), "solu_ln-d": (3.010, 0.002, 0.0625, False),
    "solu_ln-e": (3.050, 0.002, 0.1, True),
    "solu_frozen_ln-a": (3.080, 0.001, 1.0, False), "solu_frozen_ln-b": (3.065, 0.002, 1.0, False),
    "solu_frozen_ln-c": (3.140, 0.004, 1.0, False), "solu_frozen_ln-d": (3.030, 0.002, 0.125, False),
    "solu_frozen_ln-e": (3.055, 0.002, 0.2, True),
}  # fmt: skip
"""A study in which the rate and the scale of the MLP's output were tuned. The differences are exact by hand."""


def on_surface(select_seeds: tuple[int, ...] = (), uniform: float = 7.0) -> list[Record]:
    means = {arm: values[0] for arm, values in SURFACE.items()}
    settings = {
        arm: {
            "family": arm[:-2],
            "lr": lr,
            "mlp_out_scale": alpha,
            "matched": matched,
            "uniform": uniform,
        }
        for arm, (_, lr, alpha, matched) in SURFACE.items()
    }
    losses = make_losses(means, n_seeds=6, seed_noise=0.0, settings=settings)
    return compare_with("study", losses, "abc", LINEAGES, select_seeds)


def of_design(records: list[Record], term: Term, design: str) -> float | None:
    (found,) = findings.comparisons(records, term, design=design)
    return found.value


def test_arms_are_compared_at_the_best_points_of_their_surfaces_and_in_each_fixed_design():
    records = on_surface()
    assert of_design(records, Term.BENEFIT, "") == pytest.approx(3.080 - 3.010)
    assert of_design(records, Term.STATIC, "") == pytest.approx(3.030 - 3.010)
    assert of_design(records, Term.SHARE, "") == pytest.approx(2 / 7)
    assert of_design(records, Term.BENEFIT, "alpha 1") == pytest.approx(3.090 - 3.060)
    assert of_design(records, Term.STATIC, "alpha 1") == pytest.approx(3.065 - 3.060)
    assert of_design(records, Term.BENEFIT, "alpha matched") == pytest.approx(3.085 - 3.050)
    assert of_design(records, Term.STATIC, "alpha matched") == pytest.approx(3.055 - 3.050)
    assert {each.arm for each in findings.tuned(records)} >= {"solu-d", "solu_ln-d"}
    assert {each.arm for each in findings.tuned(records)}.isdisjoint(
        {"solu-a", "solu_ln-b", "solu_ln-e"}
    )


def test_every_design_is_trained_at_the_report_seeds():
    means = {arm: values[0] for arm, values in SURFACE.items()}
    settings = {
        arm: {"family": arm[:-2], "lr": lr, "mlp_out_scale": alpha, "matched": matched}
        for arm, (_, lr, alpha, matched) in SURFACE.items()
    }
    losses = make_losses(means, n_seeds=3, settings=settings)
    made = choices(losses, LINEAGES, {0, 1, 2})
    assert made.arms == {
        "gelu-a", "solu-d", "solu_ln-d", "solu_frozen_ln-d", "solu-a", "solu_ln-b", "solu_frozen_ln-b",
        "solu-e", "solu_ln-e", "solu_frozen_ln-e",
    }  # fmt: skip


def test_a_surface_has_a_curve_over_rates_and_one_over_alpha_through_the_best_point():
    points = of_kind(on_surface(), ChoicePoint)
    of_ln = [each for each in points if each.chosen_arm == "solu_ln-d"]
    assert {each.arm for each in of_ln if each.setting == "lr"} == {
        f"solu_ln-{point}" for point in "abcd"
    }
    across = {each.arm: each.x for each in of_ln if each.setting == "mlp_out_scale"}
    assert across == {"solu_ln-b": 1.0, "solu_ln-d": 0.0625}
    (chosen,) = (each for each in of_ln if each.setting == "mlp_out_scale" and each.grid)
    assert chosen.grid is Grid.TOO_FEW


@pytest.mark.parametrize("uniform", [7.0, 3.2])
def test_the_rate_sensitivity_and_its_steps_are_those_by_hand(uniform: float):
    of_gelu = next(each for each in terms(on_surface(), Term.LOSS) if each.arm == "gelu-a")
    level = (of_gelu.value or 0.0) - 3.000  # the documents' common part of every loss
    records = on_surface(uniform=uniform + level)
    capped = min(3.300, uniform)
    wanted = {
        "gelu-a": (0.050 + 0.150) / 3,
        "solu-a": (0.060 + capped - 3.090) / 3,
        "solu_frozen_ln-b": (0.015 + 0.075) / 3,
        "solu_ln-b": (0.010 + 0.020) / 3,
    }
    found = {each.arm: each.value for each in findings.comparisons(records, Term.SENSITIVITY)}
    assert found == pytest.approx(wanted)
    steps = findings.comparisons(records, Term.SENSITIVITY_STEP)
    assert [each.step for each in steps] == [
        ("solu", "solu_frozen_ln"),
        ("solu_frozen_ln", "solu_ln"),
    ]
    assert sum(each.value or 0.0 for each in steps) == pytest.approx(
        wanted["solu-a"] - wanted["solu_ln-b"], abs=1e-9
    )


def test_a_study_with_one_alpha_has_no_designs():
    records = compare("study", make_losses(KNOWN), "abc")
    assert not {each.design for each in of_kind(records, Comparison)} - {""}


def test_the_advantage_of_the_luckiest_arm_is_that_of_a_simulation():
    # Ten equal static arms whose losses differ by seed with an sd of .003.
    random = np.random.default_rng(0)
    luck = []
    for _ in range(4000):
        by_seed = 0.003 * random.normal(size=(10, 8))
        luck.append(by_seed.mean(axis=1).min())
    arms = {f"solu_gain-g{g}": 3.05 for g in range(10)} | {"solu": 3.10, "solu_ln": 3.02}
    found = []
    for seed in range(5):
        losses = make_losses(arms, n_seeds=8, seed_noise=0.0, document_noise=0.0)
        noise = {
            run: 0.003 * np.random.default_rng([seed, i]).normal()
            for i, run in enumerate(losses.run.unique())
        }
        losses["loss_sum"] += losses.run.map(noise) * losses.n_tokens
        static = find(compare("study", losses, "abc"), Term.STATIC)
        found.append(static.optimism)
        assert static.n_candidates == 10
    assert np.mean(found) == pytest.approx(-np.mean(luck), rel=0.15)
    assert "was chosen among 10 arms at the reported seeds" in _optimism(static)


def test_an_arm_that_was_trained_further_is_compared_but_takes_part_in_no_choice():
    """It has less loss than the best static arm; its fair reference is the arm trained equally long."""
    arms = {"gelu": 4.0, "solu": 4.1, "solu_gain": 4.05, "solu_frozen_ln": 4.03, "solu_ln": 3.9}
    alone = compare_with("s", make_losses(arms), "", LINEAGES)
    beside = {"one_gain": 3.7, "unchanged": 3.65}
    losses = pd.concat([make_losses(arms), make_losses(beside).assign(further_tokens=1000.0)])
    lineages = LINEAGES | {
        "one_gain": Lineage("other", "", (), "one", after="solu_ln", beside="unchanged"),
        "unchanged": Lineage("other", "", (), "same", after="solu_ln"),
    }
    records = compare_with("s", losses, "", lineages)
    kept = {Term.BENEFIT, Term.STATIC, Term.SHARE, Term.STEP, Term.SENSITIVITY}
    roles = [
        [each for each in of_kind(r, Comparison) if each.term in kept] for r in (alone, records)
    ]
    assert roles[0] == roles[1] != []
    found = {
        row.arm: row
        for row in of_kind(records, Comparison)
        if (row.term, row.against, row.cluster) == (Term.DIFFERENCE, "unchanged", "seed")
    }
    assert found.keys() == {"one_gain"}
    assert found["one_gain"].value == pytest.approx(0.05, abs=0.001)
    assert found["one_gain"].note.startswith("both began with the same trained weights")
    means = {row.arm for row in of_kind(records, Comparison) if row.term is Term.LOSS}
    assert beside.keys() <= means
    settings = {each.arm: each for each in of_kind(records, Setting)}
    assert settings["one_gain"].after == "solu_ln"
    assert settings["one_gain"].values["further_tokens"] == 1000
    assert "further_tokens" not in settings["solu_ln"].values
    assert not findings.at_one_rate(records)


def test_a_run_that_lost_its_scales_is_no_arm_with_a_per_token_norm():
    losses = make_losses({"solu": 4.1, "solu_ln": 3.9, "solu_frozen_ln": 4.0})
    free = losses.assign(constant=losses["arm"] == "solu_ln")
    records = compare_with("s", free, "", LINEAGES)
    assert {each.role for each in of_kind(records, Setting) if each.arm == "solu_ln"} == {"other"}
    assert not [row for row in of_kind(records, Comparison) if row.term is Term.STATIC]
