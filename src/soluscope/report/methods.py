"""The explanations of the report's terms, and the table of probes and control models."""

from __future__ import annotations

from collections.abc import Sequence

from soluscope.report import controls
from soluscope.report.blocks import Block, Line, Paragraph, Table
from soluscope.results import GateResult, Record, of_kind

TERMS = {
    "The norm.": (
        "SoLU is the activation x softmax(x), and mid is its output in the MLP. The mid norm is a LayerNorm on "
        "mid: at each token it multiplies the centred activations by the gain g = 1 / sqrt(variance + eps). "
        "Smearing is the hypothesis that features are spread thinly over many neurons, and that this per-token "
        "gain amplifies them. r = variance / (variance + eps) is near 0 if eps holds the gain near one value "
        "for all tokens, and 1 in a true LayerNorm. kappa = eps d_mlp^2 is the strength of eps, comparable "
        "between sizes. BOS is the token at the beginning of each text."
    ),
    "The comparison.": (
        "An arm is one configuration, trained at one or more seeds; runs of one seed share their initial values "
        "and batches. Plain SoLU has no mid norm; a static arm has one gain for all tokens. The benefit of LN "
        "is the loss of plain SoLU minus the loss of the arm with LayerNorm. Phi_dyn is the share of this "
        "benefit that the best static arm trained here does not reach. A better static arm may exist, so a Phi_dyn "
        "above 0 does not yet show that a per-token gain is needed."
    ),
    "The intervals.": (
        "Intervals are 95%, those of equivalence tests and of negative controls 90%. An interval for these models "
        "comes from resampling the held-out documents. An interval for new seeds also contains the spread between "
        "training seeds; a claim about a variant needs this interval. The untrained twin of a run is the same "
        "model before training, on the same text."
    ),
    "Confirmatory and exploratory.": (
        "Three families of tests are confirmatory, each with p-values that are corrected within it: the tests of "
        "the numerator of Phi_dyn, the two contrasts between tokens, and the tests of probes that compare the "
        "trained models with their own initialisations. All other numbers are exploratory."
    ),
}
"""Explanations of the headline's terms, by the heading of their paragraph."""


def terms() -> list[Block]:
    return [Paragraph(text, lead) for lead, text in TERMS.items()]


SIGNS = {"C+": "+", "C-": "\u2212", "C+/C-": "\u00b1"}
"""Signs of the effects that a control asks for, in the table of probes and controls."""


def controls_table(records: Sequence[Record]) -> list[Block]:
    """Return a table of control models and probes with pass or fail; empty if no probe ran on controls.

    A column is as narrow as the probe's number, so that all probes fit on a screen.
    """
    gates = of_kind(records, GateResult)
    if not gates:
        return []
    planted = {gate.control: gate.section for gate in sorted(gates, key=controls.by_section)}
    probes = controls.in_order(records, {gate.probe for gate in gates})
    heads = [_head(records, probe) for probe in probes]
    by_probe = [controls.gates(records, probe) for probe in probes]
    lines = [
        [f"{control} ({section})", *([_verdict(each[control])] if control in each else "" for each in by_probe)]
        for control, section in planted.items()
    ]  # fmt: skip
    lead = (
        "A control is a planted model whose answer is known. One row for each control, one column for each probe. "
        "+: the probe must find its effect; \u2212: it must find none; \u00b1: it must find an effect in one of "
        "its numbers and none in another. \u2713: passed; \u2717: failed. The numbers are in the sections of the "
        "probes."
    )
    return [
        Paragraph(lead),
        Paragraph(f"{controls.summary(records)}."),
        Table(["control", *heads], lines, style="grid"),
        Paragraph(f"{'; '.join(head.words for head in heads)}.", style="soft"),
    ]


def _head(records: Sequence[Record], probe: str) -> Line:
    """Return a probe's number, with its name as words; the name alone without a stored description."""
    words = controls.words_of(records, probe)
    if words is None:
        return Line(probe, "", probe)
    return Line(words.section, "", f"{words.section} {words.name}")


def _verdict(gates: Sequence[GateResult]) -> Line:
    failed = controls.failed(gates)
    sign = controls.sign(gates)
    style = "fail" if failed else "pass"
    return Line(SIGNS[sign], style, f"{sign} {'FAIL' if failed else 'pass'}")
