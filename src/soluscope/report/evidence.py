"""Hypothesis x evidence on one page: what each account of LayerNorm expects, and what was seen.

The verdicts follow from rules that use intervals and nothing else, and only those of probes that passed
their gate. An intervention on a trained model can speak for an account that expects no effect, or
against one that expects one; an effect speaks against none, since a refit of the readout may
remove it (the control `disjoint` has such an effect and needs no LayerNorm). "Inconsistent" is never
said of an account that is true of a planted model.

Source: science.md section 9.
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
    "H0-opt, H-aff: LayerNorm helps by its output scale at the start of training, or by its affine part.",
    "H-static-smuggle: small activations carry information through one constant gain.",
    "H-smear: they do so through a scale of each token's own.",
)
NO_SHARE = 0.01
"""What `NO_COST` is for the loss, for shares and correlations."""
CONSTANTS = ("geometric mean", "best constant")
"""That a freeze may put in the gain's place."""

Verdict = Literal["consistent", "inconsistent", "not settled"]
MARKS: dict[Verdict, str] = {"consistent": "pass", "inconsistent": "fail", "not settled": "open"}
OPEN: tuple[Verdict, ...] = ("not settled",) * 3
STYLES = ("text", "wide", *["verdict"] * len(HYPOTHESES))
"""Of the matrix's columns."""
HIGH_GAIN = "gain Q4"
"""The split in which H-smear expects its effects."""


@dataclass(frozen=True)
class Seen:
    """What was observed in one arm, and what it says of each of `HYPOTHESES`."""

    observed: tuple[str, ...]
    """One line each."""
    verdicts: tuple[Verdict, ...] = ()
    """Empty where the observation may not be used."""
    arm: str = ""


@dataclass(frozen=True)
class Evidence:
    """One line of the matrix."""

    section: str
    name: str
    expected: tuple[str, str, str]
    """Under each of `HYPOTHESES`."""
    rule: str
    """How the verdicts follow."""
    probe: str = ""
    """Whose gate must have been passed; empty where no planted model can be asked."""
    see: Callable[[Sequence[Record], str], Seen | None] = lambda records, arm: None
    """From all records and an arm; None where the numbers are not there."""


def matrix(records: Sequence[Record]) -> list[tuple[Evidence, list[Seen]]]:
    """Return each line with what was seen in each arm with a per-token norm."""
    arms = per_token(records)
    return [(evidence, _seen(evidence, records, arms)) for evidence in EVIDENCE]


def blocks(records: Sequence[Record]) -> list[Block]:
    """The matrix; nothing where no arm has a per-token norm."""
    arms = per_token(records)
    if not arms:
        return []
    lines = [_line(evidence, seen, named=len(arms) > 1) for evidence, seen in matrix(records)]
    rules = [f"{each.section} {each.name}: {each.rule}" for each in EVIDENCE if each.rule]
    return [
        Bullets(MEANINGS),
        Paragraph(
            "Intervals are of these trained models on other documents, natural text without BOS; for "
            "Phi_dyn, of new seeds. Consistent is not proof: an account may expect what others do too.",
            style="soft",
        ),
        Table(["evidence", "observed", *HYPOTHESES], lines, styles=STYLES),
        *fold("How the verdicts follow", [Bullets(rules)]),
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
    """Cells of one line of the matrix; the arms are named where there are several."""
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


# ---------------------------------------------------------------- what was seen


def _engagement(records: Sequence[Record], arm: str) -> Seen | None:
    rows = measured(records, "engagement", "r", arm, "median")
    if not rows:
        return None
    ends = envelope(rows)
    smear: Verdict = "not settled"
    if ends is not None and ends[0] > ENGAGED:
        smear = "consistent"
    elif ends is not None and ends[1] < IDLE:
        smear = "inconsistent"
    return Seen((_observed(rows),), ("consistent", "consistent", smear))


def _freeze(records: Sequence[Record], arm: str) -> Seen | None:
    """What one gain for all tokens costs a trained model, at the constant that costs less.

    A constant is a static gain too: that of least loss on other documents may be off for these, and the
    geometric mean may be far from the least loss. One that costs nothing is enough.
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
        # There, but so little that it does not matter, is neither account's.
        where = "open" if where == "above" else "zero"
    observed = [f"best static arm minus this one {_observed(static)}"]
    if phi is not None:
        observed.insert(0, "undefined" if phi.value is None else _observed([phi]))
    smear = _if_above(where)
    verdict = _OPPOSITE[smear]  # below 0: a static gain is better still
    return Seen(tuple(observed), (verdict, verdict, smear))


def _low_set(records: Sequence[Record], arm: str) -> Seen | None:
    """Judged by what the low activations add, and not beside random neurons of the same |n|.

    A set that carries nothing rules out no code of small activations: it may lie outside the set.
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
    """A gain may vary, and carry all, without a change of order: no A is no sign of no smearing."""
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
    """For an account that expects no effect of an edit: an effect may vanish with a refit."""
    return "consistent" if where == "zero" else "not settled"


def _if_above(where: Side) -> Verdict:
    """For an account that expects an effect above 0."""
    if where == "open":
        return "not settled"
    return "consistent" if where == "above" else "inconsistent"


_OPPOSITE: dict[Verdict, Verdict] = {
    "consistent": "inconsistent",
    "inconsistent": "consistent",
    "not settled": "not settled",
}


def _least(sides: Sequence[Side]) -> Side:
    """Where the cheapest of several edits lies, as far as their intervals tell."""
    by_cost: tuple[Side, ...] = ("zero", "below", "open", "above")
    return next(where for where in by_cost if where in sides)


def _observed(rows: Sequence[Number]) -> str:
    """Estimates over seeds, and how far their intervals reach."""
    ends = envelope(rows)
    reach = "no interval" if ends is None else f"{number(ends[0])} to {number(ends[1])}"
    n = rows[0].n if isinstance(rows[0], Comparison) else len(rows)
    return f"{span(row.value for row in rows)} {rows[0].unit} [{reach}], {seeds(n)}"


# ---------------------------------------------------------------- the lines

EVIDENCE = (
    Evidence(
        "P1",
        "engagement: r at the typical token",
        ("any", "any, low", "high (above .5)"),
        "any r is consistent with what expects any; H-smear takes all intervals to lie above .5, and is "
        "inconsistent where all lie below .05.",
        "engagement",
        _engagement,
    ),
    Evidence(
        "P4",
        "freeze: loss with one gain for all tokens minus loss as it is",
        ("about 0 after a refit", "about 0", "above 0 at tokens of high gain"),
        "about 0 is closer than .001 nats, above 0 is by more. The constant that costs less counts. A cost without "
        "a refit rules out no static account; H-smear is judged at the quartile of highest gain.",
        "scale_freeze",
        _freeze,
    ),
    Evidence(
        "P5",
        "swap: loss with the gain of another token like it minus loss as it is",
        ("about 0 after a refit", "about 0", "above 0 at tokens of high gain"),
        "as for the freeze; a swap has no quartiles, so that H-smear is judged over all tokens.",
        "scale_swap",
        _swap,
    ),
    Evidence(
        "P8",
        "Phi_dyn: share of LayerNorm's gain that no static arm reaches",
        ("about 0", "about 0", "above 0, interval off 0"),
        "about 0: the best static arm is equivalent (closer than .005 nats) or better; above 0: the intervals of "
        "Phi_dyn and of its numerator both lie above 0; both at once, so little that it does not matter, is not "
        "settled. No planted model is trained, so there is no gate.",
        see=_phi_dyn,
    ),
    Evidence(
        "P9",
        "lowest 90% of a token's activations removed together; D, the part that one gain would not give",
        ("small; D 0", "large; D 0", "large; D above 0"),
        "large costs more than .001 nats, small is closer to 0; D 0 is closer than .001 nats, above 0 is by more. "
        "H-smear's D is that at tokens whose gain is above the geometric mean. Only a large set with no D above 0 "
        "there speaks against it: a code may lie outside the set. Random neurons of the same |n| are shown, and "
        "judge nothing.",
        "low_activation_impact",
        _low_set,
    ),
    Evidence(
        "P11",
        "A, gain only: specificity of weak activations before minus after a per-token gain",
        ("0", "0", "above 0"),
        "0 is closer than .01, above 0 is by more. An A of 0 rules out no smearing: a gain that carries all may "
        "change no order. An A off 0 rules out no static account: a gain may change an order that nothing reads.",
        "specificity",
        _specificity,
    ),
    Evidence(
        "P20",
        "2x2: loss with the gain, or softmax's Z, one constant minus loss as it is",
        ("Z and g idle", "idle", "g main effect"),
        "idle: both closer to 0 than .001 nats; g has a main effect if it costs more. A cost without a refit rules "
        "out no static account.",
        "lateral_inhibition",
        _two_by_two,
    ),
    Evidence(
        "P23",
        "gap at convergence (a study of training: not measured yet)",
        ("vanishes with tuning of lr and gain", "the same", "persists"),
        "",
    ),
)
