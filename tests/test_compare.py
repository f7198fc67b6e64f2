"""Comparisons of variants, from losses whose differences are known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import scipy.stats

from soluscope import stats
from soluscope.compare import UNDEFINED, compare, confirm
from soluscope.errors import UserError
from soluscope.results import Row

N_DOCUMENTS = 40


def make_losses(
    arms: dict[str, float],
    n_seeds: int = 8,
    select: dict[str, float] | None = None,
    seed_noise: float = 0.0005,
    document_noise: float = 0.0,
    worse: dict[str, float] | None = None,
) -> pd.DataFrame:
    """Losses a token as given for each arm, `variant` or `variant-more`, with noise a seed.

    `worse` adds to the losses of single runs.
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
                    }
                    for i in range(N_DOCUMENTS)
                ]
    return pd.DataFrame(rows)


SIX = {
    "gelu": 3.00,
    "gelu_ln": 3.01,
    "solu": 3.10,
    "solu_ln": 3.02,
    "solu_frozen_ln": 3.04,
    "solu_gain": 3.06,
}


def find(rows, quantity, cluster="seed", **fields):
    """The one row of `quantity` that has these fields."""
    found = [
        row
        for row in rows
        if row.quantity == quantity
        and row.cluster == cluster
        and all(getattr(row, key) == value for key, value in fields.items())
    ]
    assert len(found) == 1, found
    return found[0]


def test_loss_of_an_arm_is_the_mean_over_its_seeds():
    losses = make_losses(SIX)
    row = find(compare("study", losses, "abc"), "loss", arm="solu")
    report = losses[(losses.arm == "solu") & (losses.split == "report")]
    sums = report.groupby("seed")[["loss_sum", "n_tokens"]].sum()
    per_seed = sums.loss_sum / sums.n_tokens
    low, high = scipy.stats.t.interval(0.95, 7, per_seed.mean(), scipy.stats.sem(per_seed))
    assert row.value == pytest.approx(per_seed.mean())
    assert (row.low, row.high) == pytest.approx((low, high))
    assert (row.n, row.study, row.commit, row.config) == (8, "study", "abc", "hash of solu")


def test_every_arm_is_compared_with_gelu_and_with_solu_ln_both_ways():
    rows = compare("study", make_losses(SIX), "abc")
    pairs = {(row.arm, row.group, row.cluster) for row in rows if row.quantity == "difference"}
    assert len(pairs) == 2 * 2 * 5
    row = find(rows, "difference", arm="solu_gain", group="minus gelu")
    assert row.value == pytest.approx(0.06, abs=0.001)
    assert row.low < row.value < row.high
    assert "sign-flip p = 0.00781" in row.note
    fixed = find(rows, "difference", "document", arm="solu_gain", group="minus gelu")
    assert fixed.value == pytest.approx(row.value)
    assert (row.n_clusters, fixed.n_clusters) == (8, N_DOCUMENTS)


def test_the_interval_for_trained_models_is_narrower_than_the_one_for_new_seeds():
    rows = compare(
        "study", make_losses(SIX, n_seeds=2, seed_noise=0.01, document_noise=0.01), "abc"
    )
    new, fixed = find(rows, "gain of LN"), find(rows, "gain of LN", "document")
    assert new.low < fixed.low < fixed.high < new.high


def test_only_seeds_that_both_arms_have_are_compared():
    losses = make_losses(SIX, n_seeds=4)
    losses = losses[(losses.arm != "solu_ln") | (losses.seed >= 1)]
    row = find(compare("study", losses, "abc"), "gain of LN")
    assert row.n == 3
    assert [row.n for row in compare("study", losses, "abc") if row.quantity == "loss"].count(
        4
    ) == 5


def test_phi_dyn_is_the_share_that_was_put_in():
    rows = compare("study", make_losses(SIX), "abc")
    row = find(rows, "Phi_dyn")
    assert row.value == pytest.approx(0.02 / 0.08, abs=0.02)
    assert row.low < 0.25 < row.high
    assert row.high - row.low < 0.05
    assert "seeds and documents resampled; Fieller's is 0.2" in row.note
    assert find(rows, "gain of LN").value == pytest.approx(0.08, abs=0.001)
    assert find(rows, "static - LN").value == pytest.approx(0.02, abs=0.001)
    assert find(rows, "static - LN").note.startswith("different: farther than 0.005 nats")


def test_the_primary_family_is_corrected_for_every_solu_ln_arm():
    # One arm is better than the static one at all eight seeds, one is as good.
    arms = {"solu": 3.1, "solu_gain": 3.06, "solu_ln-k42": 3.02, "solu_ln-k0": 3.0601}
    rows = compare("study", make_losses(arms), "abc")
    p = {name: find(rows, "static - LN", arm=name).p for name in ("solu_ln-k42", "solu_ln-k0")}
    assert p["solu_ln-k42"] == 2 / 256
    assert p["solu_ln-k0"] > 0.05
    for quantity in ("static - LN", "Phi_dyn"):
        for name in p:
            row = find(rows, quantity, arm=name)
            assert row.p == p[name]
            assert row.p_adj == pytest.approx(stats.holm(p)[name])
        assert find(rows, quantity, arm="solu_ln-k42").p_adj == pytest.approx(4 / 256)
    note = find(rows, "Phi_dyn", arm="solu_ln-k42").note
    assert "sign-flip p of its numerator = 0.00781; Holm-adjusted p = 0.0156 over" in note


def test_an_undefined_phi_dyn_has_no_p_and_its_numerator_stays_in_the_family():
    arms = {"solu": 3.03, "solu_gain": 3.06, "solu_ln-k42": 3.02, "solu_ln-k0": 3.04}
    rows = compare("study", make_losses(arms), "abc")
    undefined = find(rows, "Phi_dyn", arm="solu_ln-k0")
    assert (undefined.value, undefined.p, undefined.p_adj) == (None, None, None)
    assert find(rows, "Phi_dyn", arm="solu_ln-k42").p_adj == pytest.approx(4 / 256)
    assert find(rows, "static - LN", arm="solu_ln-k0").p_adj == pytest.approx(4 / 256)


def test_p_is_of_differences_over_seeds_and_of_nothing_else():
    rows = compare("study", make_losses(SIX), "abc")
    assert find(rows, "difference", arm="solu", group="minus gelu").p == 2 / 256
    assert find(rows, "gain of LN").p == 2 / 256
    assert {row.p for row in rows if row.cluster == "document" or row.quantity == "loss"} == {None}
    adjusted = {row.quantity for row in rows if row.p_adj is not None}
    assert adjusted == {"static - LN", "Phi_dyn"}
    one_seed = compare("study", make_losses(SIX, n_seeds=1), "abc")
    assert {(row.p, row.p_adj) for row in one_seed} == {(None, None)}


def test_phi_dyn_of_few_seeds_has_fiellers_interval():
    row = find(compare("study", make_losses(SIX, n_seeds=3), "abc"), "Phi_dyn")
    assert row.note.startswith("Fieller's interval: 3 seeds are too few to resample")
    assert row.low < 0.25 < row.high


@pytest.mark.parametrize(
    ("changes", "n_seeds", "why"),
    [
        ({"solu": 2.95}, 8, "plain solu is better"),
        ({"solu": 3.0201}, 8, "it reaches 0"),
        ({"solu": 3.0245}, 8, "its lower end is not above 0.005 nats"),
        ({}, 1, "with one seed, which gives no interval for new seeds"),
    ],
)
def test_phi_dyn_is_undefined_where_there_is_no_gain(changes, n_seeds, why):
    rows = compare("study", make_losses(SIX | changes, n_seeds=n_seeds), "abc")
    row = find(rows, "Phi_dyn")
    assert row.value is None
    assert (row.low, row.high) == (None, None)
    assert row.note.startswith(UNDEFINED)
    assert why in row.note
    assert find(rows, "static - LN").value == pytest.approx(0.02, abs=0.002)


def test_two_seeds_that_differ_do_not_establish_a_gain():
    losses = make_losses(SIX, n_seeds=2, worse={"solu-s1": 0.03})
    rows = compare("study", losses, "abc")
    assert find(rows, "gain of LN", "document").low > 0.05
    assert "it reaches 0" in find(rows, "Phi_dyn").note


def test_equal_static_arm_is_called_equivalent():
    rows = compare("study", make_losses(SIX | {"solu_gain": 3.0201}), "abc")
    assert find(rows, "static - LN").note.startswith("equivalent: closer than 0.005 nats")


def test_the_static_arm_is_chosen_on_select_even_where_report_disagrees():
    arms = SIX | {"solu_gain-c4": 3.05, "solu_gain-c79": 3.00}
    select = arms | {"solu_gain-c4": 3.01, "solu_gain-c79": 3.09}
    rows = compare("study", make_losses(arms, select=select), "abc")
    row = find(rows, "static - LN")
    assert row.value == pytest.approx(0.03, abs=0.001)
    assert "best static is solu_gain-c4, chosen on the select split" in row.note
    assert "solu_gain-c79 3." in row.note


def test_every_solu_ln_arm_has_its_own_contrasts():
    arms = {"solu": 3.1, "solu_gain": 3.06, "solu_ln-k42": 3.02, "solu_ln-k0": 3.04}
    rows = compare("study", make_losses(arms), "abc")
    assert find(rows, "gain of LN", arm="solu_ln-k42").value == pytest.approx(0.08, abs=0.001)
    assert find(rows, "gain of LN", arm="solu_ln-k0").value == pytest.approx(0.06, abs=0.001)
    assert find(rows, "Phi_dyn", arm="solu_ln-k42").value == pytest.approx(0.5, abs=0.02)
    assert find(rows, "Phi_dyn", arm="solu_ln-k0").value == pytest.approx(1 / 3, abs=0.02)


@pytest.mark.parametrize(
    ("missing", "steps"),
    [
        (
            (),
            [
                "solu - solu_gain",
                "solu_gain - solu_frozen_ln",
                "solu_frozen_ln - solu_ln_det",
                "solu_ln_det - solu_ln",
            ],
        ),
        (
            ("solu_ln_det",),
            ["solu - solu_gain", "solu_gain - solu_frozen_ln", "solu_frozen_ln - solu_ln"],
        ),
        (("solu_ln_det", "solu_gain"), ["solu - solu_frozen_ln", "solu_frozen_ln - solu_ln"]),
        (("solu_ln_det", "solu_gain", "solu_frozen_ln"), ["solu - solu_ln"]),
    ],
)
def test_telescoping_terms_sum_to_the_gain_of_ln(missing, steps):
    arms = {
        name: loss for name, loss in (SIX | {"solu_ln_det": 3.03}).items() if name not in missing
    }
    rows = compare("study", make_losses(arms, document_noise=0.1), "abc")
    terms = [row for row in rows if row.quantity.startswith("telescoping: ")]
    assert [row.quantity.removeprefix("telescoping: ") for row in terms] == steps
    assert sum(row.value for row in terms) == pytest.approx(
        find(rows, "gain of LN").value, abs=1e-12
    )


def test_missing_arms_leave_their_rows_out():
    rows = compare("study", make_losses({"gelu": 3.0, "solu": 3.1}), "abc")
    assert {row.quantity for row in rows} == {"loss", "difference"}
    rows = compare("study", make_losses({"solu_ln": 3.0}), "abc")
    assert {row.quantity for row in rows} == {"loss"}


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
    assert find(rows, "gain of LN").low is None
    assert "19 documents are too few for an interval" in find(rows, "Phi_dyn").note


def probe_rows(arm, values, quantity="A", probe="specificity"):
    base = Row(study="s", probe=probe, quantity=quantity, value=None, unit="share", commit="c")
    return [
        replace(base, run=f"{arm}-s{seed}", arm=arm, variant=arm, seed=seed, value=value, stream=stream)
        for seed, by_stream in enumerate(values)
        for stream, value in by_stream.items()
    ]  # fmt: skip


def test_a_probe_is_confirmed_by_pairs_of_seeds_with_the_static_twin():
    """Differences .1, .2, .3, .4, .5, .6 at six seeds: p = 2 / 2^6, doubled by a second test."""
    ln = [{"natural": 0.2 + 0.1 * s, "code": 0.0 + 0.1 * s} for s in range(6)]
    static = [{"natural": 0.0, "code": 0.0} for _ in range(6)]
    rows = [
        *probe_rows("solu_ln", ln), *probe_rows("solu_frozen_ln", static),
        *probe_rows("solu_ln", [{"natural": 1.0}] * 6, "B", "scale_patching"),
        *probe_rows("solu_frozen_ln", [{"natural": 1.0}] * 6, "B", "scale_patching"),
    ]  # fmt: skip
    first, second = confirm(rows, {"specificity": "A", "scale_patching": "B"})
    assert first.quantity == "specificity: A"
    assert first.value == pytest.approx(np.mean([0.1, 0.2, 0.3, 0.4, 0.5, 0.6]))
    assert (first.p, first.p_adj) == pytest.approx((2 / 64, 4 / 64))
    assert (second.value, second.p, second.p_adj) == (0, 1, 1)
    assert (first.cluster, first.n, first.group) == ("seed", 6, "minus solu_frozen_ln")


def test_what_the_static_twin_does_not_have_is_not_confirmed():
    rows = probe_rows("solu_ln", [{"natural": 1.0}] * 3)
    rows += probe_rows("solu_frozen_ln", [{"natural": None}] * 3)
    assert confirm(rows, {"specificity": "A"}) == []
