"""What was found and how sure it is, in sentences made from the numbers.

No sentence claims more than its interval: a sign is stated as settled only where the interval for
new seeds and new documents leaves out 0, and two seeds are always called two seeds.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from soluscope.report import controls, pretrained
from soluscope.report.findings import (
    NO_COST,
    Choice,
    at_one_rate,
    by_kappa,
    choices,
    comparisons,
    engagement,
    envelope,
    for_these_models,
    measured,
    number,
    per_token_by_kappa,
    remarks,
    runs_of,
    seeds,
    seeds_of,
    settings,
    signed,
    sizes,
    span,
    tuned,
)
from soluscope.results import (
    MARGIN,
    ChoicePoint,
    Comparison,
    Grid,
    Measurement,
    NoChoice,
    Number,
    OfRun,
    Record,
    Term,
    Verdict,
    of_kind,
)

N_NAMED = 12
"""Arms that are named one by one; of more, their variants are."""
FREEZES = (
    ("frozen at geometric mean", "the geometric mean"),
    ("frozen at best constant", "the best constant for the other documents"),
)


def headline(records: list[Record]) -> list[str]:
    """Plain sentences, the most important one first; shared by page and terminal."""
    models, trained = pretrained.arms(records), pretrained.trained(tuned(records))
    result = [*edges(records), *unchosen(records), *pretrained.sentences(records)]
    if controls.standing(records, "scale_freeze") == "passed":
        result += [sentence for arm in models for sentence in _freeze(records, arm)]
    if not models or any(isinstance(record, OfRun) for record in trained):
        result += _headline(trained)
    return [*result, *_not_summarised(records)]


def in_view(sentences: Sequence[str], n: int) -> list[str]:
    """The sentences, or the first `n` of many and how many more the report has."""
    if len(sentences) <= 1 + n:
        return list(sentences)
    return [*sentences[:n], f"{len(sentences) - n} more in the report"]


def edges(records: list[Record]) -> list[str]:
    """What may be better yet than what was chosen, and what does therefore not follow; or nothing.

    At a wrong rate no comparison holds; at a wrong gain those that need the best static arm do not.

    Source: science.md section 10.2 (c).
    """
    made = choices(records)
    rates, gains = ([c for c in made if c.chosen.setting == name] for name in ("lr", "gain"))
    sentences = []
    if at := _at_edges(rates):
        sentences.append(
            "No comparison here is to be believed yet: on the select split the best of what was tried lies at "
            f"the edge of its grid for {at}. Widen these grids."
        )
    two = _grouped((c.tried, c.chosen.arm) for c in rates if c.chosen.grid is Grid.TOO_FEW)
    if two:
        tried = "; ".join(f"{', '.join(arms)} ({grid})" for grid, arms in two.items())
        sentences.append(
            f"Fewer than three rates are no grid, and a better one may lie beyond: {tried}."
        )
    if at := _at_edges(gains):
        sentences.append(
            "The static arm may be better yet, so that static - LN and Phi_dyn are not settled: on the select "
            f"split the best gain lies at the edge of its grid for {at}. Widen these grids."
        )
    return sentences


def _at_edges(made: Sequence[Choice]) -> str:
    """The arms at an edge, those together that share it and their grid."""
    extreme = {Grid.LOWER_EDGE: "lowest", Grid.UPPER_EDGE: "highest"}
    by_edge = _grouped(
        (f"{at.setting} {at.x:.3g} is the {extreme[at.grid]} of {choice.tried}", at.arm)
        for choice in made
        if (at := choice.chosen).grid in extreme
    )
    return "; ".join(f"{', '.join(arms)} ({where})" for where, arms in by_edge.items())


def _grouped(pairs: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    result: dict[str, list[str]] = {}
    for key, value in pairs:
        result.setdefault(key, []).append(value)
    return result


def unchosen(records: list[Record]) -> list[str]:
    """Arms of which the best would be wanted, and cannot be known from their seeds; or nothing."""
    return [
        f"No choice was made between {', '.join(each.arms)}: "
        f"{'; '.join(part for part in (each.note, each.size) if part)}, and the best of them would be so by "
        "its seeds. Train them at the same seeds."
        for each in of_kind(records, NoChoice)
    ]


def one_rate(records: list[Record]) -> str:
    """Which arms were trained at one rate only, where the study compares settings; else empty."""
    arms = at_one_rate(records)
    if not arms:
        return ""
    if len(arms) > N_NAMED:
        variants = sorted({each.variant for each in records if each.arm in arms and each.variant})
        return f"Trained at one rate only: {len(arms)} arms of {', '.join(variants)}."
    return f"Trained at one rate only: {', '.join(arms)}."


def _headline(records: list[Record]) -> list[str]:
    sentences = [_basis(records)]
    several_kappas = any(by_kappa(of_one) for of_one in sizes(records).values())
    several_gains = any(point.setting == "gain" for point in of_kind(records, ChoicePoint))
    if (several_kappas or several_gains) and (untuned := one_rate(records)):
        sentences.append(untuned)
    arms = [arm for of_one in sizes(records).values() for arm in per_token_by_kappa(of_one)]
    gains = [gain for arm in arms for gain in comparisons(records, Term.GAIN, arm)]
    if not gains:
        sentences.insert(
            0,
            "No verdict on LayerNorm: that takes runs of both plain SoLU and an arm with a per-token norm "
            "that share a seed.",
        )
    for index, gain in enumerate(gains):
        sentences.insert(index, _verdict(records, gain))
    for gain in gains:
        sentences += [_gain(records, gain), *_phi_dyn(records, gain.arm)]
        sentences += [*_static(records, gain.arm), *_twins(records, gain.arm)]
    for arm in arms:
        for probe, summarise in SUMMARISED.items():
            if controls.standing(records, probe) == "passed":
                sentences += summarise(records, arm)
    return sentences


def _not_summarised(records: list[Record]) -> list[str]:
    """Why a probe's numbers are not in the headline, for those of which something would be said."""
    sentences = []
    for probe in SUMMARISED:
        standing = controls.standing(records, probe)
        if standing == "failed":
            sentences.append(not_citable(probe, controls.failures(records, probe)))
        elif standing == "not run" and any(
            each.probe == probe for each in of_kind(records, Measurement)
        ):
            sentences.append(
                f"{probe} has not been validated on the control models, so its results are not summarised."
            )
    return sentences


def not_citable(probe: str, wrong: Sequence[str]) -> str:
    """What to say in place of a probe's numbers where it failed its controls."""
    noun = "control" if len(wrong) == 1 else "controls"
    return f"{probe} failed its {noun} {', '.join(wrong)}: its numbers are not to be cited."


def _ends(row: Number) -> str:
    if row.low is None or row.high is None:
        return "no interval can be given"
    return f"95% interval {signed(row.low)} to {signed(row.high)}"


def _basis(records: list[Record]) -> str:
    runs = runs_of(records)
    arms = sorted({record.arm for record in records if record.arm})
    counts = sorted({seeds_of(records, arm) or _n_of_loss(records, arm) for arm in arms})
    each = " to ".join(dict.fromkeys([str(counts[0]), str(counts[-1])])) if counts else "0"
    noun = "seed" if each == "1" else "seeds"
    n_runs, n_arms = (
        f"{len(x)} {w}{'s'[: len(x) != 1]}" for x, w in ((runs, "run"), (arms, "arm"))
    )
    variants = sorted({record.variant for record in records if record.variant})
    named = arms if len(arms) <= N_NAMED else variants
    text = f"Compared here: {n_runs} of {n_arms} ({', '.join(named)}), {each} {noun} an arm"
    losses = [row for row in of_kind(records, Measurement) if row.probe == "loss"]
    documents = max((row.n_clusters for row in losses), default=0)
    tokens = max((row.n for row in losses), default=0)
    if documents:
        measured_on = f"{documents:,} documents" + (f" ({tokens:,} tokens)" if tokens else "")
        text += f"; losses are measured on {measured_on} kept out of training"
    text += "."
    if counts and counts[0] == 1:
        text += " One seed shows these trained models, not their variants."
    elif counts and counts[0] == 2:
        text += " Two seeds say little about a third."
    return text


def _n_of_loss(records: list[Record], arm: str) -> int:
    return max((row.n for row in comparisons(records, Term.LOSS, arm)), default=0)


def _verdict(records: list[Record], gain: Comparison) -> str:
    arm, n = gain.arm, seeds(gain.n)
    phi = next(iter(comparisons(records, Term.SHARE, arm)), None)
    if gain.low is None or gain.high is None:
        return (
            f"Not settled whether the norm of {arm} lowers the loss ({n}): no interval can be given for "
            "new seeds."
        )
    if gain.high < 0:
        return (
            f"Nothing for smearing to explain at this size ({arm}, {n}): plain SoLU has the lower "
            "loss."
        )
    if gain.low <= 0:
        return (
            f"Not settled whether the norm of {arm} lowers the loss ({n}): the interval for new "
            "seeds and documents has 0 in it, so there is no gain of which to ask what it needs."
        )
    lowers = f"The norm of {arm} lowers the loss ({n})"
    if phi is None:
        return (
            f"{lowers}. How much of that needs a per-token scale cannot be measured without a static "
            "arm."
        )
    if phi.value is None:
        return f"{lowers}, but by too little to ask what share takes a scale of each token's own."
    if phi.low is None or phi.high is None:
        return (
            f"{lowers}; no interval can be given for the share that takes a scale of each token's "
            "own."
        )
    static = next(iter(comparisons(records, Term.STATIC, arm)), None)
    # Both must say so: few seeds make the ratio's resampled interval a little too narrow.
    if phi.low > 0 and static is not None and (static.low or 0.0) > 0:
        if static.verdict is Verdict.EQUIVALENT:
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


def _gain(records: list[Record], gain: Comparison) -> str:
    value = gain.value or 0.0
    lower = "plain SoLU" if value < 0 else gain.arm
    other = gain.arm if value < 0 else "plain SoLU"
    text = f"Gain of LN: {lower} had a loss {abs(value):.4f} nats a token lower than {other}"
    fixed = for_these_models(records, gain)
    text += f" (gain {signed(value)}"
    if fixed is not None:
        text += f"; for these trained models on other documents, {_ends(fixed)}"
    text += f"). For new seeds and documents: {_ends(gain)}, from {seeds(gain.n)}"
    if gain.low is None or gain.high is None:
        return f"{text}, so nothing is known of other seeds."
    if gain.low <= 0 <= gain.high:
        return f"{text}, so the sign is not settled."
    return f"{text}, so the sign is settled at the 95% level."


def _phi_dyn(records: list[Record], arm: str) -> list[str]:
    """Phi_dyn, what it means and how it was made, or why there is none.

    The sentence after it, on the best static arm, says how that arm was chosen.
    """
    sentences = []
    for row in comparisons(records, Term.SHARE, arm):
        if row.value is None:
            sentences.append(f"Phi_dyn ({arm}) is {row.note}.")
            continue
        ends = "no interval"
        if row.low is not None and row.high is not None:
            ends = f"95% interval {row.low:.2f} to {row.high:.2f}"
        sentences.append(
            f"Phi_dyn ({arm}) is {row.value:.2f} ({ends}, {seeds(row.n)}), the share of "
            "the norm's gain that no static arm trained here reaches: 0 none of it, 1 all of it, below "
            f"0 static is better; {row.note}."
        )
    return sentences


def _static(records: list[Record], arm: str) -> list[str]:
    return [
        f"Best static arm minus {arm}: {signed(row.value or 0.0)} nats a token ({_ends(row)} for "
        f"new seeds and documents, {seeds(row.n)}); {remarks(row)}."
        for row in comparisons(records, Term.STATIC, arm)
    ]


def _twins(records: list[Record], arm: str) -> list[str]:
    """The trained arms that differ from `arm` only in having one gain for all tokens."""
    twin = settings(records)[arm].twin
    sentences = []
    for row in comparisons(records, Term.DIFFERENCE, against=arm):
        if row.variant != twin:
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


def _engagement(records: list[Record], arm: str) -> list[str]:
    """Is the norm active? Judged by the ends of the seeds' intervals, not by their middles."""
    content = engagement(records, arm, "not BOS")
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
        f"{labels[group]} {span(row.value for row in rows)}"
        for group in groups
        if (rows := engagement(records, arm, group))
    ]
    return [f"{text}; {', '.join(by_position)}." if by_position else f"{text}."]


def _freeze(records: list[Record], arm: str) -> list[str]:
    """What one gain for all tokens costs a trained model."""
    parts = []
    for quantity, name in FREEZES:
        rows = measured(records, "scale_freeze", quantity, arm)
        if not rows:
            continue
        text = f"at {name} the loss changes by {_signed_span(rows)} nats"
        ends = envelope(rows)
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
        each = "95% interval" if len(rows) == 1 else "the 95% intervals of the runs reach from"
        parts.append(f"{text} ({judged}; {each} {signed(ends[0])} to {signed(ends[1])})")
    if not parts:
        return []
    return [f"Giving all tokens of the trained {arm} one gain: {'; '.join(parts)}."]


def _signed_span(rows: Sequence[Number]) -> str:
    values = [row.value for row in rows if row.value is not None]
    low, high = signed(min(values)), signed(max(values))
    return low if low == high else f"{low} to {high}"


SUMMARISED = {"engagement": _engagement, "scale_freeze": _freeze}
"""Probes whose numbers the headline cites, and the sentences that it makes of them."""
