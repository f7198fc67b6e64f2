"""Neurons' examples, ranges, rules and effects, against brute force, hooks in fp64 and planted models."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch
from test_report import make_rows
from torch import Tensor

import soluscope
from soluscope import UserError, plugins, results
from soluscope.config import NeuronsConfig
from soluscope.controls import Planted
from soluscope.evaluation import suite
from soluscope.hooked.activations import HookedRun, observe, observe_blocks
from soluscope.neurons import describe, look, rules, site, stored
from soluscope.neurons.checking import COLUMNS
from soluscope.neurons.compute import compute
from soluscope.neurons.scan import Scanned, scan
from soluscope.neurons.schema import (
    BINS_BELOW,
    BINS_OF_RANGE,
    CONTEXT,
    N_BINS,
    N_OF_RANGE,
    N_RANGES,
    N_TOP,
    SIDES,
    STAGES,
    TOP,
)
from soluscope.neurons.selection import NONE, SampleByRange, TopByDocument
from soluscope.rating import scored
from soluscope.rating.records import publish_proxies
from soluscope.rating.settings import ProxyConfig
from soluscope.report import neurons as report_neurons
from soluscope.report import page
from soluscope.results import (
    READABILITY,
    Measurement,
    NeuronFound,
    Proxied,
    ProxyTerm,
    Untrained,
    of_kind,
)
from soluscope.runs.folder import Run

GATE = 1e-9


@cache
def planted(name: str) -> Planted:
    found: Planted = plugins.pick("soluscope.controls", name).build()
    return found


@cache
def scanned(name: str) -> Scanned:
    return scan(planted(name).model, planted(name).streams["natural"])


@cache
def observed(name: str) -> HookedRun:
    """Return the whole run without BOS, in the order of the scan."""
    run = observe(planted(name).model, planted(name).streams["natural"])
    return run.subset(~run.is_bos)


def blocks_of(n: int, seed: int) -> list[slice]:
    cuts = np.random.default_rng(seed).choice(np.arange(1, n), 7, replace=False)
    bounds = [0, *sorted(cuts.tolist()), n]
    return [slice(a, b) for a, b in pairwise(bounds)]


# --- selection ------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_top_examples_are_those_of_a_sort_of_the_whole_text(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(9, (400, 5), generator=generator).double()  # many are equal
    owner = torch.randint(3, (400,), generator=generator).cumsum(0) // 6
    found = TopByDocument(N_TOP, 5, values)
    for some in blocks_of(400, seed):
        found.add(values[some], owner[some], 10 * torch.arange(400)[some])
    top, places = found.result()
    for neuron in range(5):
        first: dict[int, int] = {}
        for token in sorted(range(400), key=lambda t: (-float(values[t, neuron]), t)):
            first.setdefault(int(owner[token]), token)
        wanted = list(first.values())[:N_TOP]
        assert places[:, neuron].tolist() == [10 * token for token in wanted]
        assert top[:, neuron].tolist() == values[wanted, neuron].tolist()


def test_fewer_documents_than_examples_give_one_example_each() -> None:
    found = TopByDocument(N_TOP, 2, torch.zeros(1))
    found.add(torch.tensor([[1.0, 4.0], [3.0, 2.0]]), torch.tensor([7, 7]), torch.tensor([5, 6]))
    values, places = found.result()
    assert values.tolist() == [[3.0, 4.0]]
    assert places.tolist() == [[6, 5]]


@pytest.mark.parametrize("seed", range(3))
def test_a_ranges_sample_is_its_tokens_of_lowest_priority_however_the_text_is_cut(
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    ranges = (torch.rand(300, 4, generator=generator) ** 4 * N_RANGES).long()  # high ones are rare
    found = SampleByRange(N_OF_RANGE, 4, 300, torch.zeros(1), seed)
    every = torch.arange(300)
    for some in blocks_of(300, seed):
        found.add(ranges[some], every[some])
    priority, result = found.priorities(every), found.result()
    for number in range(N_RANGES):
        for neuron in range(4):
            inside = (ranges[:, neuron] == number).nonzero().squeeze(-1)
            wanted = inside[priority[inside, neuron].argsort(stable=True)][:N_OF_RANGE].tolist()
            assert result[number, :, neuron].tolist() == wanted + [NONE] * (
                N_OF_RANGE - len(wanted)
            )


def test_every_token_of_a_range_is_sampled_equally_often() -> None:
    n, n_neurons = 40, 4000  # neurons are independent turns of the same priorities
    found = SampleByRange(N_OF_RANGE, n_neurons, n, torch.zeros(1))
    found.add(torch.zeros(n, n_neurons, dtype=torch.long), torch.arange(n))
    counts = torch.bincount(found.result()[0].flatten(), minlength=n)
    # A neuron's sample are the first 5 of 40 points from a random start; gaps between points differ.
    assert counts.sum() == N_OF_RANGE * n_neurons
    assert counts.min() > 0


# --- the scan -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["smear_graded", "monosemantic", "lateral"])
def test_the_scan_agrees_with_the_whole_text_at_once(name: str) -> None:
    result, run = scanned(name), observed(name)
    assert result.n_tokens == len(run.pos)
    for stage in STAGES:
        values = getattr(run, stage)
        low, width = result.scales[stage]
        assert torch.equal(
            low, values.median(0).values
        )  # the first look reads a short text in full
        units = ((values - low) / width).numpy()
        moments = [np.mean(units**power, axis=0) for power in (1, 2, 3, 4)]
        assert np.allclose(result.moments[stage].numpy(), moments, rtol=1e-9, atol=1e-12)
        bins = np.clip(np.floor(units * BINS_OF_RANGE) + BINS_BELOW, 0, N_BINS - 1).astype(int)
        wanted = [np.bincount(column, minlength=N_BINS) for column in bins.T]
        assert (result.histogram[stage].numpy() == wanted).all()
        assert torch.equal(result.top[stage][0][0], values.amax(0))


@pytest.mark.parametrize("name", ["smear_graded", "lateral"])
def test_kurtosis_and_spread_are_scipys(name: str) -> None:
    examples = look.examples(planted(name).model, planted(name).streams["natural"], scanned(name))
    d_mlp = observed(name).mid.shape[1]
    table = describe.statistics(scanned(name), torch.ones(d_mlp), examples)
    for stage in STAGES:
        values = getattr(observed(name), stage).numpy()
        live = np.isfinite(table[f"width_{stage}"])
        kurtosis = scipy.stats.kurtosis(values, fisher=False)
        assert np.allclose(table[f"kurtosis_{stage}"][live], kurtosis[live], rtol=1e-6)
        assert np.allclose(table[f"sd_{stage}"][live], values.std(0)[live], rtol=1e-6)
        assert np.allclose(table[f"mean_{stage}"][live], values.mean(0)[live], atol=1e-9)


def test_counts_of_rules_are_those_of_a_loop_over_tokens() -> None:
    result, run = scanned("smear_graded"), observed("smear_graded")
    whole = observe(planted("smear_graded").model, planted("smear_graded").streams["natural"])
    labels = result.rules.labels(whole)[~whole.is_bos].double()
    columns = torch.cat(
        [labels, torch.ones(len(run.pos), 1), run.k_eff[:, None], run.engagement[:, None]], dim=1
    )
    half = run.string.unique(return_inverse=True)[1] % 2
    for stage in SIDES:
        units = result.scales[stage].units(getattr(run, stage))
        of_range = (units * BINS_OF_RANGE).floor().clamp(
            0, BINS_OF_RANGE * N_RANGES - 1
        ) // BINS_OF_RANGE
        for number in range(2):
            for level in (0, 1, 4, 9):
                reached = ((of_range >= level) & (half == number)[:, None]).double()
                wanted = torch.einsum("tc,tn->cn", columns, reached)
                assert torch.allclose(result.counts[stage][number, :, level], wanted, rtol=1e-6)


# --- examples -------------------------------------------------------------------------------------


def test_an_examples_window_holds_the_text_and_the_activations_around_its_token() -> None:
    name = "smear_graded"
    stream, model = planted(name).streams["natural"], planted(name).model
    table = look.examples(model, stream, scanned(name))
    width = stream.tokens.shape[1]
    run = observe(model, stream)
    for row in table.iloc[:: len(table) // 50].itertuples():
        start, stop = max(1, row.pos - CONTEXT), min(width, row.pos + CONTEXT + 1)
        assert row.tokens.tolist() == stream.tokens[row.row, start:stop].tolist()
        assert row.peak == row.pos - start
        for stage in STAGES:
            wanted = getattr(run, stage).view(-1, width, 32)[row.row, start:stop, row.neuron]
            assert np.allclose(getattr(row, stage), wanted, rtol=1e-6, atol=1e-7)
    assert (table.groupby(["neuron", "stage", "range"])["rank"].max() < N_TOP).all()


def with_hooks(model: Any, tokens: Tensor, neuron: int | None, gain: float | None) -> Tensor:
    """Return the losses of a row with one neuron's post at 0 and one gain for all tokens, by hooks."""
    hooks = []
    if gain is not None:
        hooks.append(
            ("blocks.0.mlp.ln.hook_scale", lambda value, hook: torch.full_like(value, 1 / gain))
        )
    if neuron is not None:

        def silence(value: Tensor, hook: Any) -> Tensor:
            value[..., neuron] = 0
            return value

        hooks.append(("blocks.0.mlp.hook_post", silence))
    with torch.no_grad():
        logits = model.run_with_hooks(tokens[None], fwd_hooks=hooks)[0]
    return torch.nn.functional.cross_entropy(logits[:-1], tokens[1:], reduction="none")


def test_effects_are_those_of_hooks() -> None:
    name = "smear_graded"
    stream, model = planted(name).streams["natural"], planted(name).model
    table = look.examples(model, stream, scanned(name))
    gain = math.exp(float(observed(name).gain.log().mean()))
    assert math.isclose(math.exp(scanned(name).log_gain), gain, rel_tol=1e-9)
    for row in table.iloc[:: len(table) // 25].itertuples():
        tokens = stream.tokens[row.row]
        if row.pos == len(tokens) - 1:
            assert math.isnan(row.effect)
            continue
        live, off, fixed, fixed_off = (
            float(with_hooks(model, tokens, neuron, held)[row.pos])
            for held in (None, gain) for neuron in (None, row.neuron)
        )  # fmt: skip
        assert math.isclose(row.effect, off - live, rel_tol=1e-5, abs_tol=1e-7)
        assert math.isclose(row.D, (off - live) - (fixed_off - fixed), rel_tol=1e-5, abs_tol=1e-7)


def test_blocks_without_losses_have_the_same_activations() -> None:
    stream, model = planted("lateral").streams["natural"], planted("lateral").model
    (short,) = observe_blocks(model, stream, with_loss=False)
    long = observe(model, stream)
    for name in ("tokens", "target", "pre", "mid", "post", "scale", "resid_mid"):
        assert torch.equal(getattr(short, name), getattr(long, name)), name
    assert short.loss.isnan().all()


# --- rules ----------------------------------------------------------------------------------------


def test_rules_hold_where_a_reader_would_say_so() -> None:
    vocab = (
        "<|BOS|>", "def", " Trend", "ing", "(", "12", ",", "\n    ", "x", ")", " DEAD", "aGVs9Q==", "0x1f",
    )  # fmt: skip
    tokens = torch.tensor([0, 1, 2, 3, 4, 5, 6, 8, 9, 7, 8, 10, 7, 11, 7, 12])
    run = monosemantic_run(tokens)
    made = rules.make(vocab, [8], [1])
    labels = made.labels(run)
    where = {
        name: [vocab[token] for token in tokens[labels[:, column]].tolist()]
        for column, name in enumerate(made.names)
    }
    assert where["keyword"] == ["def"]
    assert where["after: keyword"] == where["after the token 'def'"] == [" Trend"]
    assert where["continues a word"] == where["ends a word of several tokens"] == ["ing"]
    assert where["a line's indentation"] == ["\n    "] * 3
    assert where["starts a word of several tokens"] == [" Trend"]
    assert where["number before a comma"] == ["12"]
    assert where["inside brackets"] == ["12", ",", "x", ")"]
    assert where["all capitals"] == [" DEAD"]
    assert where["base64"] == ["aGVs9Q=="]
    assert where["hexadecimal"] == ["0x1f"]
    assert where["the token 'x'"] == ["x", "x"]
    assert where["first token of the row"] == ["def"]
    assert where["start of a line"] == ["x", "aGVs9Q==", "0x1f"]
    assert len(made.names) == len(made.kinds) == labels.shape[1]


def monosemantic_run(tokens: Tensor) -> HookedRun:
    """Return a run whose text is these tokens; its activations are of no interest."""
    run = observed("monosemantic").subset(torch.arange(len(tokens)))
    values = vars(run) | {"tokens": tokens, "pos": torch.arange(len(tokens))}
    return HookedRun(
        **{key: value for key, value in values.items() if key in HookedRun.__dataclass_fields__}
    )


def test_each_monosemantic_neuron_is_found_by_its_rule() -> None:
    table = describe.best_rules(scanned("monosemantic"))
    described = table[table["neuron"] < 13]  # the classes that are defined by characters
    assert len(described) == 26
    by_rule_alone = described[
        described["neuron"] < 12
    ]  # "bed" ends in -ed and is not in the class of -ing
    for stage in SIDES:
        assert (described[f"precision_{stage}"] == 1).all()
        assert (by_rule_alone[f"f1_{stage}"] == 1).all()
    names = described[described["side"] == "mid"]["rule"].tolist()
    assert names[:5] == [
        "digit",
        "starts with a capital",
        "opening bracket",
        "closing bracket",
        "operator",
    ]


def test_no_polysemantic_neuron_has_a_rule() -> None:
    table = describe.best_rules(scanned("polysemantic"))
    assert table[["f1_mid", "f1_post"]].max(axis=None) < 0.75
    assert table[["precision_mid", "precision_post"]].median(axis=None) < 0.4


def test_the_norm_of_the_graded_smear_lifts_tokens_that_do_not_fit() -> None:
    """A neuron's own token has 4, B tokens .06: only after the norm B tokens are above a typical token."""
    table = describe.best_rules(scanned("smear_graded"))
    own = table[(table["side"] == "mid") & (table["kind"] == "token") & (table["f1_mid"] > 0.6)]
    assert len(own) >= 3
    assert (own["above_mid"] > 0.5).all()
    assert (own["drop"] > 0.4).all()
    after = table[table["side"] == "post"]
    only_after = after[(after["f1_post"] - after["f1_mid"] > 0.3)]
    assert len(only_after) >= 3  # rules about B tokens, which are found only after the norm


def test_a_pinned_norm_changes_no_neurons_rule() -> None:
    table = describe.best_rules(scanned("pinned")).dropna(subset=["f1_mid"])
    assert len(table) >= 32
    for before, after in (("f1_mid", "f1_post"), ("above_mid", "above_post")):
        assert np.allclose(table[before], table[after], atol=GATE)
    assert (table["drop"].abs() < GATE).all()


def test_a_neurons_own_tokens_have_the_k_and_r_of_a_loop() -> None:
    name, run = "smear_graded", observed("smear_graded")
    table = describe.statistics(
        scanned(name),
        torch.ones(32),
        look.examples(planted(name).model, planted(name).streams["natural"], scanned(name)),
    )
    for neuron in range(16):
        own = scanned(name).scales["post"].units(run.post)[:, neuron] >= N_RANGES // 2
        assert math.isclose(table["share_post"][neuron], own.double().mean(), abs_tol=1e-12)
        assert math.isclose(table["k_eff_post"][neuron], run.k_eff[own].mean(), rel_tol=1e-6)
        assert math.isclose(
            table["engagement_post"][neuron], run.engagement[own].mean(), rel_tol=1e-6
        )


# --- stored ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def study(tiny_study: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of the trained study with the neurons of its first run."""
    copy = tmp_path_factory.mktemp("neurons") / "study"
    shutil.copytree(tiny_study, copy)
    compute(copy / "solu_ln-s0", NeuronsConfig(n_tokens=4000, device="cpu"), lambda text: None)
    return copy


def test_stored_examples_are_those_of_the_model(study: Path) -> None:
    neurons = stored.read(study / "solu_ln-s0")
    model = soluscope.load(study / "solu_ln-s0")
    assert neurons.about.n_neurons == model.cfg.d_mlp
    assert neurons.about.part == "trained"
    for stage in STAGES:
        found = neurons.top(3, stage)
        assert 1 <= len(found) <= N_TOP
        assert len({each.document for each in found}) == len(found)
        values = [each.activation for each in found]
        assert values == sorted(values, reverse=True)
        assert all(each.tokens[each.peak] in neurons.vocabulary for each in found)
        for number in range(N_RANGES):
            sample = neurons.of_range(3, stage, number)
            assert len(sample) <= N_OF_RANGE
            assert {each.range for each in sample} <= {number}
    assert len(neurons.statistics) == model.cfg.d_mlp
    assert set(neurons.logits.groupby("neuron").size()) == {20}


def test_the_initialisation_is_stored_beside_the_trained_model(study: Path) -> None:
    run = study / "solu_ln-s0"
    assert stored.parts_of(run) == ["trained", "untrained"]
    trained, untrained = stored.read(run), stored.read(run, "untrained")
    assert trained.about.made_with != untrained.about.made_with
    assert not np.allclose(trained.statistics["sd_mid"], untrained.statistics["sd_mid"])


def test_the_same_command_computes_only_what_is_missing(study: Path) -> None:
    said: list[str] = []
    folder = stored.place(study / "solu_ln-s0", "untrained")
    before = (folder / "SHA256SUMS").read_text()
    (folder / "rules.parquet").write_bytes(b"broken")
    compute(study / "solu_ln-s0", NeuronsConfig(n_tokens=4000, device="cpu"), said.append)
    assert said[0] == "solu_ln-s0, trained: stored already"
    assert "untrained: " in said[1]
    assert (folder / "SHA256SUMS").read_text() == before  # the same bytes


@pytest.mark.parametrize("name", stored.CONTENT)
def test_a_changed_file_is_refused(study: Path, tmp_path: Path, name: str) -> None:
    copy = tmp_path / "run"
    shutil.copytree(study / "solu_ln-s0" / "neurons", copy / "neurons")
    path = copy / "neurons" / "trained" / name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"is not as it was written.*soluscope neurons"):
        stored.read(copy)


@pytest.mark.parametrize("name", stored.TABLES)
def test_a_received_table_with_other_columns_or_numbers_is_refused(
    study: Path, tmp_path: Path, name: str
) -> None:
    """The checksums fit, because whoever changes a table can change them too."""
    copy = tmp_path / "run"
    shutil.copytree(study / "solu_ln-s0" / "neurons", copy / "neurons")
    path = copy / "neurons" / "trained" / f"{name}.parquet"
    table = pd.read_parquet(path)
    others = [table.drop(columns=column) for column in COLUMNS[name]]
    others += [table.assign(**{column: [{"a": 1}] * len(table)}) for column in COLUMNS[name]]
    others += [table.assign(neuron=table["neuron"] + far) for far in (-1, 10**12)]
    if name in ("neurons", "rules"):
        others += [table.iloc[1:], pd.concat([table, table.iloc[:1]])]
    if name == "examples":
        changed = {"peak": 41, "document": -1, "range": N_RANGES, "stage": "x"}
        others += [table.assign(**{column: value}) for column, value in changed.items()]
        others += [
            table.iloc[::-1],
            table.assign(tokens=[tokens[1:] for tokens in table["tokens"]]),
        ]
    for other in others:
        other.to_parquet(path, index=False)
        path.with_name("SHA256SUMS").write_text(stored.sums_of(path.parent))
        with pytest.raises(
            UserError, match=r"(parquet|about\.json) is broken .*: delete "
        ) as caught:
            [*site._details(stored.read(copy))]
        assert "\n" not in str(caught.value)


def test_a_changed_list_of_found_neurons_does_not_reach_the_results(
    study: Path, tmp_path: Path
) -> None:
    run = Run(tmp_path / "run")
    shutil.copytree(study / "solu_ln-s0" / "neurons", run.dir / "neurons")
    path = run.dir / "neurons" / "trained" / "found.jsonl"
    twin = run.dir / "neurons" / "untrained" / "found.jsonl"
    wanted = [*results.read(path), *results.read(twin)]
    assert suite._found_neurons(run) == wanted
    numbers = {type(row): row for row in wanted if getattr(row, "quantity", "") == READABILITY}
    for kind, part in ((Measurement, "trained"), (Untrained, "untrained")):
        rules = stored.read(study / "solu_ln-s0", part=part).rules
        f1 = rules[rules["side"] == "mid"]["f1_mid"]
        assert (numbers[kind].value, numbers[kind].n) == (f1.median(), f1.notna().sum())
    path.write_text(path.read_text().replace('"place": 0', '"place": 1'))
    for damage in (lambda: None, lambda: path.write_bytes(b""), path.unlink):
        damage()
        with pytest.raises(
            UserError, match=r"found\.jsonl is not as it was written.*soluscope neurons"
        ):
            suite._found_neurons(run)


def test_a_neuron_that_does_not_exist_is_refused(study: Path) -> None:
    neurons = stored.read(study / "solu_ln-s0")
    with pytest.raises(UserError, match=r"neuron=-1 .* from 0 to"):
        neurons.top(-1, "mid")
    with pytest.raises(UserError, match="does not exist: compute it with 'soluscope neurons"):
        stored.read(study / "gelu-s0")


def test_examples_number_their_groups() -> None:
    table = look.examples(
        planted("lateral").model, planted("lateral").streams["natural"], scanned("lateral")
    )
    assert set(table["range"]) <= {TOP, *range(N_RANGES)}
    order = table[["neuron", "stage", "range", "rank"]].copy()
    order["stage"] = [STAGES.index(stage) for stage in order["stage"]]
    assert order.equals(order.sort_values(list(order.columns), ignore_index=True))


# --- automatic proxies ----------------------------------------------------------------------------


def test_proxies_of_stored_neurons_are_stored_and_not_asked_again(
    study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scored, "PLANTED", ())
    prompts: list[str] = []

    def complete(prompt: str) -> str:
        prompts.append(prompt)
        return "1, 2, 3"

    config = ProxyConfig(n_neurons=25)
    found = publish_proxies(study, config, complete, say=lambda text: None)
    assert {each.proxy for each in found} == {*plugins.names("soluscope.proxies")}
    assert {each.stage for each in found if each.term is ProxyTerm.MEAN} == {*SIDES}
    assert {each.untrained for each in found if each.term is ProxyTerm.MEAN} == {True, False}
    n_asked = len(prompts)
    assert n_asked > 0
    again = publish_proxies(study, config, complete, say=lambda text: None)
    assert (again, len(prompts)) == (found, n_asked)
    neurons = stored.read(study / "solu_ln-s0")
    folder = study / "rating" / "proxies"
    scores = scored.of_runs(study, folder, config, complete, [], lambda text: None)
    f1 = neurons.rules.set_index(["neuron", "side"])
    for each in scores:
        if each.trained and each.proxy == "rule_f1":
            wanted = f1.loc[(each.neuron, each.stage), f"f1_{each.stage}"]
            assert each.value == (None if math.isnan(wanted) else wanted)
    assert of_kind(results.read(suite.write_results(study)), Proxied) == found
    without = publish_proxies(study, config, say=lambda text: None)
    assert len({each.proxy for each in without}) == len({each.proxy for each in found}) - 1


def test_windows_of_a_proxy_have_the_activations_of_the_stored_examples(study: Path) -> None:
    neurons = stored.read(study / "solu_ln-s0")
    (seen,) = scored._of_stored(neurons, [(3, "post")])
    examples = neurons.examples(3)
    places = {(each.row, each.pos): each for each in examples}
    assert len(seen.windows) == len(places)
    for window in seen.windows:
        example = places[window.row, window.start + window.peak]
        assert tuple(neurons.vocabulary[token] for token in window.tokens) == example.tokens
        assert window.activations.tolist() == list(example.activations["post"])
        assert window.half == example.half
    in_upper = [each for number in range(5, 10) for each in neurons.of_range(3, "post", number)]
    in_lower = [each for number in range(5) for each in neurons.of_range(3, "post", number)]
    assert all(each.activation >= seen.level * (1 - 1e-6) for each in in_upper)
    assert all(each.activation <= seen.level * (1 + 1e-6) for each in in_lower)


# --- the report and the notebook ------------------------------------------------------------------


def test_the_report_shows_neurons_found_on_one_half_and_text_of_the_other(study: Path) -> None:
    path = stored.place(study / "solu_ln-s0", "trained") / "found.jsonl"
    records = of_kind(results.read(path), NeuronFound)
    neurons = stored.read(study / "solu_ln-s0")
    rules_before = neurons.rules[neurons.rules["side"] == "mid"].set_index("neuron")
    readable_ones = [each for each in records if each.quantity == "most readable"]
    best = rules_before["chosen_f1"].nlargest(len(readable_ones))
    assert [rules_before["chosen_f1"][each.neuron] for each in readable_ones] == best.tolist()
    for each in records:
        assert each.f1_mid == pytest.approx(rules_before["f1_mid"][each.neuron], nan_ok=True)
        of_half = [one for one in neurons.top(each.neuron, "post") if one.half == 1]
        wanted = of_half[0].tokens[of_half[0].peak] if of_half else ""
        assert each.text == wanted
    (link, _, fold) = report_neurons.blocks(list(records))
    assert link.path == "neurons/index.html"
    assert len(fold.blocks) == 2 * len({each.quantity for each in records})
    html = page.render([*make_rows(), *(replace(each, text="<script>") for each in records)])
    assert 'href="neurons/index.html"' in html
    assert "\u00ab&lt;script&gt;\u00bb" in html


def test_a_card_has_the_activations_of_hooks_and_the_stored_examples(study: Path) -> None:
    model = soluscope.load(study / "solu_ln-s0")
    card = soluscope.neuron(model, 3, "import <os>")
    _, cache = model.run_with_cache(model.to_tokens("import <os>"))
    for stage in STAGES:
        wanted = cache[f"blocks.0.mlp.hook_{stage}"][0, 1:, 3]
        assert card.activations[stage] == pytest.approx(wanted.tolist(), rel=1e-5, abs=1e-7)
    assert "".join(card.tokens).replace("\u2423", " ") == "import <os>"
    assert card.examples[0] == stored.read(study / "solu_ln-s0").top(3, "post")[0]
    shown = card._repr_html_()
    assert "<os>" not in shown
    assert "highest logits" in shown
    assert "neuron 3 of solu_ln-s0" in repr(card)
    with pytest.raises(UserError, match="text='' has no tokens"):
        soluscope.neuron(model, 3, "")
