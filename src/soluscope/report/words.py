"""What was found and how sure it is, in sentences made from the numbers.

No sentence claims more than its interval: a sign is stated as settled only where the interval for
new seeds and new documents leaves out 0, and two seeds are always called two seeds.
"""

from __future__ import annotations

from collections.abc import Sequence

from soluscope.report import controls
from soluscope.report.findings import (
    ENGAGED,
    IDLE,
    NO_COST,
    NORMED,
    TWIN,
    arms_of,
    by_kappa,
    choices,
    comparisons,
    engagement,
    envelope,
    measured,
    number,
    seeds,
    seeds_of,
    signed,
    sizes,
    span,
    tuned,
)
from soluscope.results import MARGIN, Row

N_NAMED = 12
"""Arms that are named one by one; of more, their variants are."""
FREEZES = (
    ("frozen at geometric mean", "the geometric mean"),
    ("frozen at best constant", "the best constant for the other documents"),
)


def headline(rows: list[Row]) -> list[str]:
    """Plain sentences, the most important one first; shared by page and terminal."""
    return [*edges(rows), *_headline(tuned(rows))]


def edges(rows: list[Row]) -> list[str]:
    """That a rate or a gain may be better yet beyond its grid, so that nothing follows; or nothing.

    Source: science.md section 10.2 (c).
    """
    extreme = {"lower": "lowest", "upper": "highest"}
    open_ended = [
        f"{one.chosen.arm} ({one.setting} {one.chosen.x:.3g} is the {extreme[one.edge]} of {one.grid})"
        for one in choices(rows)
        if one.edge
    ]
    if not open_ended:
        return []
    return [
        "No comparison here is to be believed yet: on the select split the best of what was tried lies at "
        f"the edge of its grid for {', '.join(open_ended)}. Widen these grids."
    ]


def _headline(rows: list[Row]) -> list[str]:
    sentences = [_basis(rows)]
    normed = [
        arm for mine in sizes(rows).values() for arm in (by_kappa(mine) or arms_of(mine, NORMED))
    ]
    gains = [gain for arm in normed for gain in comparisons(rows, "gain of LN", arm=arm)]
    if not gains:
        sentences.insert(
            0,
            f"No verdict on LayerNorm: that takes runs of both solu and {NORMED} that share a seed.",
        )
    for place, gain in enumerate(gains):
        sentences.insert(place, _verdict(rows, gain))
    for gain in gains:
        sentences += [_gain(rows, gain), *_phi_dyn(rows, gain.arm), *_static(rows, gain.arm)]
        sentences += _twins(rows, gain.arm)
    said = {"engagement": _engagement, "scale_freeze": _freeze}
    gates = {probe: controls.gate(rows, probe) for probe in said}
    for arm in normed:
        for probe, say in said.items():
            sentences += say(rows, arm) if gates[probe] == "passed" else []
    for probe, gate in gates.items():
        if gate == "failed":
            sentences.append(not_citable(probe, controls.failures(rows, probe)))
        elif gate == "not run" and any(row.probe == probe for row in rows):
            sentences.append(f"{probe} was put before no control: nothing is said of its numbers.")
    return sentences


def not_citable(probe: str, wrong: Sequence[str]) -> str:
    """What to say in place of a probe's numbers where it failed its gate."""
    noun = "control" if len(wrong) == 1 else "controls"
    return f"{probe} failed its {noun} {', '.join(wrong)}: its numbers are not to be cited."


def _ends(row: Row) -> str:
    if row.low is None or row.high is None:
        return "no interval can be given"
    return f"95% interval {signed(row.low)} to {signed(row.high)}"


def _basis(rows: list[Row]) -> str:
    runs = {row.run for row in rows if row.run}
    arms = sorted({row.arm for row in rows if row.arm})
    counts = sorted({seeds_of(rows, arm) or _n_of_loss(rows, arm) for arm in arms})
    each = " to ".join(dict.fromkeys([str(counts[0]), str(counts[-1])])) if counts else "0"
    noun = "seed" if each == "1" else "seeds"
    n_runs, n_arms = (
        f"{len(x)} {w}{'s'[: len(x) != 1]}" for x, w in ((runs, "run"), (arms, "arm"))
    )
    named = arms if len(arms) <= N_NAMED else sorted({row.variant for row in rows if row.variant})
    text = f"Compared here: {n_runs} of {n_arms} ({', '.join(named)}), {each} {noun} an arm"
    measured_on = [row for row in rows if row.probe == "loss" and row.run]
    documents = max((row.n_clusters for row in measured_on), default=0)
    tokens = max((row.n for row in measured_on), default=0)
    if documents:
        measured = f"{documents:,} documents" + (f" ({tokens:,} tokens)" if tokens else "")
        text += f"; losses are measured on {measured} kept out of training"
    text += "."
    if counts and counts[0] == 1:
        text += " One seed shows these trained models, not their variants."
    elif counts and counts[0] == 2:
        text += " Two seeds say little about a third."
    return text


def _n_of_loss(rows: list[Row], arm: str) -> int:
    return max((row.n for row in comparisons(rows, "loss", arm=arm)), default=0)


def _verdict(rows: list[Row], gain: Row) -> str:
    arm, n = gain.arm, seeds(gain.n)
    phi = next(iter(comparisons(rows, "Phi_dyn", arm=arm)), None)
    if gain.low is None or gain.high is None:
        return (
            f"Not settled whether LayerNorm lowers the loss ({arm}): {n}, no interval for new "
            "seeds."
        )
    if gain.high < 0:
        return (
            f"Nothing for smearing to explain at this size ({arm}, {n}): plain SoLU has a lower "
            "loss than SoLU with LayerNorm."
        )
    if gain.low <= 0:
        return (
            f"Not settled whether LayerNorm lowers the loss ({arm}, {n}): the interval for new "
            "seeds and documents has 0 in it, so there is no gain of which to ask what it needs."
        )
    lowers = f"LayerNorm lowers the loss ({arm}, {n})"
    if phi is None:
        return (
            f"{lowers}; what of it takes a scale of each token's own cannot be said without a "
            "static arm."
        )
    if phi.value is None:
        return f"{lowers}, but by too little to ask what share takes a scale of each token's own."
    if phi.low is None or phi.high is None:
        return (
            f"{lowers}; no interval can be given for the share that takes a scale of each token's "
            "own."
        )
    static = next(iter(comparisons(rows, "static - LN", arm=arm)), None)
    # Both must say so: few seeds make the ratio's resampled interval a little too narrow.
    if phi.low > 0 and static is not None and (static.low or 0.0) > 0:
        if static.note.startswith("equivalent"):
            return (
                f"{lowers}; a scale of each token's own adds to what a static gain reaches, but so"
                " little that it does not matter."
            )
        return (
            f"{lowers}, and part of this takes a scale of each token's own: a static gain does "
            "not reach it."
        )
    if phi.high < 0:
        return (
            f"{lowers}, but a static gain lowers it more: no scale of each token's own is needed."
        )
    return f"{lowers}; that any of this takes a scale of each token's own is not shown."


def _gain(rows: list[Row], gain: Row) -> str:
    value = gain.value or 0.0
    lower = "plain SoLU" if value < 0 else gain.arm
    other = gain.arm if value < 0 else "plain SoLU"
    text = f"Gain of LN: {lower} had a loss {abs(value):.4f} nats a token lower than {other}"
    fixed = next(iter(comparisons(rows, "gain of LN", arm=gain.arm, cluster="document")), None)
    text += f" (gain {signed(value)}"
    if fixed is not None:
        text += f"; for these trained models on other documents, {_ends(fixed)}"
    text += f"). For new seeds and documents: {_ends(gain)}, from {seeds(gain.n)}"
    if gain.low is None or gain.high is None:
        return f"{text}, so nothing is known of other seeds."
    if gain.low <= 0 <= gain.high:
        return f"{text}, so the sign is not settled."
    return f"{text}, so the sign is settled at the 95% level."


def _phi_dyn(rows: list[Row], arm: str) -> list[str]:
    """Phi_dyn, what it means and how it was made; or why there is none."""
    sentences = []
    for row in comparisons(rows, "Phi_dyn", arm=arm):
        note = row.note.split("; best static")[0]  # the next sentence names it
        if row.value is None:
            sentences.append(f"Phi_dyn ({arm}) is {note}.")
        else:
            ends = "no interval"
            if row.low is not None and row.high is not None:
                ends = f"95% interval {row.low:.2f} to {row.high:.2f}"
            sentences.append(
                f"Phi_dyn ({arm}) is {row.value:.2f} ({ends}, {seeds(row.n)}), the share of "
                "LayerNorm's gain that no static arm trained here reaches: 0 none of it, 1 all of it, below "
                f"0 static is better; {note}."
            )
    return sentences


def _static(rows: list[Row], arm: str) -> list[str]:
    return [
        f"Best static arm minus {arm}: {signed(row.value or 0.0)} nats a token ({_ends(row)} for "
        f"new seeds and documents, {seeds(row.n)}); {row.note}."
        for row in comparisons(rows, "static - LN", arm=arm)
    ]


def _twins(rows: list[Row], arm: str) -> list[str]:
    """The trained arms that differ from `arm` only in having one gain for all tokens."""
    sentences = []
    for row in comparisons(rows, "difference", group=f"minus {arm}"):
        if row.variant != TWIN:
            continue
        judged = ""
        if row.low is not None and row.high is not None and max(-row.low, row.high) < MARGIN:
            judged = f", closer than {MARGIN} nats"
        sentences.append(
            f"Trained with one gain for all tokens instead ({row.arm}), the loss differs from "
            f"{arm}'s by {signed(row.value or 0.0)} nats a token ({_ends(row)} for new seeds and "
            f"documents, {seeds(row.n)}){judged}."
        )
    return sentences


def _engagement(rows: list[Row], arm: str) -> list[str]:
    """Is the norm active? Judged by the ends of the seeds' intervals, not by their middles."""
    content = engagement(rows, arm, "not BOS")
    if not content:
        return []
    ends = envelope(content)
    values = [row.value for row in content]
    if ends is None:
        verdict = "how far LayerNorm is engaged has no interval"
    elif ends[0] > ENGAGED:
        verdict = "LayerNorm is engaged at the typical token"
    elif ends[1] < IDLE:
        verdict = (
            "LayerNorm is close to one static gain at the typical token, pinned by its epsilon"
        )
    else:
        verdict = "LayerNorm is partly engaged"
    text = f"{arm}: {verdict}; median r {span(values)} over {seeds(len(content))}"
    if ends is not None:
        each = "95% interval" if len(content) == 1 else "their 95% intervals reach from"
        text += f" ({each} {number(ends[0])} to {number(ends[1])})"
    text += ", where 0 is one gain for all tokens and 1 a true LayerNorm"
    groups = ("BOS", "1", "2-15", ">=16")
    labels = {"BOS": "BOS", "1": "position 1", "2-15": "positions 2-15", ">=16": "from 16 on"}
    by_position = [
        f"{labels[group]} {span(row.value for row in found)}"
        for group in groups
        if (found := engagement(rows, arm, group))
    ]
    return [f"{text}; {', '.join(by_position)}." if by_position else f"{text}."]


def _freeze(rows: list[Row], arm: str) -> list[str]:
    """What one gain for all tokens costs a trained model."""
    parts = []
    for quantity, name in FREEZES:
        found = measured(rows, "scale_freeze", quantity, arm)
        if not found:
            continue
        text = f"at {name} the loss changes by {_signed_span(found)} nats"
        ends = envelope(found)
        if ends is None:
            parts.append(f"{text} (no interval)")
            continue
        if max(-ends[0], ends[1]) < NO_COST:
            judged = f"within {NO_COST} nats, so nothing at inference"
        elif ends[0] > 0:
            judged = "a cost"
        elif ends[1] < 0:
            judged = "an improvement"
        else:
            judged = "not settled"
        each = "95% interval" if len(found) == 1 else "the 95% intervals of the runs reach from"
        parts.append(f"{text} ({judged}; {each} {signed(ends[0])} to {signed(ends[1])})")
    if not parts:
        return []
    return [f"Giving all tokens of the trained {arm} one gain: {'; '.join(parts)}."]


def _signed_span(rows: Sequence[Row]) -> str:
    values = [row.value for row in rows if row.value is not None]
    low, high = signed(min(values)), signed(max(values))
    return low if low == high else f"{low} to {high}"
