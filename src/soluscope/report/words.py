"""What was found and how sure it is, in sentences made from the numbers.

No sentence claims more than its interval: a sign is stated as settled only where the interval for
new seeds and new documents leaves out 0, and two seeds are always called two seeds.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from soluscope.report import controls, pretrained
from soluscope.report.findings import (
    NO_COST,
    NORMED,
    TWIN,
    Choice,
    arms_of,
    at_one_rate,
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
    models, trained = pretrained.arms(rows), pretrained.trained(tuned(rows))
    said = [*edges(rows), *unchosen(rows), *pretrained.sentences(rows)]
    if controls.gate(rows, "scale_freeze") == "passed":
        said += [sentence for arm in models for sentence in _freeze(rows, arm)]
    if not models or any(row.run for row in trained):
        said += _headline(trained)
    return [*said, *_gates(rows)]


def in_view(sentences: Sequence[str], n: int) -> list[str]:
    """The sentences, or the first `n` of many and how many more the report has."""
    if len(sentences) <= 1 + n:
        return list(sentences)
    return [*sentences[:n], f"{len(sentences) - n} more in the report"]


def edges(rows: list[Row]) -> list[str]:
    """What may be better yet than what was chosen, and what does therefore not follow; or nothing.

    At a wrong rate no comparison holds; at a wrong gain those that need the best static arm do not.

    Source: science.md section 10.2 (c).
    """
    made = choices(rows)
    sentences = []
    if at := _at_edges([one for one in made if one.setting == "lr"]):
        sentences.append(
            "No comparison here is to be believed yet: on the select split the best of what was tried lies at "
            f"the edge of its grid for {at}. Widen these grids."
        )
    two = [one for one in made if one.setting == "lr" and not one.is_grid]
    if two:
        tried = "; ".join(
            f"{', '.join(arms)} ({grid})"
            for grid, arms in _grouped((one.grid, one.chosen.arm) for one in two).items()
        )
        sentences.append(
            f"Fewer than three rates are no grid, and a better one may lie beyond: {tried}."
        )
    if at := _at_edges([one for one in made if one.setting == "gain"]):
        sentences.append(
            "The static arm may be better yet, so that static - LN and Phi_dyn are not settled: on the select "
            f"split the best gain lies at the edge of its grid for {at}. Widen these grids."
        )
    return sentences


def _at_edges(made: Sequence[Choice]) -> str:
    """The arms at an edge, those together that share it and their grid."""
    extreme = {"lower": "lowest", "upper": "highest"}
    found = _grouped(
        (
            f"{one.setting} {one.chosen.x:.3g} is the {extreme[one.edge]} of {one.grid}",
            one.chosen.arm,
        )
        for one in made
        if one.edge
    )
    return "; ".join(f"{', '.join(arms)} ({said})" for said, arms in found.items())


def _grouped(pairs: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for key, value in pairs:
        found.setdefault(key, []).append(value)
    return found


def unchosen(rows: list[Row]) -> list[str]:
    """Arms of which the best would be wanted, and cannot be told from their seeds; or nothing."""
    return [
        f"No choice was made between {row.group}: {row.note}, and the best of them would be so by its "
        "seeds. Train them at the same seeds."
        for row in rows
        if row.probe == "comparison" and row.quantity == "no choice"
    ]


def one_rate(rows: list[Row]) -> str:
    """Which arms were trained at one rate only, where the study compares settings; else empty."""
    arms = at_one_rate(rows)
    if not arms:
        return ""
    if len(arms) > N_NAMED:
        variants = sorted({row.variant for row in rows if row.arm in arms and row.variant})
        return f"Trained at one rate only: {len(arms)} arms of {', '.join(variants)}."
    return f"Trained at one rate only: {', '.join(arms)}."


def _headline(rows: list[Row]) -> list[str]:
    sentences = [_basis(rows)]
    several_kappas = any(by_kappa(mine) for mine in sizes(rows).values())
    several_gains = any(one.setting == "gain" for one in choices(rows))
    if (several_kappas or several_gains) and (untuned := one_rate(rows)):
        sentences.append(untuned)
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
    for arm in normed:
        for probe, say in said.items():
            sentences += say(rows, arm) if controls.gate(rows, probe) == "passed" else []
    return sentences


def _gates(rows: list[Row]) -> list[str]:
    """Why nothing is said of a probe's numbers, for those of which something would be."""
    sentences = []
    for probe in ("engagement", "scale_freeze"):
        gate = controls.gate(rows, probe)
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
    text = f"{arm}: {pretrained.verdict(ends)}; median r {span(values)} over {seeds(len(content))}"
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
