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

from collections.abc import Callable, Collection, Sequence
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
    NO_COST,
    SHARE_OF_LOSS,
    VARIES,
    Gain,
    Side,
    before_norm,
    choices,
    comparisons,
    envelope,
    gain_varies,
    listed,
    measured,
    nothing_at_high_gain,
    number,
    per_token,
    rescaled,
    rescales,
    seeds,
    settings,
    side_of_zero,
    span,
    untuned,
)
from soluscope.results import (
    SCALED_SIZE,
    SIGNIFICANT,
    Comparison,
    Grid,
    Located,
    Number,
    Record,
    Term,
    Where,
    of_kind,
)
from soluscope.results import Verdict as Settled

HYPOTHESES = ("H0-opt", "H-aff", "H-static-smuggle", "H-dyn", "H-smear")
MEANINGS = (
    "H0-opt: LayerNorm helps because it sets the output scale at the start of training. H-aff: it helps "
    "through its affine part (gamma and beta) and centring.",
    "H-static-smuggle: small activations carry information, and one constant gain amplifies them.",
    "H-dyn: the loss needs a gain for each token. H-smear: H-dyn, and the tokens that need it have diffuse codes, "
    "which many neurons share.",
)
PER_NEURON, DIFFUSE_CODES = "one gain for each neuron", "diffuse codes at the others' gain"
NO_SHARE = 0.01
"""Threshold below which a share or a correlation counts as 0, as `NO_COST` for the loss."""
CONSTANTS = ("geometric mean", "best constant")
"""Constants that a freeze puts in the gain's place."""
Verdict = Literal["consistent", "inconsistent", "not settled"]
MARKS: dict[Verdict, str] = {"consistent": "pass", "inconsistent": "fail", "not settled": "open"}
OPEN: tuple[Verdict, ...] = tuple(["not settled"] * len(HYPOTHESES))
STYLES = ("text", "wide", *["verdict"] * len(HYPOTHESES))
"""Classes of the matrix's columns in the style sheet."""


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
    expected: tuple[str, ...]
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
    rows = matrix(records)
    lines = [_line(evidence, seen, named=len(arms) > 1) for evidence, seen in rows]
    alike = [text for arm in arms for text in _alike(rows, arm)]
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
        *([Bullets(alike)] if alike else []),
        Table(["evidence", "observed", *HYPOTHESES], lines, styles=STYLES),
        *fold("Rules for the verdicts", [Bullets(rules)]),
    ]


def _alike(rows: Sequence[tuple[Evidence, Sequence[Seen]]], arm: str) -> list[str]:
    """Return a sentence for each group of hypotheses with the same verdicts on an arm, none of them inconsistent.

    The sentence names the rows that could still distinguish them: the group's expectations differ there, and the
    observation is not consistent with all of them.
    """
    of_arm = [(each, next((one for one in seen if one.arm == arm), None)) for each, seen in rows]
    groups: dict[tuple[Verdict, ...], list[int]] = {}
    for i in range(len(HYPOTHESES)):
        verdicts = tuple(one.verdicts[i] for _, one in of_arm if one is not None and one.verdicts)
        if verdicts and "inconsistent" not in verdicts:
            groups.setdefault(verdicts, []).append(i)
    result = []
    for group in groups.values():
        apart = [
            f"{each.section} {each.name.split(':')[0]} ({known})"
            for each, one in of_arm
            if each.rule and len({each.expected[i] for i in group}) > 1
            if (known := _known(one, group[0])) != "consistent"
        ]
        if len(group) > 1:
            result.append(
                f"{arm}: no row distinguishes {', '.join(HYPOTHESES[i] for i in group)} so far. "
                + (f"These could: {'; '.join(apart)}." if apart else "None here can.")
            )
    return result


def _known(seen: Seen | None, i: int) -> str:
    """Return what a row says on a hypothesis, by its number in `HYPOTHESES`."""
    if seen is None:
        return "not measured"
    return seen.verdicts[i] if seen.verdicts else "not citable"


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
    rows = measured(records, "engagement", "log gain", arm, "sd")
    if not rows:
        return None
    observed = [f"sd of log g {_observed(rows)}"]
    for name, quantity, statistic in (
        ("r at 99% of the tokens", "r", "q99"),
        (SHARE_OF_LOSS, SHARE_OF_LOSS, ""),
    ):
        if more := measured(records, "engagement", quantity, arm, statistic):
            observed.append(f"{name} {_observed(more)}")
    dyn = _IF_VARIES[gain_varies(records, arm)]
    return Seen(tuple(observed), ("consistent",) * 3 + (dyn, dyn))


def _freeze(records: Sequence[Record], arm: str) -> Seen | None:
    """Judge the cost of one gain for all tokens, or for all tokens of a neuron, in a trained model.

    Each constant is a static gain, and so are one gain and a gamma for each neuron. The constant with the least
    loss on other documents may be wrong for these documents, and the geometric mean may be far from the least
    loss. One static readout without a cost is sufficient.
    """
    probe = "scale_freeze"
    edits = {f"frozen at {constant}": constant for constant in CONSTANTS}
    rows = {
        name: measured(records, probe, name, arm) for name in (*edits, PER_NEURON, DIFFUSE_CODES)
    }
    if not any(rows[name] for name in edits):
        return None
    held = {name: measured(records, probe, f"{name}, final norm frozen", arm) for name in edits}
    observed = [f"{what} {_observed(rows[name])}" for name, what in edits.items() if rows[name]]
    observed += [
        f"{name} {_observed(rows[name])}" for name in (PER_NEURON, DIFFUSE_CODES) if rows[name]
    ]
    observed += [
        f"{what}, final norm frozen {_observed(held[name])}"
        for name, what in edits.items()
        if held[name]
    ]
    swallowed = _swallowed(records, arm, observed)
    one_gain = _least([side_of_zero(rows[name], NO_COST) for name in edits if rows[name]])
    any_gamma = _least([one_gain, side_of_zero(rows[PER_NEURON], NO_COST)])
    diffuse = side_of_zero(rows[DIFFUSE_CODES], NO_COST)
    if any_gamma in ("zero", "below"):
        diffuse = any_gamma  # a static readout does as well, wherever the codes are diffuse
    if swallowed:
        one_gain, any_gamma, diffuse = map(_unless_zero, (one_gain, any_gamma, diffuse))
    static = _if_zero(any_gamma)
    return Seen(
        tuple(observed),
        (_if_zero(one_gain), static, static, _if_above(any_gamma), _if_above(diffuse)),
    )


def _swap(records: Sequence[Record], arm: str) -> Seen | None:
    """Judge the gain of a similar token. Where similar tokens have similar gains, a zero is no evidence.

    A donor is a token of the same position group, stream and fifth of the surprisal. A per-token gain may be needed
    between these classes alone, and a swap within them then costs nothing. So a zero contradicts no hypothesis.
    """
    rows = measured(records, "scale_swap", "swap, signed", arm)
    if not rows:
        return None
    by_diffuse = measured(records, "scale_swap", "swap, signed, diffuse codes", arm)
    ratios = measured(records, "scale_swap", "log(g_u / g_t)", arm, "sd")
    observed = [_observed(rows)]
    if by_diffuse:
        observed.append(f"of which diffuse codes {_observed(by_diffuse)}")
    if ratios:
        observed.append(f"sd of log(g_u / g_t) {_observed(ratios)}")
    where, diffuse = side_of_zero(rows, NO_COST), side_of_zero(by_diffuse, NO_COST)
    moved = envelope(ratios)
    if moved is None or moved[0] <= VARIES or _swallowed(records, arm, observed):
        where, diffuse = _unless_zero(where), _unless_zero(diffuse)
    none = _if_zero(where)
    return Seen(tuple(observed), (none, none, none, *map(_only_if_above, (where, diffuse))))


def _phi_dyn(records: Sequence[Record], arm: str) -> Seen | None:
    static = comparisons(records, Term.STATIC, arm)
    if not static:
        return None
    phi = next(iter(comparisons(records, Term.SHARE, arm)), None)
    off_zero = phi is not None and phi.low is not None and phi.low > 0
    where = side_of_zero(static, 0.0)
    if where == "above" and not (off_zero and (static[0].p_adj or 1.0) < SIGNIFICANT):
        where = "open"
    if static[0].verdict is Settled.EQUIVALENT:
        # A difference that exists but is too small to matter supports neither hypothesis.
        where = "open" if where == "above" else "zero"
    observed = [f"best static arm minus this arm {_observed(static)}"]
    if phi is not None:
        observed.insert(0, "undefined" if phi.value is None else _observed([phi]))
    effect = "ln_final gives the best static arm a scale for each token"
    if _rescaled(records, static[0].against, effect, observed):
        where = _unless_zero(where)
    dyn = _if_above(where)
    none = _OPPOSITE[dyn]  # below 0: the static arm is even better
    if none == "inconsistent" and (why := _may_be_beaten(records, arm)):
        observed.append(f"{why}, so a better static arm may exist")
        none = "not settled"
    return Seen(tuple(observed), (none, none, none, dyn, dyn))


def _may_be_beaten(records: Sequence[Record], arm: str) -> str:
    """Return why another static arm may be better than the trained ones; empty without a reason.

    A static arm without an arm's centring or affine part may lose through these. One at a rate or gain that is not
    tuned may lose through that.
    """
    known = settings(records)
    of = known[arm]
    static = [each for each in known.values() if (each.role, each.size) == ("static", of.size)]
    if of.twin not in {each.variant for each in static}:
        return "no static arm with all other parts of this arm was trained"
    names = {each.arm for each in static}
    if found := sorted(names & {each.arm for each in untuned(records)}):
        return f"the learning rate of {listed(found)} is not tuned"
    at_edge = {each.chosen.arm for each in choices(records) if each.chosen.grid is not Grid.INSIDE}
    if found := sorted(names & at_edge):
        return f"the rate or gain of {listed(found)} was not chosen inside its grid"
    return ""


def _where(records: Sequence[Record], arm: str) -> Seen | None:
    """Judge at which tokens the best static arm loses more than this arm, both trained.

    A difference that is not at tokens of high gain may be at others, so it does not count against H-dyn. Where
    most tokens have nearly the same high gain (`ceiling`), the top quarter loses no more than the rest although
    H-smear is true. So H-smear is contradicted only if the top quarter itself loses nothing.
    """
    found = next(
        (each for each in of_kind(records, Located) if each.arm == arm and not each.design), None
    )
    if found is None:
        return None
    observed = [str(found.where)]
    observed += [
        f"{row.group} {_observed([row])}" for row in comparisons(records, Term.CONTRAST, arm)
    ]
    dyn, smear = _AT[found.where]
    if found.where is Where.NOT_HIGH_GAIN:
        if not nothing_at_high_gain(records, arm):
            smear = "not settled"
        effect = "ln_final gives the static arm a scale for each token"
        if _rescaled(records, found.against, effect, observed):
            smear = "not settled"
    return Seen(tuple(observed), ("not settled",) * 3 + (dyn, smear))


def _low_set(records: Sequence[Record], arm: str) -> Seen | None:
    """Judge the loss that the lowest activations carry, and the part that one gain for all would not have.

    A set that carries no loss, or none through the gain, does not rule out a code outside the set. Static
    smuggling is compared with the arms without a norm: any model's small activations carry some loss.
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
    others = {
        other: measured(records, probe, removed, other) for other in before_norm(records, arm)
    }
    others = {other: rows for other, rows in others.items() if rows}
    observed += [f"{removed} in {other} {_observed(rows)}" for other, rows in others.items()]
    size = side_of_zero(lowest, NO_COST)
    D_is_zero = _if_zero(side_of_zero(residual, NO_COST))
    by_gain = side_of_zero(at_high_gain or residual, NO_COST)
    amplified: Verdict = "consistent" if size == by_gain == "above" else "not settled"
    return Seen(
        tuple(observed),
        (
            D_is_zero if size == "zero" else "not settled",
            D_is_zero if size == "zero" else "not settled",
            D_is_zero if size == "above" and _above_all(lowest, others.values()) else "not settled",
            amplified,
            amplified,
        ),
    )


def _above_all(rows: Sequence[Number], others: Collection[Sequence[Number]]) -> bool:
    """Return whether the rows' intervals lie above those of every other arm; False if there is no other arm."""
    here, there = envelope(rows), [envelope(each) for each in others]
    known = [each for each in there if each is not None]
    if here is None or not known or len(known) < len(there):
        return False
    return here[0] > max(high for _, high in known)


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
    gain: Verdict = "consistent" if where == "above" else "not settled"
    return Seen((_observed(rows),), (none, none, none, gain, gain))


def _two_by_two(records: Sequence[Record], arm: str) -> Seen | None:
    """Judge the cells of the 2x2. Only the cell with both constant shows a pointwise unit.

    Either alone may cost nothing because the other takes its place.
    """
    names = ("g const", "Z and g const")
    cells = [measured(records, "lateral_inhibition", name, arm) for name in names]
    if not all(cells):
        return None
    observed = [f"{name} {_observed(rows)}" for name, rows in zip(names, cells, strict=True)]
    gain, both = (side_of_zero(rows, NO_COST) for rows in cells)
    if _swallowed(records, arm, observed):
        gain, both = _unless_zero(gain), _unless_zero(both)
    idle, dyn = _if_zero(both), _if_above(gain)
    return Seen(
        tuple(observed),
        (idle, idle, idle, dyn, "inconsistent" if dyn == "inconsistent" else "not settled"),
    )


def _swallowed(records: Sequence[Record], arm: str, observed: list[str]) -> bool:
    """Return whether ln_final may swallow changes of the gain in this arm, and add that to the observations."""
    return _rescaled(records, arm, "ln_final swallows changes of the gain", observed)


def _rescaled(records: Sequence[Record], arm: str, effect: str, observed: list[str]) -> bool:
    """Return whether ln_final rescales each token of an arm, or may do so because that was not measured.

    In both cases `observed` gets a line with the effect, which leaves a zero open.
    """
    supplied = rescales(records, arm)
    if supplied == "yes":
        observed.append(
            f"{SCALED_SIZE} {_observed(rescaled(records, arm))}: {effect}, so a zero is open"
        )
    elif supplied == "unknown":
        observed.append(
            f"{SCALED_SIZE} was not measured: it is not known whether {effect}, so a zero is open"
        )
    return supplied != "no"


def _unless_zero(where: Side) -> Side:
    """Return the side of 0 of an edit that would cost nothing in any case: only a cost says something."""
    return where if where == "above" else "open"


_AT: dict[Where, tuple[Verdict, Verdict]] = {
    Where.DIFFUSE: ("consistent", "consistent"),
    Where.HIGH_GAIN: ("consistent", "inconsistent"),
    Where.ALL_DIFFUSE: ("consistent", "consistent"),
    Where.CODE_OPEN: ("consistent", "not settled"),
    Where.NOT_HIGH_GAIN: ("not settled", "inconsistent"),
    Where.OPEN: ("not settled", "not settled"),
}
"""Verdicts on H-dyn and H-smear by the tokens at which the static arm loses more."""
_IF_VARIES: dict[Gain, Verdict] = {
    "varies": "consistent", "one constant": "inconsistent", "open": "not settled",
}  # fmt: skip


def _if_zero(where: Side) -> Verdict:
    """Return the verdict on a hypothesis that expects no effect of an edit: a refit may remove an effect."""
    return "consistent" if where == "zero" else "not settled"


def _if_above(where: Side) -> Verdict:
    """Return the verdict on a hypothesis that expects an effect above 0."""
    if where == "open":
        return "not settled"
    return "consistent" if where == "above" else "inconsistent"


def _only_if_above(where: Side) -> Verdict:
    """Return the verdict on a hypothesis that expects an effect above 0, where a zero does not count against it."""
    return "consistent" if where == "above" else "not settled"


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
        "engagement: does the gain vary?",
        ("any", "any", "any", "varies", "varies"),
        "the gain varies if the sd of log g is above .1. It is one constant if that sd is below .01, or if r is "
        "below .05 at 99% of the tokens and the other tokens have less than 1% of the loss. A low r at the "
        "typical token alone rules nothing out. A gain that varies need not matter: this row cannot distinguish "
        "H-smear from H-dyn.",
        "engagement",
        _engagement,
    ),
    Evidence(
        "P4",
        "freeze: loss with static gains minus unchanged loss",
        (
            "about 0 at one gain", "about 0 with a gain for each neuron", "about 0 with a gain for each neuron",
            "above 0", "above 0 for diffuse codes at the others' gain",
        ),
        "about 0 means closer to 0 than .001 nats; above 0 means by more than that. The edit that costs less "
        "counts. A cost does not rule out a static hypothesis, because a refit may remove it. If a gain for each "
        "neuron costs nothing, no token needs a separate gain. H-smear is judged where tokens of diffuse code "
        "get the gain of the other tokens. Where |o| / |r0| is above 5, ln_final swallows changes of the gain "
        "and a zero is not settled; the change with ln_final's scale frozen then shows what the mid norm does "
        "before ln_final.",
        "scale_freeze",
        _freeze,
    ),
    Evidence(
        "P5",
        "swap: loss with the gain of another, similar token minus unchanged loss",
        ("about 0 after a refit",) * 2 + ("about 0", "above 0", "above 0 at diffuse codes"),
        "as for the freeze. A zero is consistent with a static hypothesis only if similar tokens have different "
        "gains: the sd of log(g_u / g_t) must be above .1. It does not rule out H-dyn or H-smear, because tokens "
        "that are not similar do not give each other their gains.",
        "scale_swap",
        _swap,
    ),
    Evidence(
        "P8",
        "Phi_dyn: share of the benefit of LN that the best static arm does not reach",
        ("about 0",) * 3 + ("interval above 0",) * 2,
        "about 0: the best static arm is equivalent (closer than .005 nats) or better. Above 0: the intervals of "
        "Phi_dyn and of its numerator both lie above 0, and the corrected p is below .05. If both hold, the "
        "difference is too small to matter, and the verdict is not settled. Where |o| / |r0| of the static arm is "
        "above 5 or was not measured, ln_final may give that arm a scale for each token, and a zero is not "
        "settled. It compares with the static arms that were trained: a difference counts against a static "
        "hypothesis only if a static arm with all other parts of this arm is among them, at rates and gains that "
        "are tuned. There is no gate, because planted models are not trained.",
        see=_phi_dyn,
    ),
    Evidence(
        "P8",
        "where: the tokens at which the best static arm loses more",
        ("any",) * 3 + ("at high gain", "at high gain and diffuse codes"),
        "the tokens are sorted by the gain and K_eff of the other seeds. The static arm loses more at high gain "
        "if the interval for new seeds of the top quarter lies above 0, and so does its contrast with the other "
        "tokens at equal loss, with a corrected p below .05. It does so at diffuse codes if the same holds for "
        "the upper half by K_eff of these tokens, at equal gain. A contrast counts as 0 where it is equivalent to "
        "0 (.005 nats) or below 0. A difference at tokens of lower gain does not count against H-dyn. A first "
        "contrast of 0 counts against H-smear only if the top quarter itself loses nothing, because most tokens "
        "may have nearly the same high gain, and only where |o| / |r0| of the static arm was measured and lies "
        "below 5. There is no gate: planted models are not trained.",
        see=_where,
    ),
    Evidence(
        "P9",
        "lowest 90% of a token's activations removed together: the cost, and D, the part of the cost that a "
        "model with one gain for all tokens would not have",
        ("small; D 0",) * 2 + ("larger than without a norm; D 0",) + ("large; D above 0",) * 2,
        "a large cost is above .001 nats; a small cost is closer to 0. D is 0 if it is closer to 0 than .001 "
        "nats, and above 0 if it is above .001 nats; it is judged at tokens whose gain is above the geometric "
        "mean. Small activations carry some loss in any model, so static smuggling is consistent only if the "
        "cost exceeds that of each arm of the chain before the norm and of each baseline. Neither a small cost "
        "nor a D of 0 rules out H-smear, because a code may lie outside the set. The cost of random neurons of "
        "the same |n| is shown for comparison and does not affect the verdicts.",
        "low_activation_impact",
        _low_set,
    ),
    Evidence(
        "P11",
        "A, gain only: specificity of weak activations before minus after a per-token gain",
        ("0",) * 3 + ("0 or above",) * 2,
        "A is 0 if it is closer to 0 than .01, and above 0 if it is above .01. A = 0 does not rule out smearing: a "
        "gain can carry information without changing the order of activations. A nonzero A does not rule out a "
        "static hypothesis: a gain can change an order that the model does not use. This row cannot distinguish "
        "H-smear from H-dyn.",
        "specificity",
        _specificity,
    ),
    Evidence(
        "P20",
        "2x2: loss with a constant gain g, or with a constant Z and g, minus unchanged loss",
        ("Z and g idle",) * 3 + ("g main effect", "g main effect at diffuse codes"),
        "Z and g are idle if the change with both constant is closer to 0 than .001 nats; each alone can cost "
        "nothing because the other takes its place. g has a main effect if a constant g costs more than that. A "
        "cost without a refit does not rule out a static hypothesis. The cells do not say at which tokens, so "
        "they can rule out H-smear and not support it.",
        "lateral_inhibition",
        _two_by_two,
    ),
    Evidence(
        "P23",
        "gap at convergence (a study of training: not measured yet)",
        ("vanishes with tuning of lr and gain",) * 3 + ("persists",) * 2,
        "",
    ),
)  # fmt: skip
