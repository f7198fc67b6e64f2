"""The matrix of hypotheses and evidence on models whose answer is known: it never rejects a true hypothesis."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
from _records import LN, RUN, passed

from soluscope import plugins
from soluscope.config import EvalConfig
from soluscope.evaluation.calibration import control_run
from soluscope.evaluation.output_size import median_size
from soluscope.evaluation.summaries import summarise, token_table
from soluscope.report import evidence
from soluscope.results import Record

H0, AFF, STATIC, DYN, SMEAR = evidence.HYPOTHESES
TRUTH: dict[str, dict[str, bool]] = {
    "smear_shared": {DYN: True, SMEAR: True, H0: False, AFF: False, STATIC: False},
    "smear_graded": {DYN: True, SMEAR: True, H0: False, AFF: False, STATIC: False},
    "ceiling": {DYN: True, SMEAR: True, H0: False, AFF: False, STATIC: False},
    "magnitude": {DYN: True, SMEAR: False, H0: False, AFF: False, STATIC: False},
    "disjoint": {AFF: True, DYN: False, SMEAR: False, H0: False},
    "pinned": {STATIC: True, H0: True, DYN: False, SMEAR: False},
    "uniform": {H0: True, DYN: False, SMEAR: False},
    "absorbed": {H0: True, DYN: False, SMEAR: False},
    "swallowed": {DYN: False, SMEAR: False},
    "centring": {DYN: False, SMEAR: False},
    "bos_gain": {DYN: False, SMEAR: False},
    "monosemantic": {H0: True, DYN: False, SMEAR: False},
    "polysemantic": {H0: True, DYN: False, SMEAR: False},
    "lateral": {DYN: False, SMEAR: False},
    # A gate's answer is the gain itself, and the entropy neuron's norm is half pinned: nothing is derived for them.
    "and_gate": {},
    "or_gate": {},
    "entropy_neuron": {},
}
"""Accounts that are true or false of each planted model with a mid norm; accounts that are not listed are open."""
PROBES = tuple(one.probe for one in evidence.EVIDENCE if one.probe)


@cache
def seen(control: str) -> dict[str, dict[str, evidence.Verdict]]:
    """Return the verdicts on a planted model, by section, as if the model were a run with a per-token norm."""
    run = control_run(control, "natural")
    size = median_size([run], RUN, EvalConfig(n_draws=500))
    records: list[Record] = [LN, size, *passed(*PROBES)]
    for probe in PROBES:
        one = plugins.pick("soluscope.probes", probe)
        base = replace(RUN, probe=probe)
        measured = one.measure(run)
        table = token_table(run, measured)
        records += summarise(one, table, measured.estimates, base, n_draws=500, seed=0)
    lines = ((one.section, found) for one, found in evidence.matrix(records) if one.probe)
    return {
        section: dict(zip(evidence.HYPOTHESES, found[0].verdicts, strict=True))
        for section, found in lines
        if found
    }


def test_every_planted_model_with_a_norm_is_judged() -> None:
    normed = {
        name
        for name in plugins.names("soluscope.controls")
        if control_run(name, "natural").eps is not None
    }
    assert normed == TRUTH.keys()


@pytest.mark.parametrize("control", TRUTH)
def test_no_account_that_is_true_of_a_planted_model_is_inconsistent(control: str) -> None:
    for account, is_true in TRUTH[control].items():
        said = {section: row[account] for section, row in seen(control).items()}
        if is_true:
            assert "inconsistent" not in said.values(), (account, said)
            assert "consistent" in said.values(), (account, said)


@pytest.mark.parametrize("control", TRUTH)
def test_no_account_that_is_false_of_a_planted_model_is_consistent_throughout(control: str) -> None:
    for account, is_true in TRUTH[control].items():
        said = {section: row[account] for section, row in seen(control).items()}
        if not is_true:
            assert set(said.values()) != {"consistent"}, (account, said)
            assert said["P4"] != "consistent", (account, said)


@pytest.mark.parametrize("control", ["pinned", "uniform", "absorbed"])
def test_smearing_is_ruled_out_where_no_token_needs_a_scale_of_its_own(control: str) -> None:
    said = {section: row[SMEAR] for section, row in seen(control).items()}
    assert {said["P4"], said["P20"]} == {"inconsistent"}
    assert "consistent" not in {said["P5"], said["P9"], said["P11"]}


def test_a_gain_that_matters_at_one_neuron_is_no_smearing() -> None:
    found = seen("magnitude")
    assert {found[row][DYN] for row in ("P1", "P4", "P5", "P20")} == {"consistent"}
    assert (found["P4"][SMEAR], found["P5"][SMEAR]) == ("inconsistent", "not settled")


def test_a_low_r_at_most_tokens_rules_nothing_out() -> None:
    found = seen("ceiling")
    assert {found[row][SMEAR] for row in ("P1", "P4", "P5")} == {"consistent"}


def test_gamma_explains_what_a_gain_for_each_neuron_explains() -> None:
    found = seen("disjoint")["P4"]
    assert (found[AFF], found[DYN], found[SMEAR]) == ("consistent", "inconsistent", "inconsistent")
    assert found[H0] == "not settled"


def test_nothing_follows_from_a_zero_where_ln_final_swallows_the_gain() -> None:
    found = seen("swallowed")
    assert {found[row][account] for row in ("P4", "P5", "P20") for account in (DYN, SMEAR)} == {
        "not settled"
    }


def test_rows_that_could_distinguish_equally_consistent_hypotheses_are_named() -> None:
    first = ("consistent",) * 4 + ("inconsistent",)
    rows = [
        evidence.Evidence("P1", "one: of two", ("any", "any", "any", "varies", "varies"), "a rule"),
        evidence.Evidence("P4", "two", ("a", "b", "a", "c", "c"), "a rule"),
        evidence.Evidence("P5", "three: with more", ("a", "a", "d", "e", "e"), "a rule"),
        evidence.Evidence("P6", "four", ("a", "a", "a", "e", "e"), "a rule"),
        evidence.Evidence("P7", "without a rule", ("1", "2", "3", "4", "5"), ""),
    ]
    seen = evidence.Seen((), (*first[:3], "not settled", "inconsistent"), "ln")
    found = [[seen], [evidence.Seen((), evidence.OPEN, "ln")], [], [], []]
    (sentence,) = evidence._alike(list(zip(rows, found, strict=True)), "ln")
    assert sentence == (
        "ln: no row distinguishes H0-opt, H-aff, H-static-smuggle so far. "
        "These could: P4 two (not settled); P5 three (not measured)."
    )  # P1 and P6 expect the same of the three, and H-dyn has another verdict
    assert evidence._alike(list(zip(rows, found, strict=True)), "other") == []
