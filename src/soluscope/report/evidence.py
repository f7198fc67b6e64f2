"""The matrix of hypotheses and evidence: the expectations of each hypothesis, and the observations.

The verdicts follow from rules that use intervals only, and only intervals of probes that passed their
gates. Suppose that an intervention on a trained model has no effect. This supports a hypothesis that
expects no effect, and speaks against a hypothesis that expects one. If the intervention has an effect, it
speaks against no hypothesis, because refitting the readout may remove the effect (the control `disjoint`
has such an effect and needs no LayerNorm). On planted models, the matrix never calls a hypothesis that is
true of the model "inconsistent".

Source: protocol.md section 9.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from soluscope.report import controls
from soluscope.report.blocks import (
    Block,
    Bullets,
    Cell,
    Line,
    Paragraph,
    Table,
    fold,
)
from soluscope.report.findings import (
    ENGAGED,
    IDLE,
    NO_COST,
    Side,
    comparisons,
    envelope,
    measured,
    number,
    per_token,
    seeds,
    side_of_zero,
    span,
)
from soluscope.results import Comparison, Number, Record, Term
from soluscope.results import Verdict as Settled

HYPOTHESES = ("H0-opt, H-aff", "H-static-smuggle", "H-smear")
MEANINGS = (
    "H0-opt: LayerNorm helps because it sets the output scale at the start of training. H-aff: it helps "
    "through centring and its affine part (gamma and beta).",
    "H-static-smuggle: small activations carry information, and one constant gain amplifies them.",
    "H-smear: small activations carry information, and a per-token gain amplifies them.",
)
NO_SHARE = 0.01
"""Threshold below which a share or a correlation counts as 0, as `NO_COST` for the loss."""
CONSTANTS = ("geometric mean", "best constant")
"""Constants that a freeze puts in the gain's place."""

Verdict = Literal["consistent", "inconsistent", "not settled"]
MARKS: dict[Verdict, str] = {"consistent": "pass", "inconsistent": "fail", "not settled": "open"}
OPEN: tuple[Verdict, ...] = ("not settled",) * 3
STYLES = ("text", "wide", *["verdict"] * len(HYPOTHESES))
"""Classes of the matrix's columns in the style sheet."""
HIGH_GAIN = "gain Q4"
"""The split in which H-smear expects its effects: the quartile of tokens with the highest gain."""


@dataclass(frozen=True)
class Seen:
    """The observations in one arm, and their verdict on each of `HYPOTHESES`."""

    observed: tuple[str, ...]
    """Observations, one line each."""
    verdicts: tuple[Verdict, ...] = ()
    """Verdicts in the order of `HYPOTHESES`; empty if the observation must not be used."""
    arm: str = ""


@dataclass(frozen=True)
class Evidence:
    """One row of the matrix."""

    section: str
    name: str
    expected: tuple[str, str, str]
    """Expectations in the order of `HYPOTHESES`."""
    rule: str
    """Rule from which the verdicts follow."""
    probe: str = ""
    """Probe that must have passed its gates; empty if no planted model can test the observation."""
    see: Callable[[Sequence[Record], str], Seen | None] = lambda records, arm: None
    """Function from all records and an arm to the observations, or to None where the numbers are missing."""


def matrix(records: Sequence[Record]) -> list[tuple[Evidence, list[Seen]]]:
    """Return each row with the observations in each arm with a per-token norm."""
    arms = per_token(records)
    return [(evidence, _seen(evidence, records, arms)) for evidence in EVIDENCE]


def blocks(records: Sequence[Record]) -> list[Block]:
    """Return the matrix; return an empty list if no arm has a per-token norm."""
    arms = per_token(records)
    if not arms:
        return []
    lines = [_line(evidence, seen, named=len(arms) > 1) for evidence, seen in matrix(records)]
    rules = [f"{each.section} ({each.name}): {each.rule}" for each in EVIDENCE if each.rule]
    return [
        Bullets(MEANINGS),
        Paragraph(
            "Intervals are for these trained models on other documents, on natural text without BOS; for "
            "Phi_dyn, they are for new seeds. g is the gain, n the mid norm's output before its affine part, and "
            "Z the denominator of SoLU's softmax. Consistent is not proof: several hypotheses can expect the "
            "same observation.",
            style="soft",
        ),
        Table(["evidence", "observed", *HYPOTHESES], lines, styles=STYLES),
        *fold("Rules for the verdicts", [Bullets(rules)]),
    ]


def _seen(evidence: Evidence, records: Sequence[Record], arms: Sequence[str]) -> list[Seen]:
    result = []
    standing = controls.standing(records, evidence.probe) if evidence.probe else "passed"
    for arm in arms:
        seen = evidence.see(records, arm)
        if seen is None:
            continue
        if standing == "failed":
            seen = Seen(("not citable (control failed)",))
        elif standing == "not run":
            seen = Seen((*seen.observed, "no control run"), OPEN)
        result.append(Seen(seen.observed, seen.verdicts, arm))
    return result


def _line(evidence: Evidence, seen: Sequence[Seen], named: bool) -> list[Cell]:
    """Return the cells of one row of the matrix, with the arms' names if there are several arms."""
    observed = ["\n".join((*[each.arm] * named, *each.observed)) for each in seen]
    cells: list[Cell] = [
        f"{evidence.section} {evidence.name}",
        [Line(text, "lines") for text in observed] or "not measured",
    ]
    for i, expected in enumerate(evidence.expected):
        verdicts = [(each.arm, each.verdicts[i]) for each in seen if each.verdicts]
        cells.append(
            [
                Line(f"expected: {expected}", "soft"),
                *(
                    Line(f"{arm}: {verdict}" if named else verdict, MARKS[verdict])
                    for arm, verdict in verdicts
                ),
            ]
        )
    return cells


# ---------------------------------------------------------------- observations


def _engagement(records: Sequence[Record], arm: str) -> Seen | None:
    rows = measured(records, "engagement", "r", arm, "median")
    if not rows:
        return None
    bounds = envelope(rows)
    smear: Verdict = "not settled"
    if bounds is not None and bounds[0] > ENGAGED:
        smear = "consistent"
    elif bounds is not None and bounds[1] < IDLE:
        smear = "inconsistent"
    return Seen((_observed(rows),), ("consistent", "consistent", smear))


def _freeze(records: Sequence[Record], arm: str) -> Seen | None:
    """Judge the cost of one gain for all tokens in a trained model, at the constant that costs less.

    Either constant is a static gain. The constant with the least loss on other documents may be wrong for
    these documents, and the geometric mean may be far from the least loss. One constant without a cost is
    sufficient.
    """
    observed, overall, at_high_gain = [], [], []
    for constant in CONSTANTS:
        rows = measured(records, "scale_freeze", f"frozen at {constant}", arm)
        if not rows:
            continue
        highest = measured(records, "scale_freeze", f"frozen at {constant}", arm, group=HIGH_GAIN)
        observed.append(f"{constant} {_observed(rows)}")
        if highest:
            observed.append(f"{constant}, at the quartile of highest gain {_observed(highest)}")
        overall.append(side_of_zero(rows, NO_COST))
        at_high_gain.append(side_of_zero(highest or rows, NO_COST))
    if not observed:
        return None
    none = _if_zero(_least(overall))
    return Seen(tuple(observed), (none, none, _if_above(_least(at_high_gain))))


def _swap(records: Sequence[Record], arm: str) -> Seen | None:
    rows = measured(records, "scale_swap", "swap, signed", arm)
    if not rows:
        return None
    where = side_of_zero(rows, NO_COST)
    none = _if_zero(where)
    return Seen((_observed(rows),), (none, none, _if_above(where)))


def _phi_dyn(records: Sequence[Record], arm: str) -> Seen | None:
    static = comparisons(records, Term.STATIC, arm)
    if not static:
        return None
    phi = next(iter(comparisons(records, Term.SHARE, arm)), None)
    off_zero = phi is not None and phi.low is not None and phi.low > 0
    where = side_of_zero(static, 0.0)
    if where == "above" and not off_zero:
        where = "open"  # few seeds make the ratio's resampled interval a little too narrow
    if static[0].verdict is Settled.EQUIVALENT:
        # A difference that exists but is too small to matter supports neither hypothesis.
        where = "open" if where == "above" else "zero"
    observed = [f"best static arm minus this arm {_observed(static)}"]
    if phi is not None:
        observed.insert(0, "undefined" if phi.value is None else _observed([phi]))
    smear = _if_above(where)
    verdict = _OPPOSITE[smear]  # below 0: the static arm is even better
    return Seen(tuple(observed), (verdict, verdict, smear))


def _low_set(records: Sequence[Record], arm: str) -> Seen | None:
    """Judge the loss that the lowest activations carry, without comparing it to random neurons of the same |n|.

    If the set carries no loss, this does not rule out a code of small activations outside the set.
    """
    probe, removed = "low_activation_impact", "lowest 90% removed"
    lowest = measured(records, probe, removed, arm)
    residual = measured(records, probe, f"{removed}, D", arm)
    if not (lowest and residual):
        return None
    at_high_gain = measured(records, probe, f"{removed}, D where the gain is high", arm)
    same_mass = measured(records, probe, "set: same |n|", arm, x=0.9)
    observed = [f"{removed} {_observed(lowest)}", f"D {_observed(residual)}"]
    if at_high_gain:
        observed.append(f"D where the gain is high {_observed(at_high_gain)}")
    if same_mass:
        observed.append(f"random neurons of the same |n| at 0 {_observed(same_mass)}")
    size = side_of_zero(lowest, NO_COST)
    D_is_zero = _if_zero(side_of_zero(residual, NO_COST))
    none, static = (D_is_zero if size == wanted else "not settled" for wanted in ("zero", "above"))
    by_gain = _if_above(side_of_zero(at_high_gain or residual, NO_COST))
    return Seen(tuple(observed), (none, static, by_gain if size == "above" else "not settled"))


def _specificity(records: Sequence[Record], arm: str) -> Seen | None:
    """Judge A, the effect of the gain alone on specificity.

    A gain may vary and carry information without changing the order of activations. So A = 0 does not rule
    out smearing.
    """
    rows = measured(records, "specificity", "A (gain only)", arm)
    if not rows:
        return None
    where = side_of_zero(rows, NO_SHARE)
    none = _if_zero(where)
    return Seen(
        (_observed(rows),), (none, none, "consistent" if where == "above" else "not settled")
    )


def _two_by_two(records: Sequence[Record], arm: str) -> Seen | None:
    cells = [measured(records, "lateral_inhibition", name, arm) for name in ("g const", "Z const")]
    if not all(cells):
        return None
    gain, softmax = (side_of_zero(rows, NO_COST) for rows in cells)
    idle = _if_zero("zero" if gain == softmax == "zero" else "open")
    observed = (f"g const {_observed(cells[0])}", f"Z const {_observed(cells[1])}")
    return Seen(observed, (idle, idle, _if_above(gain)))


def _if_zero(where: Side) -> Verdict:
    """Return the verdict on a hypothesis that expects no effect of an edit: a refit may remove an effect."""
    return "consistent" if where == "zero" else "not settled"


def _if_above(where: Side) -> Verdict:
    """Return the verdict on a hypothesis that expects an effect above 0."""
    if where == "open":
        return "not settled"
    return "consistent" if where == "above" else "inconsistent"


_OPPOSITE: dict[Verdict, Verdict] = {
    "consistent": "inconsistent",
    "inconsistent": "consistent",
    "not settled": "not settled",
}


def _least(sides: Sequence[Side]) -> Side:
    """Return the side of 0 of the cheapest of several edits, as far as their intervals settle it."""
    by_cost: tuple[Side, ...] = ("zero", "below", "open", "above")
    return next(where for where in by_cost if where in sides)


def _observed(rows: Sequence[Number]) -> str:
    """Return the seeds' estimates and the outer bounds of their intervals as text."""
    bounds = envelope(rows)
    reach = "no interval" if bounds is None else f"{number(bounds[0])} to {number(bounds[1])}"
    n = rows[0].n if isinstance(rows[0], Comparison) else len(rows)
    return f"{span(row.value for row in rows)} {rows[0].unit} [{reach}], {seeds(n)}"


# ---------------------------------------------------------------- the rows

EVIDENCE = (
    Evidence(
        "P1",
        "engagement: r at the typical token",
        ("any", "any, low", "high (above .5)"),
        "any r is consistent with a hypothesis that expects any r. H-smear is consistent if all intervals lie "
        "above .5, and inconsistent if all lie below .05.",
        "engagement",
        _engagement,
    ),
    Evidence(
        "P4",
        "freeze: loss with one gain for all tokens minus unchanged loss",
        ("about 0 after a refit", "about 0", "above 0 at tokens of high gain"),
        "about 0 means closer to 0 than .001 nats; above 0 means by more than that. The constant that costs less "
        "counts. A cost without a refit does not rule out a static hypothesis. H-smear is judged at the quartile "
        "of highest gain.",
        "scale_freeze",
        _freeze,
    ),
    Evidence(
        "P5",
        "swap: loss with the gain of another, similar token minus unchanged loss",
        ("about 0 after a refit", "about 0", "above 0 at tokens of high gain"),
        "as for the freeze. The swap is not split by gain, so H-smear is judged over all tokens.",
        "scale_swap",
        _swap,
    ),
    Evidence(
        "P8",
        "Phi_dyn: share of the benefit of LN that the best static arm does not reach",
        ("about 0", "about 0", "interval above 0"),
        "about 0: the best static arm is equivalent (closer than .005 nats) or better. Above 0: the intervals of "
        "Phi_dyn and of its numerator both lie above 0. If both hold, the difference is too small to matter, and "
        "the verdict is not settled. There is no gate, because planted models are not trained.",
        see=_phi_dyn,
    ),
    Evidence(
        "P9",
        "lowest 90% of a token's activations removed together: the cost, and D, the part of the cost that a "
        "model with one gain for all tokens would not have",
        ("small; D 0", "large; D 0", "large; D above 0"),
        "a large cost is above .001 nats; a small cost is closer to 0. D is 0 if it is closer to 0 than .001 nats, "
        "and above 0 if it is above .001 nats. H-smear is judged by D at tokens whose gain is above the geometric "
        "mean. A small cost does not rule H-smear out, because a code may lie outside the set; only a large cost "
        "without a D above 0 there speaks against H-smear. The cost of random neurons of the same |n| is shown for "
        "comparison and does not affect the verdicts.",
        "low_activation_impact",
        _low_set,
    ),
    Evidence(
        "P11",
        "A, gain only: specificity of weak activations before minus after a per-token gain",
        ("0", "0", "above 0"),
        "A is 0 if it is closer to 0 than .01, and above 0 if it is above .01. A = 0 does not rule out smearing: a "
        "gain can carry information without changing the order of activations. A nonzero A does not rule out a "
        "static hypothesis: a gain can change an order that the model does not use.",
        "specificity",
        _specificity,
    ),
    Evidence(
        "P20",
        "2x2: loss with a constant gain g, or with a constant Z, minus unchanged loss",
        ("Z and g idle", "Z and g idle", "g main effect"),
        "idle: both changes are closer to 0 than .001 nats. g has a main effect if a constant g costs more than "
        "that. A cost without a refit does not rule out a static hypothesis.",
        "lateral_inhibition",
        _two_by_two,
    ),
    Evidence(
        "P23",
        "gap at convergence (a study of training: not measured yet)",
        ("vanishes with tuning of lr and gain", "vanishes with tuning of lr and gain", "persists"),
        "",
    ),
)
