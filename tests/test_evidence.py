"""The matrix of hypotheses and evidence on models whose answer is known: it never rejects the true hypothesis."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
from _records import LN, RUN, passed

from soluscope import plugins
from soluscope.evaluation.calibration import control_run
from soluscope.evaluation.summaries import summarise, token_table
from soluscope.report import evidence
from soluscope.results import Record

H0, STATIC, SMEAR = range(3)
"""Indices into `evidence.HYPOTHESES`."""
TRUE_OF = {
    "smear_shared": SMEAR,
    "smear_graded": SMEAR,
    "disjoint": H0,
    "pinned": STATIC,
    "uniform": H0,
    "absorbed": H0,
}
PROBES = tuple(one.probe for one in evidence.EVIDENCE if one.probe)


@cache
def seen(control: str) -> dict[str, evidence.Seen]:
    """Return the matrix of a planted model, by section, as if the model were a run with a per-token norm."""
    records: list[Record] = [LN, *passed(*PROBES)]
    for probe in PROBES:
        one = plugins.pick("soluscope.probes", probe)
        run = control_run(control, "natural")
        base = replace(RUN, probe=probe)
        measured = one.measure(run)
        table = token_table(run, measured)
        records += summarise(one, table, measured.estimates, base, n_draws=500, seed=0)
    lines = ((one.section, found) for one, found in evidence.matrix(records) if one.probe)
    return {section: found for section, (found,) in lines}


@pytest.mark.parametrize("control", TRUE_OF)
def test_no_account_that_is_true_of_a_planted_model_is_inconsistent(control):
    found = seen(control)
    assert len(found) == len(PROBES) == 6
    said = {section: one.verdicts[TRUE_OF[control]] for section, one in found.items()}
    assert "inconsistent" not in said.values(), said
    assert "consistent" in said.values(), said


@pytest.mark.parametrize("control", ["pinned", "uniform", "absorbed"])
def test_smearing_is_ruled_out_where_no_token_needs_a_scale_of_its_own(control):
    said = {section: one.verdicts[SMEAR] for section, one in seen(control).items()}
    assert {said["P4"], said["P5"], said["P20"]} == {"inconsistent"}
    assert "consistent" not in {said["P9"], said["P11"]}


def test_a_set_is_large_by_what_it_costs_and_not_beside_neurons_of_its_mass():
    """In `pinned`, random neurons of the same total |n| carry more loss, yet the low neurons carry loss too."""
    found = seen("pinned")["P9"]
    assert found.verdicts == ("not settled", "consistent", "inconsistent")
