"""Facts about every probe in the folder, and the results of each probe where the answer is known."""

import dataclasses
import json
import math
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from _records import number, words
from conftest import tiny_config, train_silently
from test_convert import facts_for, hooked_for
from test_every_variant import BOS, ONE_SCALE, PER_TOKEN, SOLU, VARIANTS, some_tokens
from transformer_lens import HookedTransformer, HookedTransformerConfig

import soluscope
from soluscope import plugins, results
from soluscope.config import EvalConfig
from soluscope.data import streams
from soluscope.errors import UserError
from soluscope.evaluation.fitting import misfit
from soluscope.evaluation.summaries import summarise, token_table
from soluscope.hooked.ablation import Ablation, loss_at_gain
from soluscope.hooked.activations import HookedRun, observe, planted
from soluscope.hooked.convert import load
from soluscope.probes import answers_of, words_of
from soluscope.probes._tokens import start_of_each_part
from soluscope.probes.gain_variation import fits
from soluscope.report import meaning
from soluscope.results import Answer, GateResult, LeftOut, Measurement, of_kind
from soluscope.runs.weights import load_facts

pytestmark = pytest.mark.arithmetic

PROBES = plugins.names("soluscope.probes")
SOLU_1L = Path(__file__).parents[2] / "shared" / "data" / "solu1l" / "activations.npz"
BASE = Measurement(study="s", run="r", probe="p", quantity="", value=None, unit="")


def stream_of(tokens, name="natural"):
    string = torch.arange(len(tokens))[:, None].expand(tokens.shape)
    return streams.Stream(name, tokens, string, torch.ones_like(tokens, dtype=torch.bool), BOS)


def stream_for(probe):
    """Return random tokens in the form that the probe needs: texts, or prompts with their corruptions."""
    if not probe.streams[0].startswith(streams.PAIRS):
        return stream_of(some_tokens())
    tokens = some_tokens(18)
    string = (torch.arange(18) // 6)[:, None].expand(tokens.shape)
    keep = torch.ones_like(tokens, dtype=torch.bool)
    return streams.Stream(probe.streams[0], tokens, string, keep, BOS)


@pytest.mark.parametrize("name", PROBES)
def test_a_probe_gives_the_answers_worked_by_hand(name):
    probe = plugins.pick("soluscope.probes", name)
    n_checked = 0
    for run, answers in probe.known():
        measured = probe.measure(run)
        table = token_table(run, measured)
        found_estimates = {
            e.quantity: float(e.value(e.sums.sum(0, keepdims=True))[0])
            for e in measured.estimates
            if (e.group, e.x) == ("", None)
        }
        for quantity, wanted in answers.items():
            values = table[quantity] if quantity in table else found_estimates[quantity]
            torch.testing.assert_close(
                torch.tensor(np.asarray(values, dtype=np.float64)),
                torch.tensor(wanted, dtype=torch.float64),
                rtol=1e-6,
                atol=1e-9,
                equal_nan=True,
            )
            n_checked += 1
    assert n_checked >= 3


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", PROBES)
def test_a_probe_gives_one_value_a_token_for_each_quantity_it_declares(name, variant):
    probe = plugins.pick("soluscope.probes", name)
    _, hooked = hooked_for(variant)
    if why := misfit(probe, hooked):
        assert (probe.one_scale, variant in ONE_SCALE) == (True, False), why
        return
    run = observe(hooked, stream_for(probe))
    measured = probe.measure(run)
    split_columns = {c for q in probe.quantities.values() for c in q.split_by}
    assert measured.tokens.keys() == probe.quantities.keys() | split_columns
    assert {values.shape for values in measured.tokens.values()} == {run.pos.shape}
    table = token_table(run, measured)
    rows = list(summarise(probe, table, measured.estimates, BASE, n_draws=100, seed=0))
    assert all(row.unit for row in rows)
    assert {row.quantity for row in rows} <= probe.quantities.keys() | probe.estimates.keys()
    assert {len(values) for values in measured.neurons.values()} <= {run.mid.shape[1]}


@pytest.mark.parametrize(
    "name", [n for n in PROBES if not plugins.pick("soluscope.probes", n).one_scale]
)
def test_a_probe_that_needs_no_gain_gives_the_same_numbers_without_one(name):
    probe = plugins.pick("soluscope.probes", name)
    run = observe(hooked_for("solu_ln")[1], stream_for(probe))
    without = dataclasses.replace(run, scale=torch.full_like(run.scale, torch.nan), eps=None)
    wanted, found = (token_table(each, probe.measure(each)) for each in (run, without))
    pd.testing.assert_frame_equal(found, wanted)


@pytest.mark.parametrize("name", PROBES)
def test_a_probe_says_what_it_measures_and_names_its_controls(name):
    probe = plugins.pick("soluscope.probes", name)
    declared = probe.quantities.keys() | probe.estimates.keys()
    assert {q for figure in probe.figures for q in figure.quantities} <= declared
    assert probe.tested in declared
    assert probe.shuffle in {"", *(f.name for f in dataclasses.fields(HookedRun))}
    assert probe.section.startswith("P")
    assert (
        min(len(probe.question), len(probe.formula), len(probe.reading), len(probe.pitfalls)) > 20
    )
    assert {gate.quantity for gate in probe.gates} <= declared
    assert {gate.control for gate in probe.gates} <= set(plugins.names("soluscope.controls"))
    asked = [(g.above, g.below, g.within) for g in probe.gates]
    assert all(sum(part is not None for part in parts) == 1 for parts in asked)
    assert any(g.within is None for g in probe.gates), "no positive control"
    assert any(g.within is not None for g in probe.gates), "no negative control"


WORDS = """P99: A name

Background, for readers of the file.

Question:
    Is it so?

Answers:
    above 0.5: It is
        so.
    below -.1: No.
    -.1 to 0.5: Hardly.

Formula:
    a;
    b

Reading:
    Yes means yes.

    A second paragraph.

Pitfalls:
    None: known.

Source:
    A paper
"""


def test_a_probes_words_are_its_modules_docstring():
    assert words_of(WORDS) == {
        "section": "P99",
        "name": "A name",
        "question": "Is it so?",
        "formula": "a; b",
        "reading": "Yes means yes. A second paragraph.",
        "pitfalls": "None: known.",
        "source": "A paper",
    }
    assert answers_of(WORDS) == (
        Answer("No.", None, -0.1),
        Answer("Hardly.", -0.1, 0.5),
        Answer("It is so.", 0.5, None),
    )


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("", "are for numbers below -0.1, above 0.5: give each number one answer"),
        ("-.1 to 0.4: Hardly.", "below -0.1, between -0.1 and 0.4, above 0.5: give each"),
        ("-.1 to 0.6: Hardly.", "below -0.1, between -0.1 and 0.6, above 0.5: give each"),
        ("above -.1: Hardly.", "below -0.1, above -0.1, above 0.5: give each"),
    ],
)
def test_answers_that_leave_out_a_number_or_give_it_two_are_refused(fault, said):
    with pytest.raises(UserError, match=f"the answers of probe 'P99: A name' .*{re.escape(said)}"):
        answers_of(WORDS.replace("-.1 to 0.5: Hardly.", fault))


def test_an_answer_without_a_range_is_refused():
    with pytest.raises(UserError, match="begin with 'Yes': begin each answer with a range"):
        answers_of(WORDS.replace("    above 0.5: It is", "    Yes\n    above 0.5: It is"))


@pytest.mark.parametrize("name", PROBES)
def test_a_probe_answers_its_question_for_each_result_on_a_control(name):
    """Results that a positive and a negative control ask for have different answers, and each has one answer."""
    probe = plugins.pick("soluscope.probes", name)
    quantity = (probe.quantities | probe.estimates)[probe.tested]
    answers: dict[bool, set[str]] = {True: set(), False: set()}
    for gate in probe.gates:
        if (gate.quantity, gate.statistic) != (probe.tested, quantity.statistics[0]) or gate.group:
            continue
        if gate.within is None:
            low = -math.inf if gate.above is None else gate.above
            high = math.inf if gate.below is None else gate.below
        else:
            low, high = gate.around - gate.within, gate.around + gate.within
        (answer,) = (each for each in probe.answers if each.overlaps(low, high))
        answers[gate.within is None].add(answer.text)
    assert not answers[True] & answers[False]
    assert all(each.text.endswith(".") for each in probe.answers)
    assert len({each.text for each in probe.answers}) == len(probe.answers) >= 2
    margins = [margin for word, margin in meaning.NEGLIGIBLE.items() if word in quantity.unit]
    bounds = {abs(each.low) for each in probe.answers if each.low is not None}
    assert bounds == {*margins} or not margins


@pytest.mark.parametrize("name", PROBES)
def test_no_answer_claims_smearing(name):
    """Each main number is the same in a planted model without smearing, so it cannot show smearing alone."""
    answers = plugins.pick("soluscope.probes", name).answers
    assert not re.search("smear|smuggl|needs? a per-token", " ".join(each.text for each in answers))


@pytest.mark.parametrize(
    "heading", ["Question", "Answers", "Formula", "Reading", "Pitfalls", "Source"]
)
@pytest.mark.parametrize("fault", ["no heading", "no text"])
def test_a_docstring_without_one_of_the_words_is_refused_in_one_line(heading, fault):
    before, body = WORDS.split(f"{heading}:\n")
    after = body.partition("\n\n")[2] if heading != "Reading" else body[body.index("Pitfalls") :]
    faulty = before + (f"{heading}:\n\n" if fault == "no text" else "") + after
    with pytest.raises(UserError, match=f"'P99: A name' lacks '{heading}': write") as refused:
        words_of(faulty)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("docstring", [None, "", "A question without a number.", "P: A name"])
def test_a_docstring_that_does_not_begin_with_a_number_and_a_name_is_refused(docstring):
    with pytest.raises(UserError, match="begin it with 'P1: name'"):
        words_of(docstring)


def test_no_two_probes_have_one_section():
    sections = [plugins.pick("soluscope.probes", name).section for name in PROBES]
    assert len(set(sections)) == len(sections)
    wanted = {*range(1, 7), *range(9, 12), *range(13, 23)}
    assert {f"P{n}" for n in wanted} <= set(sections)


@pytest.mark.parametrize("name", PROBES)
def test_a_probe_passes_its_controls(name, gates):
    rows = of_kind(results.read(gates(name)), GateResult)
    assert rows
    assert [row for row in rows if not row.passed] == []


RIGHT = {
    "attribution_patching": {
        "smear_shared": "passes through the mid norm's gain",
        "pinned": "does not come from the mid norm's gain",
    },
    "centring": {
        "centring": "The loss rises",
        "uniform": "The loss stays the same",
        "monosemantic": "The loss stays the same",
    },
    "entropy_neurons": {
        "entropy_neuron": "lowers the entropy",
        "uniform": "does not change the entropy",
        "monosemantic": "does not change the entropy",
    },
    "gain_variation": {"smear_shared": "varies by more than 10%", "bos_gain": "one constant"},
    "low_activation_impact": {
        "smear_shared": "costs more loss with the per-token gain",
        "disjoint": "costs more loss with the per-token gain",
        "pinned": "changes the loss as much",
        "monosemantic": "changes the loss as much",
        "uniform": "changes the loss as much",
    },
    "scale_freeze": {
        "smear_shared": "The loss rises",
        "ceiling": "The loss rises",
        "magnitude": "The loss rises",
        "pinned": "The loss stays the same",
        "uniform": "The loss stays the same",
        "absorbed": "The loss stays the same",
    },
    "scale_patching": {
        "or_gate": "towards the clean prompt's answer",
        "smear_shared": "away from the clean prompt's answer",
        "and_gate": "not enough",
        "uniform": "not enough",
        "pinned": "not enough",
    },
    "specificity": {"smear_graded": "less related", "centring": "neither less nor more related"},
}
"""Answers on planted models, by their construction (protocol.md section 6)."""


@pytest.mark.parametrize("name", RIGHT)
def test_the_answer_on_a_planted_model_is_the_one_that_was_planted(name, gates):
    of_probe = words(name)
    statistic = of_probe.quantities[name_of := of_probe.tested].statistics[0]
    answered = {}
    for gate in of_kind(results.read(gates(name)), GateResult):
        if gate.measured in (name_of, f"{name_of} ({statistic})"):
            row = number(
                name, name_of, gate.value, low=gate.low, high=gate.high, unit=gate.unit, statistic=statistic
            )  # fmt: skip
            (answered[gate.control],) = meaning.sentences(of_probe, [row], [row.arm])
    assert answered.keys() == RIGHT[name].keys()
    for control, right in RIGHT[name].items():
        (answer,) = (each.text for each in of_probe.answers if right in each.text)
        assert answered[control].startswith(f"solu_ln: {answer} ")


def test_observed_losses_are_the_models_own_and_nan_without_a_target():
    _, hooked = hooked_for("solu_ln")
    tokens = some_tokens()
    tokens[0, 5] = BOS
    run = observe(hooked, stream_of(tokens))
    loss = run.loss.view(tokens.shape)
    wanted = hooked(tokens, return_type="loss", loss_per_token=True)
    assert loss[0, 4].isnan()
    assert loss[:, -1].isnan().all()
    torch.testing.assert_close(loss[1:, :-1].float(), wanted[1:].float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v not in ONE_SCALE])
def test_a_token_whose_neurons_have_different_scales_has_no_gain_and_no_r(variant):
    run = observe(hooked_for(variant)[1], stream_of(some_tokens()))
    for values in (run.scale, run.gain, run.engagement, run.mlp(run.resid_mid).scale):
        assert values.shape == run.pos.shape
        assert values.isnan().all()
    tokens = torch.arange(5)
    for edit in (Ablation(run).mid, Ablation(run).pre):
        with pytest.raises(ValueError, match="several scales, so the closed form does not hold"):
            edit(tokens)


def test_padding_is_not_observed_and_changes_nothing():
    _, hooked = hooked_for("solu_ln")
    rows = [(0, [5, 6, 7]), (1, list(range(5, 20)))]
    together = observe(hooked, streams.from_rows(rows, BOS, 32, "text"))
    alone = observe(hooked, streams.from_rows(rows[:1], BOS, 32, "text"))
    first = together.string == 0
    assert len(together.pos) == 4 + 16
    torch.testing.assert_close(together.mid[first], alone.mid)
    torch.testing.assert_close(together.loss[first], alone.loss, equal_nan=True)
    assert together.loss[first][-1].isnan()


def test_centred_activations_are_mid_where_the_norm_does_not_centre():
    for variant, centres in (("solu_ln", True), ("solu_gain", False), ("solu", False)):
        run = observe(hooked_for(variant)[1], stream_of(some_tokens()))
        mean = run.mid.mean(-1, keepdim=True)
        torch.testing.assert_close(run.centred, run.mid - mean * centres, rtol=0, atol=1e-12)


def test_the_tokens_that_are_scored_have_a_target_and_are_not_bos():
    run = planted(torch.tensor([[[1.0, -1.0], [2.0, -2.0], [4.0, -4.0]]] * 2), eps=1e-14)
    assert run.scored.tolist() == [False, True, False] * 2
    geometric_mean = float(run.mean_log_gain.exp())
    assert geometric_mean == pytest.approx((1 / 2 * 1 / 4) ** 0.5)  # BOS's gain of 1 is left out


@pytest.mark.parametrize(("n_items", "n_wanted"), [(10, 4), (10, 10), (10, 99), (10, 0), (1, 5)])
def test_evenly_spaced_items_run_from_the_first_to_the_last(n_items, n_wanted):
    chosen = streams.evenly_spaced(n_items, n_wanted)
    assert len(chosen) == min(n_items, max(1, n_wanted))
    assert chosen[0] == 0
    assert chosen[-1] == n_items - 1 or n_wanted == 0
    assert len(chosen) == 1 or np.ptp(np.diff(chosen)) <= 1
    assert len(streams.evenly_spaced(0, 4)) == 0


def test_the_start_of_each_part_leaves_out_the_end():
    indices = torch.arange(10, 20)
    assert start_of_each_part(indices, 4).tolist() == [10, 12, 15, 17]
    assert start_of_each_part(indices, 99).tolist() == indices.tolist()


def test_is_solu_is_read_off_the_activations():
    assert all(
        observe(hooked_for(v)[1], stream_of(some_tokens())).is_solu == (v in SOLU) for v in VARIANTS
    )


# --- P1, on the real model ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def solu_1l():
    if not SOLU_1L.is_file():
        pytest.skip("the pretrained SoLU-1L's activations are not beside this clone")
    return np.load(SOLU_1L)


def test_engagement_of_solu_1l_is_section_1_2s_table(solu_1l):
    """Our definition of r uses hook_mid only. The table was read from hook_normalized."""
    run = planted(torch.from_numpy(solu_1l["hook_mid"])[None], eps=1e-5)
    measured = plugins.pick("soluscope.probes", "engagement").measure(run).tokens
    r = [.117, .0112, .0227, .0197, .0365, .0286, .0392, .0291, .0286, .0284, .0373, .0213, .0447,
         .0287, .0300]  # fmt: skip
    gain = [297.22, 314.45, 312.62, 313.09, 310.40, 311.67, 309.96, 311.60, 311.67, 311.70, 310.27, 312.84,
            309.07, 311.65, 311.45]  # fmt: skip
    np.testing.assert_allclose(measured["r"], r, atol=6e-5, rtol=4e-3)
    np.testing.assert_allclose(measured["gain"], gain, atol=6e-3)
    assert measured["kappa"][0].item() == pytest.approx(41.94304)
    norm = np.linalg.norm(solu_1l["hook_normalized"], axis=-1)
    np.testing.assert_allclose(norm, np.sqrt(2048 * measured["r"].numpy()), rtol=1e-4)


def test_solu_1ls_published_gain_curve_moves_and_its_last_token_does_not(solu_1l):
    run = planted(torch.from_numpy(solu_1l["hook_mid"])[None], eps=1e-5)
    measured = plugins.pick("soluscope.probes", "gain_variation").measure(run).tokens
    published = measured["mean with BOS (as published)"]
    np.testing.assert_allclose(published[[1, 2, 3, 14]], [305.8, 308.1, 309.4, 310.6], atol=0.06)
    assert measured["last token"][1:].log().std() < 0.006


# --- P2 -------------------------------------------------------------------------------------------


def fits_of(run: HookedRun) -> dict[str, float]:
    """Return the fits to the curves of a run of one string."""
    tokens = plugins.pick("soluscope.probes", "gain_variation").measure(run).tokens
    return fits(run.pos.numpy(), {name: values.numpy() for name, values in tokens.items()})


def test_where_only_bos_differs_the_published_mean_is_one_over_n_and_the_others_flat():
    """C9 of protocol.md section 6."""
    scales = torch.tensor([2.0] + [1.0] * 30)
    run = planted(scales[None, :, None] * torch.tensor([1.0, -1.0]), eps=1e-12)
    row = fits_of(run)
    assert row["AICc(log) - AICc(1/n): mean with BOS (as published)"] > 100
    assert np.isnan(row["AICc(log) - AICc(1/n): last token"])
    assert row["sd of log gain"] == pytest.approx(0, abs=1e-9)


def test_where_the_gain_really_grows_with_log_n_the_fits_say_so():
    gain = 1 + 0.2 * torch.arange(1.0, 33).log()
    run = planted((1 / gain)[None, :, None] * torch.tensor([1.0, -1.0]), eps=1e-14)
    row = fits_of(run)
    assert row["AICc(log) - AICc(1/n): last token"] < -100
    assert row["sd of log gain"] > 0.05


# --- P4 -------------------------------------------------------------------------------------------


def freeze(run: HookedRun) -> pd.DataFrame:
    return token_table(run, plugins.pick("soluscope.probes", "scale_freeze").measure(run))


def test_freezing_a_pinned_gain_costs_nothing_and_an_active_one_does():
    """The same weights at kappa 1e6 (C3: pinned by epsilon) and at a tiny kappa."""
    changes = {}
    for kappa in (1e6, 1e-6):
        _, hooked = hooked_for("solu_ln")
        hooked.blocks[0].mlp.ln.eps = kappa / 128**2
        table = freeze(observe(hooked, stream_of(some_tokens(20))))
        changes[kappa] = table["frozen at geometric mean"].abs().mean()
    assert changes[1e6] < 1e-4
    assert changes[1e-6] > 1e-2


@pytest.mark.parametrize("variant", [v for v in ONE_SCALE if v not in PER_TOKEN])
def test_freezing_a_gain_that_is_constant_changes_nothing(variant):
    run = observe(hooked_for(variant)[1], stream_of(some_tokens(20)))
    table = freeze(run)[~run.is_bos.numpy()]  # BOS may have another constant
    for column in (
        "frozen at geometric mean",
        "frozen at geometric mean, final norm frozen",
    ):
        assert table[column].abs().max() < 1e-12


@pytest.mark.parametrize("final_norm", ["live", "frozen"])
def test_the_best_constant_is_the_minimum_over_all_other_strings(final_norm):
    """The reference is scipy's minimiser. The targets are the model's own guesses, so its gain is too low."""
    from scipy.optimize import minimize_scalar

    from soluscope.hooked.ablation import best_gain, log_best_gain_on_others

    _, hooked = hooked_for("solu_gain")
    tokens = some_tokens(40)
    with torch.no_grad():
        for pos in range(1, 31):
            tokens[:, pos + 1] = hooked(tokens[:, : pos + 1])[:, -1].argmax(-1)
    run = observe(hooked, stream_of(tokens))
    start = run.gain.log()
    found = log_best_gain_on_others(run, final_norm) - start
    on_all = np.log(best_gain(run, final_norm)) - start[0].item()
    for string in (0, 17, 39, None):
        others = run.subset(
            ~run.is_bos & (run.target >= 0) & (run.string != (-1 if string is None else string))
        )

        def mean_loss(shift, others=others):
            gains = others.gain[:, None] * np.exp(shift)
            return loss_at_gain(others, gains, final_norm).mean().item()

        wanted = minimize_scalar(mean_loss, bounds=(-0.7, 0.7), method="bounded").x
        assert wanted > 0.1
        of_string = on_all if string is None else found[run.string == string].unique().item()
        assert of_string == pytest.approx(wanted, abs=0.01)


# --- streams and bad input ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cache_of(tiny_study):
    from soluscope.data.cache import open_cache

    return open_cache(Path(json.loads((tiny_study / "data.json").read_text())["path"]))


@pytest.mark.parametrize(
    "name", ["natural", "prefixes", "prose", "code", "sentences", "repeated", "random"]
)
def test_a_stream_has_bos_first_in_each_row_and_is_the_same_each_time(cache_of, name):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(cache_of.tokenizer_path))
    one, two = (streams.make(name, cache_of, tokenizer, 32, 2000, 0) for _ in range(2))
    assert torch.equal(one.tokens, two.tokens)
    assert (one.tokens[:, 0] == cache_of.meta["bos"]).all()
    content = one.tokens[:, 1:][one.keep[:, 1:]]
    assert (content != cache_of.meta["bos"]).all()
    if name == "repeated":
        assert (one.tokens[:, 1:] == one.tokens[:, 1:2]).all()
        assert len(set(one.tokens[:, 1].tolist())) == len(one.tokens)
    if name == "random":
        assert not torch.equal(
            one.tokens, streams.make(name, cache_of, tokenizer, 32, 2000, 1).tokens
        )


def test_docstrings_are_the_english_of_a_module():
    code = '"""Top."""\n\ndef f():\n    """Inner text."""\n    return 1  # comment\n'
    assert streams.docstrings(code) == "Top.\n\nInner text."
    assert streams.docstrings("def broken(") == ""


def test_python_text_streams_come_from_files_that_training_never_sees(cache_of):
    from soluscope.data.cache import split_of

    shares = cache_of.meta["shares"]
    texts = list(streams.standard_library("code", **shares))
    assert texts
    assert all(split_of(text, shares["select"], shares["report"]) == "report" for text in texts)


def test_text_shorter_than_two_tokens_is_refused(tiny_study):
    from soluscope.evaluation.api import probe

    model = load(tiny_study / "solu_ln-s0")
    with pytest.raises(UserError, match="shorter than 2 tokens"):
        probe(model, "")


def test_an_unknown_probe_is_answered_with_the_nearest(tiny_study):
    from soluscope.evaluation.api import probe

    with pytest.raises(UserError, match="Did you mean 'engagement'"):
        probe(load(tiny_study / "solu_ln-s0"), "some text", probes=["engagment"])


def test_weights_that_are_not_finite_are_named():
    _, hooked = hooked_for("solu_ln")
    hooked.blocks[0].mlp.W_in.data[0, 0] = torch.nan
    with pytest.raises(UserError, match=r"blocks\.0\.mlp\.W_in holds values that are not finite"):
        observe(hooked, stream_of(some_tokens()))


def test_tokens_that_the_model_does_not_know_are_another_tokenizers():
    _, hooked = hooked_for("solu_ln")
    tokens = some_tokens()
    tokens[1, 3] = hooked.cfg.d_vocab
    with pytest.raises(UserError, match="tokenise the text with the model's tokenizer"):
        observe(hooked, stream_of(tokens))


def test_a_model_without_mlp_is_refused():
    _, hooked = hooked_for("solu_ln")
    hooked.cfg.attn_only = True
    with pytest.raises(UserError, match="no MLP"):
        observe(hooked, stream_of(some_tokens()))


def test_of_a_deeper_model_the_last_layer_is_observed():
    torch.manual_seed(0)
    deep = HookedTransformer(
        HookedTransformerConfig(
            n_layers=2,
            d_model=32,
            n_ctx=32,
            d_head=16,
            n_heads=2,
            d_mlp=64,
            d_vocab=512,
            act_fn="solu_ln",
            dtype=torch.float64,
            seed=0,
        )
    )
    tokens = some_tokens()
    run = observe(deep, stream_of(tokens))
    _, cache = deep.run_with_cache(tokens)
    torch.testing.assert_close(run.post.view(3, 32, 64), cache["blocks.1.mlp.hook_post"])
    stages = run.mlp(run.resid_mid)
    torch.testing.assert_close(stages.post, run.post)
    torch.testing.assert_close(stages.scale, run.scale)
    torch.testing.assert_close(
        run.resid_mid + stages.out, cache["blocks.1.hook_resid_post"].flatten(0, 1)
    )


def test_probing_a_text_gives_a_table_and_figures(tiny_study):
    import soluscope

    model = soluscope.load(tiny_study / "solu_ln-s0")
    frame, figures = soluscope.probe(model, ["import os and then some", "def f(x): return x"])
    assert {"probe", "quantity", "string", "pos", "token", "text", "value"} == set(frame.columns)
    on_texts = {n for n in PROBES if "pairs" not in plugins.pick("soluscope.probes", n).streams[0]}
    assert set(frame["probe"]) == on_texts
    r = frame[(frame["quantity"] == "r") & (frame["pos"] > 0)]["value"]
    assert len(r) > 10
    assert r.between(0, 1).all()
    assert (frame[frame["pos"] == 0]["text"] == "<|BOS|>").all()
    assert len(figures) > len(on_texts)
    assert all(figure.to_dict()["data"] for figure in figures.values())
    assert load_facts(tiny_study / "solu_ln-s0").variant == facts_for("solu_ln").variant


@pytest.mark.parametrize("n_tokens", [2, 31, 32, 33, 63, 64])
def test_every_token_of_a_text_has_a_row(tiny_study, n_tokens):
    model = load(tiny_study / "solu_ln-s0")
    assert model.facts.ctx == 32
    word = model.to_single_token(" a")  # leaves a tokenizer behind that truncates at ctx
    texts = ["import os", " a" * n_tokens, " a"]
    frame, _ = soluscope.probe(model, texts, ["engagement", "exact_dla"])
    assert frame.groupby(["probe", "quantity"]).size().nunique() == 1
    r = (frame["probe"] == "engagement") & (frame["quantity"] == "r")
    rows = frame[r & (frame["pos"] > 0)]
    assert rows.loc[rows["string"] == 1, "token"].tolist() == [word] * n_tokens
    assert rows.loc[rows["string"] == 2, "token"].tolist() == [word]
    assert rows["value"].notna().all()


@pytest.mark.parametrize(
    "dtype", [pytest.param(torch.float16, marks=pytest.mark.long), torch.bfloat16]
)
def test_a_model_below_fp32_is_measured_in_fp32_and_keeps_its_dtype(tiny_study, dtype):
    text = ["import os and then some", "def f(x): return x"]
    low = load(tiny_study / "solu_ln-s0").to(dtype, print_details=False)
    halved = torch.nn.Module.to(load(tiny_study / "solu_ln-s0"), dtype)  # cfg.dtype stays fp32
    rounded = load(tiny_study / "solu_ln-s0").to(dtype, print_details=False)
    wanted, _ = soluscope.probe(rounded.to(torch.float32, print_details=False), text)
    for model in (low, halved):
        frame, _ = soluscope.probe(model, text)
        pd.testing.assert_frame_equal(frame, wanted)
        assert model.W_U.dtype == dtype


def test_few_tokens_still_come_from_many_texts(cache_of):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(cache_of.tokenizer_path))
    texts = [f"def function_{i}(): return {i} " * 40 for i in range(30)]
    stream = streams.from_tokens(
        streams.encoded(texts, tokenizer), tokenizer, BOS, 32, 40 * 32, "text"
    )
    assert len(stream.tokens) == 40
    assert stream.string.unique().tolist() == list(range(30))
    first = stream.tokens[stream.string[:, 0] == 3][:, 1:].flatten().tolist()
    assert tokenizer.decode(first).startswith("def function_3(): return 3")


def test_a_spelt_out_bos_is_text_and_not_a_token(cache_of):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(cache_of.tokenizer_path))
    stream = streams.from_tokens(
        streams.encoded(["a <|BOS|> b"], tokenizer),
        tokenizer,
        cache_of.meta["bos"],
        32,
        100,
        "text",
    )
    assert (stream.tokens[:, 1:][stream.keep[:, 1:]] != cache_of.meta["bos"]).all()


def test_one_number_for_all_tokens_has_no_interval_and_is_constant():
    table = pd.DataFrame({"string": np.arange(100) // 2, "pos": 1, "r": 0.0})
    table.loc[99, "r"] = np.nan
    probe = plugins.pick("soluscope.probes", "engagement")
    table = table.assign(**{name: np.nan for name in probe.quantities if name != "r"})
    made = summarise(probe, table, (), BASE, n_draws=100, seed=0)
    rows = [row for row in made if row.positions == "1"]
    assert {row.statistic: row.value for row in rows}["share above 0.5"] == 0
    assert all((row.low, row.n, row.constant) == (None, 99, True) for row in rows)
    few = summarise(probe, table[:20], (), BASE, n_draws=100, seed=0)
    assert {row.note for row in few} == {"no interval from 10 documents: at least 30 are needed"}


# --- the suite ------------------------------------------------------------------------------------


def test_a_deeper_model_is_probed_at_its_last_layer_and_the_rest_left_out_by_name(tmp_path):
    from soluscope.evaluation.suite import evaluate
    from soluscope.results import read

    words = (
        "variant=solu_ln",
        "model.n_layers=2",
        "study=deep",
        "train.steps=2",
        "train.warmup_steps=0",
    )
    run_dir = train_silently(tiny_config(tmp_path, *words))
    config = EvalConfig(probes=["engagement", "scale_freeze"], n_tokens=1000, n_loss_tokens=1000)
    rows = read(evaluate(run_dir, config, lambda text: None))
    measured = of_kind(rows, Measurement)
    assert any(row.probe == "engagement" and row.value is not None for row in measured)
    assert not any(row.probe == "scale_freeze" for row in measured)
    (left_out,) = of_kind(rows, LeftOut)
    assert (left_out.probe, left_out.run) == ("scale_freeze", run_dir.name)
    assert "the model has 2" in left_out.note


def test_the_token_view_holds_the_first_text_with_gain_engagement_and_ablation_effect():
    from soluscope.evaluation.one_run import token_values
    from soluscope.evaluation.summaries import about_run

    _, hooked = hooked_for("solu_ln")
    tokens = some_tokens()
    vocab = tuple(f"t{i}" for i in range(hooked.cfg.d_vocab))
    stream = dataclasses.replace(stream_of(tokens), vocab=vocab)
    rows = token_values(observe(hooked, stream), about_run(facts_for("solu_ln")))
    texts = [row.text for row in rows if row.quantity == "gain"]
    assert texts == [f"t{token}" for token in tokens[0].tolist()]
    effect = [row.value for row in rows if row.quantity == "ablation effect"]
    name = "blocks.0.mlp.hook_post"
    ablated = hooked.run_with_hooks(
        tokens[:1], return_type="loss", loss_per_token=True,
        fwd_hooks=[(name, lambda post, hook: post * 0)],
    )  # fmt: skip
    plain = hooked(tokens[:1], return_type="loss", loss_per_token=True)
    np.testing.assert_allclose(effect[:-1], (ablated - plain).detach()[0], atol=1e-6)
    assert np.isnan(effect[-1])


def test_fewer_documents_than_an_interval_takes_are_said():
    probe = plugins.pick("soluscope.probes", "engagement")
    run = observe(hooked_for("solu_ln")[1], stream_of(some_tokens()))
    measured = probe.measure(run)
    table = token_table(run, measured)
    rows = summarise(probe, table, measured.estimates, BASE, n_draws=100, seed=0)
    row = next(row for row in rows if (row.quantity, row.statistic) == ("r", "median"))
    assert (row.low, row.high) == (None, None)
    assert row.note == "no interval from 3 documents: at least 30 are needed"


def test_one_short_text_of_ones_own_is_probed_by_all_that_can(tiny_study):
    model = soluscope.load(tiny_study / "solu_ln-s0")
    table, _ = soluscope.probe(model, "import os\nprint(os.getcwd(), '\U0001f600')")
    picked = {name: plugins.pick("soluscope.probes", name) for name in PROBES}
    on_texts = {
        name
        for name, probe in picked.items()
        if probe.quantities and not all(s.startswith(streams.PAIRS) for s in probe.streams)
    }
    assert set(table["probe"]) == on_texts
    assert r"\xf0" in "".join(table["text"])  # a byte of the emoji, which is no text by itself
