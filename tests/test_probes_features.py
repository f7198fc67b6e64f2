"""P11, P13 and P14 against brute force, scipy and closed forms; and the labelled features they share."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats as scipy_stats

from soluscope import plugins
from soluscope.comparison.stats import bootstrap_sums
from soluscope.evaluation.calibration import control_run
from soluscope.evaluation.summaries import token_table
from soluscope.hooked.activations import HookedRun, planted
from soluscope.probes import _features, neuron_statistics, specificity, two_tier_features

pytestmark = pytest.mark.arithmetic


def run_of(mid, tokens, vocab=(), **norm) -> HookedRun:
    """Return a planted run with a token and its text at each position. [row pos d_mlp], [row pos]"""
    norm = norm or {"gain": 1.0}
    made = planted(torch.as_tensor(mid), **norm)
    return replace(made, tokens=torch.as_tensor(tokens).flatten(), vocab=tuple(vocab))


def random_run(seed=0, n_rows=40, width=51, d_mlp=12, n_kinds=6, share=0.5) -> HookedRun:
    """Return a run with a Gaussian vector per kind of token, plus noise; `share` of the variance is the kind's."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, 1 + n_kinds, (n_rows, width))
    tokens[:, 0] = 0
    own = rng.normal(size=(1 + n_kinds, d_mlp))
    own = (own - own[1:].mean(0)) / own[1:].std(0)
    noise = rng.normal(size=(n_rows, width, d_mlp))
    return run_of(np.sqrt(share) * own[tokens] + np.sqrt(1 - share) * noise, tokens)


def estimates_of(name, run):
    measured = plugins.pick("soluscope.probes", name).measure(run)
    return {(e.quantity, e.group, e.x): e for e in measured.estimates}


def halves_by_rank(run):
    """Return the pairs of neuron and feature that P11 measures, on each half of the documents."""
    return specificity._cross_fit(run, _features.label(run))


def decoded(run):
    """Return P14's probes of each feature, by stage."""
    return two_tier_features._cross_fits(run, _features.label(run))


def first_estimate(module, run):
    """Return only the first estimate: computing all of them for many runs takes minutes."""
    features = _features.label(run)
    fits = halves_by_rank(run) if module is specificity else decoded(run)
    return next(module._estimates(run, features, fits))


def halves_of(run):
    """Return (chosen on, measured on) of each fold: documents of even rank, documents of odd rank."""
    content = ~run.is_bos.numpy()
    even = pd.Series(run.string.numpy()).rank(method="dense").astype(int).to_numpy() % 2 == 1
    return [(content & even, content & ~even), (content & ~even, content & even)]


def number(estimate, weights=None):
    weights = np.ones(len(estimate.sums)) if weights is None else weights
    return float(estimate.value(weights[None] @ estimate.sums)[0])


def numbers_of(name, run):
    return {key: number(estimate) for key, estimate in estimates_of(name, run).items()}


def brute_auroc(scores, has, weights=None):
    """Return the AUROC over all pairs of a token with the feature and a token without it."""
    weights = np.ones(len(scores)) if weights is None else weights
    wins = np.sign(scores[has][:, None] - scores[~has][None]) / 2 + 0.5
    pairs = weights[has][:, None] * weights[~has][None]
    return float((wins * pairs).sum() / pairs.sum())


# --- features -------------------------------------------------------------------------------------

TEXTS = ("<|BOS|>", " the", " Foo", "(", "12", ",", " bar", ")", "\n", "0xff", "aB3x", "for")


def labelled(*texts, n_rows=24):
    """Return the texts that hold each feature, in one line of tokens that is repeated so that features count."""
    line = [0, *(TEXTS.index(text) for text in texts)]
    run = run_of(torch.zeros(n_rows, len(line), 2), [line] * n_rows, TEXTS)
    found = _features.label(run)
    holds = found.holds.reshape(len(found.names), n_rows, len(line))
    assert (holds == holds[:, :1]).all()
    assert not holds[:, :, 0].any(), "BOS has no features"
    return {
        name: [texts[i - 1] for i in np.flatnonzero(row[0])]
        for name, row in zip(found.names, holds, strict=True)
    }


def test_text_features_are_read_off_a_tokens_characters():
    found = labelled(" the", " Foo", "12", "0xff", "aB3x", "\n", "for")
    assert found["starts with a space"] == [" the", " Foo"]
    assert found["digit"] == ["12", "0xff", "aB3x"]
    assert found["lower-case letters"] == [" the", "for"]
    assert found["token ' the'"] == [" the"]
    # A label that holds at the same tokens as an earlier label is the same feature.
    assert not {"number", "hexadecimal", "base64", "new line", "keyword"} & found.keys()
    assert found["token '0xff'"] == ["0xff"]


def test_context_features_are_of_what_stands_before():
    found = labelled("(", " bar", ",", " the", ")", " bar", "\n", " Foo")
    assert found["inside brackets"] == [" bar", ",", " the", ")"]
    assert found["first in a list"] == [" bar", ","]
    assert found["later in a list"] == [" the", ")"]
    assert found["after: starts with a space"] == [",", ")", "\n"]
    assert "after: opening bracket" in found


def test_a_bracket_left_open_is_forgotten_at_the_next_row():
    assert labelled("(", " bar", "12")["inside brackets"] == [" bar", "12"]


def test_without_texts_only_which_token_it_is_is_known():
    run = random_run()
    assert _features.label(run).kinds == ("token",) * 6


def test_a_feature_counts_only_where_enough_tokens_have_it_in_both_halves():
    tokens = torch.ones(20, 12, dtype=torch.long)
    tokens[:, 0] = 0
    tokens[::2, 1] = 2  # ten in the first half of the documents, none in the second
    tokens[:, 2] = 3  # ten in each half
    found = _features.label(run_of(torch.zeros(20, 12, 2), tokens))
    assert {"token 3"} <= set(found.names)
    assert "token 2" not in found.names


@pytest.mark.parametrize("ties", [False, True])
def test_auroc_is_the_share_of_pairs_in_order(ties):
    rng = np.random.default_rng(0)
    values = rng.normal(size=(200, 3))
    values = values.round(0) if ties else values
    holds = rng.random((2, 200)) < 0.3
    found = _features.auroc(values, holds)
    for feature in range(2):
        for column in range(3):
            wanted = brute_auroc(values[:, column], holds[feature])
            assert found[feature, column] == pytest.approx(wanted, abs=1e-12)


def test_rounding_breaks_no_tie():
    values = np.array([1.0, 1.0, 0.5, 0.5, 0.0])[:, None] * (1 + 1e-13 * np.arange(5))[:, None]
    assert (np.diff(_features.levels(values), axis=0)[[0, 2]] == 0).all()
    noise = np.array([[1.0, 1e-17], [2.0, 3e-17]])
    assert (_features.levels(noise)[:, 1] == 0).all()


def test_auroc_from_sums_is_exact_for_all_documents_and_first_order_for_others():
    rng = np.random.default_rng(1)
    string = np.sort(rng.integers(0, 30, 600))
    has = rng.random(600) < 0.3
    scores = (rng.normal(size=(600, 2)) + has[:, None]).round(3)
    sums = _features.auroc_sums(scores, has, string)
    total = sums.sum(axis=0)
    weights = rng.normal(size=30)
    errors = []
    for step in (0.0, 0.1, 0.01):
        drawn = 1 + step * weights
        found = _features.auroc_of(drawn[None] @ sums, total)[0]
        wanted = [brute_auroc(column, has, drawn[string]) for column in scores.T]
        errors.append(np.abs(found - wanted).max())
    assert errors[0] < 1e-12
    assert errors[2] < errors[1] / 50, "the error is of second order"


def test_sums_by_document_are_pandas():
    rng = np.random.default_rng(2)
    columns, string = rng.normal(size=(100, 3)), rng.integers(0, 9, 100)
    wanted = pd.DataFrame(columns).groupby(string).sum().to_numpy()
    np.testing.assert_allclose(_features.sums_by_document(columns, string), wanted)


# --- P11 ------------------------------------------------------------------------------------------


def brute_specificity(values, n, has):
    """Return P(feature) in ranks n/2^b to n/2^(b-1) from the top, b = 1..4, with each token cut into 16."""
    order = np.argsort(-values)
    fine = np.repeat(has[order], 16)
    return [fine[n * 16 // 2**b : n * 16 // 2 ** (b - 1)].mean() for b in (1, 2, 3, 4)]


def test_specificity_is_a_count_over_sorted_activations():
    run = random_run(seed=3)
    # Seeded, so that no two activations differ by less than a millionth, which the probe counts as a tie.
    scale = torch.from_numpy(np.random.default_rng(3).random(len(run.pos)) + 0.1)
    run = replace(run, scale=scale)
    found = numbers_of("specificity", run)
    mid, gain = run.mid.numpy(), run.gain.numpy()[:, None]
    labels = np.stack([run.tokens.numpy() == token for token in range(1, 7)])
    stages = {
        "before": mid,
        "gain only": gain * mid,
        "centring only": mid - mid.mean(1, keepdims=True),
        "both": gain * (mid - mid.mean(1, keepdims=True)),
    }
    spec = {stage: [] for stage in stages}
    aurocs = []
    for chosen, measured in halves_of(run):
        for neuron in range(mid.shape[1]):
            scores = [brute_auroc(mid[chosen, neuron], has[chosen]) for has in labels]
            has = labels[int(np.argmax(scores))][measured]
            n = int((mid[measured, neuron] > 0).sum())
            for stage, values in stages.items():
                spec[stage].append(brute_specificity(values[measured, neuron], n, has))
            aurocs.append(brute_auroc(mid[measured, neuron], has))
    for part in ("gain only", "centring only", "both"):
        wanted = np.mean(spec["before"]) - np.mean(spec[part])
        assert found[f"A ({part})", "", None] == pytest.approx(wanted, abs=1e-12)
    assert found["specificity", "before", 1.0] == pytest.approx(np.mean(spec["before"], axis=0)[0])
    assert found["AUROC of the matched neurons", "", None] == pytest.approx(np.mean(aurocs))


def test_a_neuron_counts_once_for_each_half_that_chose_it():
    """Neuron 0 fires in only one half of the documents, neuron 1 in both halves, each at a different token."""
    tokens = torch.tensor([[0, *[1, 2, 3] * 12]]).repeat(24, 1)
    mid = torch.stack([(tokens == 1) * 2.0, (tokens == 2) * 2.0, 0 * tokens], dim=-1)
    mid[1::2, :, 0] = 0
    second, first = halves_by_rank(run_of(mid, tokens))
    assert (second.holds.shape[1], first.holds.shape[1]) == (2, 1)
    found = numbers_of("specificity", run_of(mid, tokens))
    # Neuron 0 is silent in the half where it is measured. Neuron 1 identifies its token in both halves.
    assert found["AUROC of the matched neurons", "", None] == pytest.approx((1 / 2 + 1 + 1) / 3)


def test_a_gain_that_is_constant_has_no_signature_of_its_own():
    run = random_run(seed=4)
    assert numbers_of("specificity", run)["A (gain only)", "", None] == pytest.approx(0, abs=1e-3)


def test_a_norm_that_does_not_centre_has_none_by_centring():
    run = random_run(seed=4)
    run = replace(run, post=run.mid, centres=False)
    found = numbers_of("specificity", run)
    assert found["A (centring only)", "", None] == 0


def test_a_feature_chosen_on_the_same_tokens_looks_specific_where_there_is_none():
    """The published method finds a neuron for every feature. On held-out documents no neuron is specific."""
    rng = np.random.default_rng(5)
    tokens = rng.integers(1, 9, (20, 33))
    tokens[:, 0] = 0
    run = run_of(rng.normal(size=(20, 33, 24)), tokens)
    found = numbers_of("specificity", run)
    base_rate = 1 / 8
    assert found["AUROC of the matched neurons", "", None] == pytest.approx(0.5, abs=0.03)
    content = ~run.is_bos.numpy()
    published = specificity._matched(run, _features.label(run), content, content)
    aurocs = [
        brute_auroc(values, has)
        for values, has in zip(published.values["before"].T, published.holds.T, strict=True)
    ]
    assert np.mean(aurocs) > 0.54
    assert found["specificity", "before", 1.0] == pytest.approx(base_rate, abs=0.03)


def test_permuting_tokens_leaves_no_signature():
    """The model is the one with the strongest signature."""
    run = control_run("smear_graded", "natural")
    content = (~run.is_bos).nonzero().squeeze(-1)
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(20):
        tokens = run.tokens.clone()
        order = torch.randperm(len(content), generator=generator)
        tokens[content] = tokens[content[order]]
        made = first_estimate(specificity, replace(run, tokens=tokens))
        assert made.quantity == "A (gain only)"
        found.append(number(made))
    assert abs(np.mean(found)) < 3 * np.std(found) / np.sqrt(20)
    assert max(np.abs(found)) < 0.05


# --- P13 ------------------------------------------------------------------------------------------


def test_skewness_and_kurtosis_are_scipys():
    run = random_run(seed=6, share=0.9)
    run = replace(run, mid=run.mid.exp())
    table = neuron_statistics.measure(run).neurons
    content = run.mid[~run.is_bos].numpy()
    skewness, kurtosis = scipy_stats.skew(content), scipy_stats.kurtosis(content)
    np.testing.assert_allclose(table["skewness: mid"], skewness, rtol=1e-9)
    np.testing.assert_allclose(table["excess kurtosis: mid"], kurtosis, rtol=1e-9)
    density = np.abs(content).mean(0) ** 2 / (content**2).mean(0)
    np.testing.assert_allclose(table["density: mid"], density, rtol=1e-9)
    found = numbers_of("neuron_statistics", run)
    assert found["skewness: mid", "", None] == pytest.approx(np.median(skewness))
    assert found["excess kurtosis: mid", "", None] == pytest.approx(np.median(kurtosis))


def test_the_interval_of_a_kurtosis_follows_its_first_order_in_the_weights():
    run = random_run(seed=7, d_mlp=1)
    run = replace(run, mid=run.mid.exp())
    made = estimates_of("neuron_statistics", run)
    content = run.subset(~run.is_bos)
    x = content.mid[:, 0].numpy()
    tilt = np.random.default_rng(0).normal(size=40)

    def brute(weights, power):
        w = weights[content.string.numpy()]
        z = x - np.average(x, weights=w)
        return np.average(z**power, weights=w) / np.average(z**2, weights=w) ** (power / 2)

    for name, power in (("skewness", 3), ("excess kurtosis", 4)):
        errors = []
        for step in (0.1, 0.01):
            weights = 1 + step * tilt
            wanted = brute(weights, power) - (3 if power == 4 else 0)
            errors.append(abs(number(made[f"{name}: mid", "", None], weights) - wanted))
        assert errors[1] < errors[0] / 50, "the error is of second order"


def test_a_neuron_that_never_varies_has_no_shape_and_spoils_no_median():
    run = random_run(seed=8)
    mid = run.mid.clone()
    mid[:, 0] = 0.3
    run = replace(run, mid=mid)
    table = neuron_statistics.measure(run).neurons
    assert table["excess kurtosis: mid"][0].isnan()
    wanted = np.median(scipy_stats.kurtosis(mid[~run.is_bos, 1:].numpy()))
    found = numbers_of("neuron_statistics", run)["excess kurtosis: mid", "", None]
    assert found == pytest.approx(wanted)


def test_a_neuron_that_varies_by_rounding_never_varies():
    run = random_run(seed=8)
    mid = run.mid.clone()
    mid[:, 0] = 0.3 * (1 + 2e-16 * (torch.arange(len(mid)).double() % 4))
    assert mid[:, 0].unique().numel() > 1
    table = neuron_statistics.measure(replace(run, mid=mid)).neurons
    for name in ("skewness", "excess kurtosis", "token information"):
        assert table[f"{name}: mid"][0].isnan()
        assert table[f"{name}: mid"][1:].isfinite().all()


def test_a_rotated_basis_is_not_privileged():
    """C10, and the same activations in another basis."""
    run = control_run("monosemantic", "natural")
    rotation = scipy_stats.ortho_group(32, seed=np.random.default_rng(1)).rvs()
    rotated = replace(run, mid=run.mid @ torch.from_numpy(rotation))
    quantity = ("privileged basis: mid", "", None)
    own, other = (numbers_of("neuron_statistics", r)[quantity] for r in (run, rotated))
    assert own > 20
    assert abs(other) < 0.05 * own


def test_solu_of_gaussians_has_the_gaussians_kurtosis():
    run = random_run(seed=9, n_rows=400, share=0.0, d_mlp=16)
    pre = 0.4 * run.pre

    def solu(pre):
        return pre * pre.softmax(-1)

    run = replace(run, pre=pre, mid=solu(pre), mlp=replace(run.mlp, nonlinearity=solu))
    found = numbers_of("neuron_statistics", run)
    assert found["excess kurtosis: pre", "", None] == pytest.approx(0, abs=0.1)
    assert found["excess kurtosis: mid", "", None] > 2, "SoLU makes tails"
    assert found["kurtosis over Gaussian: mid", "", None] == pytest.approx(0, abs=0.4)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.8])
def test_token_information_is_the_share_of_variance_between_tokens(share):
    """The share is known by construction. Noise in the means that predict does not lower the estimate."""
    runs = [random_run(seed, n_rows=40, n_kinds=60, share=share) for seed in range(8)]
    found = [
        numbers_of("neuron_statistics", run)["token information: pre", "", None] for run in runs
    ]
    assert np.mean(found) == pytest.approx(share, abs=0.03)


def test_one_document_alone_has_no_token_information_and_all_else():
    found = numbers_of("neuron_statistics", random_run(n_rows=1))
    assert np.isnan(found["token information: mid", "", None])
    assert np.isfinite(found["excess kurtosis: mid", "", None])


def test_the_three_counts_of_neurons_agree_where_k_are_alike():
    """For k equal activations of N: participation ratio k, K_eff k, active share k / N."""
    mid = torch.zeros(1, 3, 8)
    mid[0, 0, :1], mid[0, 1, :4], mid[0, 2, :] = 2.0, 0.5, -1.0
    found = neuron_statistics.measure(planted(mid, gain=1.0)).tokens
    for name in ("participation ratio", "K_eff"):
        assert found[f"{name}: mid"].tolist() == pytest.approx([1, 4, 8])
    assert found["active neurons: mid"].tolist() == pytest.approx([1 / 8, 4 / 8, 1])


# --- P14 ------------------------------------------------------------------------------------------


def test_the_probe_on_one_neuron_is_the_best_neuron_of_the_other_half():
    run = random_run(seed=10)
    features = _features.label(run)
    sums = decoded(run)["mid"].sums
    found = two_tier_features._mean_aurocs(sums.sum(axis=0)[None], sums)[0, :, 0]
    mid = run.mid.numpy()
    for feature, holds in enumerate(features.holds):
        aurocs = []
        for fitted, tested in halves_of(run):
            has = mid[fitted & holds]
            difference = (has.mean(0) - mid[fitted & ~holds].mean(0)) / mid[fitted].std(0)
            best = int(np.abs(difference).argmax())
            scores = mid[tested, best] * np.sign(difference[best])
            aurocs.append(brute_auroc(scores, holds[tested]))
        assert found[feature] == pytest.approx(np.mean(aurocs))


def test_the_full_probe_is_ridge_regression():
    """The reference is least squares with a penalty, by lstsq on augmented rows."""
    run = random_run(seed=11)
    features = _features.label(run)
    directions = decoded(run)["mid"].directions
    for (fitted_on, _), of_fold in zip(halves_of(run), directions, strict=True):
        x = run.mid.numpy()[fitted_on]
        z = (x - x.mean(0)) / x.std(0)
        k = z.shape[1]
        for holds, found in zip(features.holds, of_fold, strict=True):
            y = holds[fitted_on] - holds[fitted_on].mean()
            rows = np.concatenate([z, np.sqrt(k) * np.eye(k)])
            target = np.concatenate([y, np.zeros(k)])
            wanted = np.linalg.lstsq(rows, target, rcond=None)[0] / x.std(0)
            cosine = found @ wanted / np.linalg.norm(found) / np.linalg.norm(wanted)
            assert cosine == pytest.approx(1, abs=1e-10)


def test_where_nothing_is_found_the_two_halves_find_the_same():
    """The halves agree, so the mean of their AUROCs is as uncertain as each, and its draws spread as widely."""
    rng = np.random.default_rng(13)
    tokens = rng.integers(1, 51, (40, 65))
    tokens[:, 0] = 0
    run = run_of(rng.normal(size=(40, 65, 32)), tokens)
    sums = decoded(run)["mid"].sums[:, :, :, -1:]
    total = sums.sum(axis=0)
    first, second = _features.auroc_of(total.reshape(1, -1), total.ravel()).reshape(2, -1)
    # .94 is expected: .98 for the lengths of 32 Gaussians, and .98 twice for ranks instead of means.
    assert np.corrcoef(first, second)[0, 1] > 0.85
    mean = two_tier_features._mean_aurocs(total[None], sums)[0, :, 0]
    np.testing.assert_allclose(mean, (first + second) / 2, atol=1e-12)
    weights = rng.multinomial(40, np.full(40, 1 / 40), size=2000).astype(float)
    drawn = (weights @ sums.reshape(40, -1)).reshape(-1, *total.shape)
    of_mean = two_tier_features._mean_aurocs(drawn, sums)[:, :, 0].std(axis=0)
    of_each = _features.auroc_of(drawn.reshape(2000, -1), total.ravel()).std(axis=0).reshape(2, -1)
    np.testing.assert_allclose(of_mean, np.sqrt((of_each**2).mean(axis=0)), rtol=0.1)


def spread_run(n_spread, n_rows=60):
    """Return two kinds of tokens, distinguished by the mean of `n_spread` of 64 noisy neurons, at gains 1 and e."""
    rng = np.random.default_rng(12)
    tokens = rng.integers(1, 3, (n_rows, 41))
    tokens[:, 0] = 0
    mid = rng.normal(size=(n_rows, 41, 64))
    mid[:, :, :n_spread] += 2.5 / np.sqrt(n_spread) * (tokens == 1)[:, :, None]
    run = run_of(mid, tokens)
    return replace(run, scale=torch.where(run.tokens == 1, np.exp(-1.0), 1.0).double())


def test_the_index_grows_with_the_neurons_that_a_feature_is_spread_over():
    found = [numbers_of("two_tier_features", spread_run(n)) for n in (1, 4, 64)]
    index = [one["distribution index: mid", "", None] for one in found]
    assert index[0] == 1
    assert 2 <= index[1] <= 4
    assert index[2] > 16
    assert [one["tier gap: mid", "", None] for one in found] == [0, 0, 1]
    # The AUROC of two Gaussians 2.5 apart, with all neurons that carry the feature.
    wanted = scipy_stats.norm.cdf(2.5 / np.sqrt(2)) - 0.5
    assert found[0]["AUROC above chance: mid", "", None] == pytest.approx(wanted, abs=0.02)


def test_the_second_tier_of_the_shared_code_is_its_b_tokens_at_their_gain():
    """C1: from mid, an A token needs one neuron and a B token all 32. After the norm, no token needs many."""
    run = control_run("smear_shared", "natural")
    features = _features.label(run)
    index = {stage: fits.index_of_all() for stage, fits in decoded(run).items()}
    for name, kind, before, after in zip(
        features.names, features.kinds, index["mid"], index["post"], strict=True
    ):
        if kind == "token":
            assert (before, after <= 8) == (1 if name.startswith("token 'A") else 32, True), name


def test_removing_a_direction_is_what_brute_force_hooks_do():
    planted_model = plugins.pick("soluscope.controls", "smear_shared").build()
    run = control_run("smear_shared", "natural")
    tokens = planted_model.streams["natural"].tokens
    target = run.target.clamp(min=0)[:, None]
    own = -planted_model.model(tokens).log_softmax(-1).flatten(0, 1).gather(-1, target).squeeze(-1)
    total, count = (torch.zeros(len(run.pos), dtype=torch.float64) for _ in range(2))
    features = _features.label(run)
    directions = decoded(run)["post"].directions
    for fold, (chosen, measured) in enumerate(halves_of(run)):
        # This half alone, as if it were the whole run, with probes of all sizes.
        half = run.subset(torch.from_numpy(chosen))
        own_labels = replace(features, holds=features.holds[:, chosen])
        of_mid, of_post = (
            two_tier_features._cross_fit(
                half, stage, own_labels, ~half.is_bos.numpy()
            ).index_of_all()
            for stage in ("mid", "post")
        )
        mean = half.post.mean(0)
        for feature in np.flatnonzero(~np.isnan(of_post) & ~(of_mid <= 16)):
            w = torch.from_numpy(directions[fold, feature])
            w = w / w.norm()

            def edit(post, hook, w=w, mean=mean):
                return post - ((post - mean) @ w)[..., None] * w

            hooks = [("blocks.0.mlp.hook_post", edit)]
            log_p = planted_model.model.run_with_hooks(tokens, fwd_hooks=hooks).log_softmax(-1)
            loss = -log_p.flatten(0, 1).gather(-1, target).squeeze(-1)
            here = torch.from_numpy(features.holds[feature] & measured) & (run.target >= 0)
            if int(here.sum()) > two_tier_features.MAX_REMOVED:
                kept = here.nonzero().squeeze(-1)
                some = np.linspace(0, len(kept) - 1, two_tier_features.MAX_REMOVED).astype(int)
                here = torch.zeros_like(here)
                here[kept[some]] = True
            total += torch.where(here, (loss - own).detach(), 0.0)
            count += here
    found = two_tier_features.measure(run).tokens[two_tier_features.REMOVED["many"]]
    assert int((count > 0).sum()) > 100
    torch.testing.assert_close(found, total / count, rtol=0, atol=1e-10, equal_nan=True)


# --- both ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["specificity", "two_tier_features"])
@pytest.mark.parametrize(("n_rows", "width"), [(1, 200), (2, 200), (3, 200), (2, 5), (24, 2)])
def test_where_nothing_can_be_labelled_nothing_is_estimated(name, n_rows, width):
    """A half has at most one document, or there are too few tokens."""
    run = random_run(n_rows=n_rows, width=width)
    probe = plugins.pick("soluscope.probes", name)
    measured = probe.measure(run)
    table = token_table(run, measured)
    assert table[list(probe.quantities)].isna().all(axis=None)
    assert measured.estimates == ()


@pytest.mark.parametrize("name", ["specificity", "two_tier_features"])
def test_a_few_long_documents_are_measured_without_an_interval(name):
    run = random_run(n_rows=4, width=200)
    for estimate in estimates_of(name, run).values():
        interval = bootstrap_sums(estimate.sums, estimate.value, estimate.n)
        assert (interval.low, interval.n_clusters) == (None, 4)


@pytest.mark.parametrize(
    ("name", "quantity"),
    [
        ("specificity", "A (gain only)"),
        ("specificity", "AUROC of the matched neurons"),
        ("two_tier_features", "AUROC above chance: mid"),
        ("two_tier_features", "AUROC above chance: post"),
    ],
)
def test_every_document_is_a_cluster_and_30_have_an_interval(name, quantity):
    run = spread_run(8, n_rows=30)
    scale = torch.rand(
        run.pos.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    run = replace(run, scale=scale + 0.5)
    table = token_table(run, plugins.pick("soluscope.probes", name).measure(run))
    measured = table.drop(columns=["string", "pos", "token"]).notna().any(axis=1)
    assert table.string[measured].nunique() == 30
    estimate = estimates_of(name, run)[quantity, "", None]
    interval = bootstrap_sums(estimate.sums, estimate.value, estimate.n)
    assert (interval.n_clusters, interval.n) == (30, 30 * 40)
    assert interval.low < interval.value < interval.high


def with_another_document(run, document):
    """Return the run with one document's labels permuted and its activations replaced."""
    rng = np.random.default_rng(14)
    here = ((run.string == document) & ~run.is_bos).nonzero().squeeze(-1)
    tokens, mid, post = run.tokens.clone(), run.mid.clone(), run.post.clone()
    tokens[here] = tokens[here[rng.permutation(len(here))]]
    for values in (mid, post):
        noise = rng.normal(size=(len(here), values.shape[1]))
        values[here] = torch.from_numpy(noise).to(values.dtype) * 3 * values.std()
    return replace(run, tokens=tokens, mid=mid, post=post)


def test_the_pairs_that_a_document_is_measured_on_are_not_its_choice():
    run = random_run(seed=15, n_rows=24, d_mlp=64, n_kinds=12, share=0.1)
    other = with_another_document(run, 7)
    same = []
    for before, after in zip(halves_by_rank(run), halves_by_rank(other), strict=True):
        elsewhere = before.string != 7
        same.append(
            np.array_equal(before.values["before"][elsewhere], after.values["before"][elsewhere])
            and np.array_equal(before.holds[elsewhere], after.holds[elsewhere])
        )
        assert same[-1] == (7 in before.string)
    assert sorted(same) == [False, True], "a choice that it had a part in does change"


def test_what_is_removed_from_a_document_is_not_its_choice():
    run = control_run("smear_shared", "natural")
    strings = run.string.unique().tolist()
    document = strings[7]
    other = with_another_document(run, document)
    before, after = (two_tier_features.measure(one).tokens for one in (run, other))
    with_it = np.isin(run.string.numpy(), strings[1::2])
    own = run.string.numpy() == document
    for name in two_tier_features.REMOVED.values():
        one, two = before[name].numpy(), after[name].numpy()
        # Losses are a few nats. The order of their sums over 32 neurons depends on the number of tokens.
        np.testing.assert_allclose(one[with_it & ~own], two[with_it & ~own], rtol=0, atol=1e-12)
    one, two = (found[two_tier_features.REMOVED["many"]].numpy() for found in (before, after))
    assert np.nanmax(np.abs(one - two)[~with_it]) > 1e-6, "it has a part there"


def test_permuting_tokens_leaves_nothing_to_decode():
    run = control_run("monosemantic", "natural")
    run = run.subset(run.string < 64)
    generator = torch.Generator().manual_seed(1)
    content = (~run.is_bos).nonzero().squeeze(-1)
    found = []
    for _ in range(40):
        tokens = run.tokens.clone()
        tokens[content] = tokens[content[torch.randperm(len(content), generator=generator)]]
        made = first_estimate(two_tier_features, replace(run, tokens=tokens))
        assert made.quantity == "AUROC above chance: post"
        found.append(bootstrap_sums(made.sums, made.value, made.n, n_draws=500))
    values = [interval.value for interval in found]
    assert abs(np.mean(values)) < 3 * np.std(values) / np.sqrt(40)
    # By chance, 2 of 40 intervals exclude 0 on average, and more than 6 do so in one of 300 series.
    assert sum(not interval.low < 0 < interval.high for interval in found) <= 6
