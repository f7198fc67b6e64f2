"""Sentences of the answer, from typed verdicts: the tuned loss, the learning rate, and the tokens that differ.

No sentence claims more than its interval. Where ln_final gives a static arm a scale for each token, or where that
was not measured, no sentence calls a per-token scale needless.

Source: protocol.md section 4.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from soluscope.report.findings import (
    comparisons,
    estimate,
    listed,
    normed,
    number,
    rescales,
    seeds,
    settings,
)
from soluscope.results import (
    BOS_TOKENS,
    MARGIN,
    SIGNIFICANT,
    Comparison,
    Located,
    Part,
    Record,
    Term,
    Verdict,
    Where,
    of_kind,
)

R = TypeVar("R", bound=Record)
Judge = Callable[[Sequence[Record], str, str, str], str]
"""Function from records, an arm, its name in the sentence, and a design to a sentence, or to an empty text."""
ARM = "\0"
"""Placeholder for the name of an arm, in sentences that several arms may share."""
DESIGNS = {
    "alpha 1": "With alpha = 1 in every arm",
    "alpha matched": "With alpha matched to plain GELU's share of the stream",
}
SUPPLIED = {
    "yes": " But ln_final (the model's last LayerNorm) gives that static arm a scale for each token, so this does "
    "not show that one gain is enough.",
    "unknown": " It was not measured whether ln_final (the model's last LayerNorm) gives that static arm a scale "
    "for each token, so this does not show that one gain is enough.",
    "no": "",
}
"""Sentence after a static arm that does as well as LN, by `rescales`."""
PLACES = {
    Where.DIFFUSE: "The static arm loses more at tokens of high gain (the top quarter), and there at the diffuse "
    "codes, as H-smear predicts.",
    Where.HIGH_GAIN: "The static arm loses more at tokens of high gain (the top quarter), whatever their code, as "
    "H-dyn alone predicts.",
    Where.ALL_DIFFUSE: "The static arm loses more at tokens of high gain (the top quarter), whose codes are all "
    "equally diffuse, so H-smear and H-dyn are not distinguished.",
    Where.CODE_OPEN: "The static arm loses more at tokens of high gain (the top quarter); at which codes is not "
    "settled.",
    Where.NOT_HIGH_GAIN: "The static arm loses no more at tokens of high gain (the top quarter) than at others.",
    Where.OPEN: "At which tokens the arms differ is not settled.",
}  # fmt: skip
"""Sentence of each verdict on the tokens."""
NAMES = {
    Part.ONE_GAIN: "one gain for all tokens",
    Part.SCALE: "a scale for each token",
    Part.GRADIENT: "the gradient through that scale",
}


def first(records: Sequence[Record]) -> list[str]:
    """Return the two headlines of equal rank: the loss at each arm's best settings, and the learning rate.

    Arms with the same verdict share a sentence.
    """
    return [*_shared(records, claim), *(_robust(records, whole) for whole in _wholes(records))]


def static(records: Sequence[Record]) -> list[str]:
    """Return sentences on the best static arm beside each arm whose norm has no benefit."""
    return _shared(records, beside)


def details(records: Sequence[Record]) -> list[str]:
    """Return sentences on the parts of the robustness to the rate, and on the tokens."""
    parts = [_parts(records, whole) for whole in _wholes(records)]
    return [*filter(None, parts), *_shared(records, located)]


def at_fixed_scales(records: Sequence[Record]) -> list[str]:
    """Return the verdicts at each fixed scale of the MLP's output, one text for each."""
    found = {
        lead: [*_shared(records, tuned, design), *_shared(records, located, design)]
        for design, lead in DESIGNS.items()
    }
    return [f"{lead}: {' '.join(sentences)}" for lead, sentences in found.items() if sentences]


def _shared(records: Sequence[Record], verdict: Judge, design: str = "") -> list[str]:
    """Return the verdicts on the arms with a per-token norm; arms with the same verdict share a sentence."""
    alike: dict[str, list[str]] = {}
    for arm in normed(records):
        if text := verdict(records, arm, ARM, design):
            alike.setdefault(text, []).append(arm)
    return [text.replace(ARM, " and ".join(arms)) for text, arms in alike.items()]


# --- the loss at each arm's best settings ------------------------------------------------------------


def tuned(records: Sequence[Record], arm: str, name: str, design: str = "") -> str:
    """Return the verdicts on an arm's norm and on the best static arm; the sentences call the arm `name`."""
    verdicts = (judge(records, arm, name, design) for judge in (claim, beside))
    return " ".join(text for text in verdicts if text)


def claim(records: Sequence[Record], arm: str, name: str, design: str = "") -> str:
    """Return the verdict on the benefit of an arm's norm; empty without one. The sentence calls the arm `name`."""
    benefit = _one(comparisons(records, Term.BENEFIT, arm, design=design))
    if benefit is None:
        return ""
    n, do = seeds(benefit.n), "does" if benefit.n == 1 else "do"
    if benefit.low is None or benefit.high is None:
        return (
            f"{n} {do} not settle whether LayerNorm lowers the loss ({name}): no interval can be given for new "
            "seeds."
        )
    if benefit.verdict is Verdict.EQUIVALENT:
        return (
            f"The norm of {name} changes the loss by less than {MARGIN} nats ({n}): it is equivalent to that of "
            "plain SoLU, so there is no benefit to explain."
        )
    if benefit.high < 0:
        return (
            f"The norm of {name} raises the loss ({n}): plain SoLU has the lower loss, so smearing has nothing to "
            "explain at this size."
        )
    if benefit.low <= 0:
        return (
            f"{n} {do} not settle whether LayerNorm lowers the loss ({name}): intervals for new seeds and "
            "documents contain 0."
        )
    static = _one(comparisons(records, Term.STATIC, arm, design=design))
    share = _one(comparisons(records, Term.SHARE, arm, design=design))
    return f"The norm of {name} lowers the loss ({n}){_needs(records, share, static)}"


def _needs(records: Sequence[Record], share: Comparison | None, static: Comparison | None) -> str:
    """Return the rest of the verdict on a norm that lowers the loss: how much needs a per-token scale."""
    if share is None or static is None:
        return ". How much of that needs a per-token scale cannot be measured without a static arm."
    if share.value is None:
        return ", but by too little to measure the share that needs a per-token scale."
    if share.low is None or share.high is None:
        return ". No interval can be given for the share that needs a per-token scale."
    shown = (static.low or 0.0) > 0 and (static.p_adj or 1.0) < SIGNIFICANT
    if share.low > 0 and shown:
        if static.verdict is Verdict.EQUIVALENT:
            return ". The best static arm trained here misses some of it, but too little to matter."
        return (
            f", and the static arms trained here do not reach all of this (corrected p = {static.p_adj:.2g}). That "
            "does not yet show that a scale for each token is needed: it also takes trained models that keep a "
            "cost when they are adapted to one gain (soluscope remove)."
        )
    if share.high < 0:
        supplied = rescales(records, static.against)
        if supplied == "no":
            return ", but a static gain lowers it more: no per-token scale is needed."
        return f", but a static gain lowers it more.{SUPPLIED[supplied]}"
    return ". It is not shown that the static arms miss any part of this."


def beside(records: Sequence[Record], arm: str, name: str, design: str = "") -> str:
    """Return a sentence on the best static arm where an arm's norm has no benefit; empty if nothing is settled."""
    benefit = _one(comparisons(records, Term.BENEFIT, arm, design=design))
    static = _one(comparisons(records, Term.STATIC, arm, design=design))
    if benefit is None or benefit.low is None or _is_shown(benefit):
        return ""
    if static is None or static.low is None or static.high is None:
        return ""
    if static.verdict is Verdict.EQUIVALENT:
        said = f"The best static arm is as good as {name}."
    elif static.high < 0:
        said = (
            f"The best static arm is better than {name}, by {estimate(_opposite(static), 4)} nats."
        )
    elif static.low > 0:
        return f"The best static arm is worse than {name}, by {estimate(static, 4)} nats."
    else:
        return ""
    return said + SUPPLIED[rescales(records, static.against)]


def _is_shown(row: Comparison) -> bool:
    """Return whether a benefit is shown, and is not too little to matter."""
    return row.verdict is not Verdict.EQUIVALENT and (row.low or 0.0) > 0


# --- the learning rate -------------------------------------------------------------------------------


def robust(records: Sequence[Record]) -> list[str]:
    """Return, for each chain's last arm, how much less it depends on the learning rate, and its parts."""
    return [
        f"{_robust(records, whole)} {_parts(records, whole)}".rstrip() for whole in _wholes(records)
    ]


def _wholes(records: Sequence[Record]) -> list[Comparison]:
    """Return how much less each chain's last arm depends on the learning rate than the chain's first arm."""
    whole = {
        row.arm: row for row in comparisons(records, Term.SENSITIVITY_PART) if row.part is Part.ALL
    }
    known = settings(records)
    inner = {
        (step.variant, known[arm].values.get("kappa"))
        for arm in whole
        for step in known[arm].chain[:-1]
    }
    ends = [
        arm for arm in whole if (known[arm].variant, known[arm].values.get("kappa")) not in inner
    ]
    return [whole[arm] for arm in ends]


def _robust(records: Sequence[Record], whole: Comparison) -> str:
    arm, plain = whole.arm, whole.against
    sensitivity = {row.arm: row for row in comparisons(records, Term.SENSITIVITY)}
    of_plain, of_arm = (sensitivity.get(name) for name in (plain, arm))
    rates = whole.note.split(";")[0]
    about = f"{arm} ({seeds(whole.n)}, {rates}, alpha 1)"
    losses = ""
    if of_plain is not None and of_arm is not None:
        losses = (
            f": averaged over these rates its loss lies {number(of_arm.value, 4)} nats above that at its best "
            f"rate, and that of {plain} {number(of_plain.value, 4)}"
        )
    if whole.low is None or whole.high is None:
        return (
            "It is not known for new seeds how LayerNorm changes the range of good learning rates in "
            f"{about}{losses}."
        )
    if whole.verdict is Verdict.EQUIVALENT:
        return f"LayerNorm leaves the range of good learning rates as it is in {about}{losses}."
    if whole.low > 0:
        saved = f", {estimate(whole, 4)} less"
        return f"LayerNorm widens the range of good learning rates in {about}{losses}{saved}."
    if whole.high < 0:
        more = f", {estimate(_opposite(whole), 4)} less than in {arm}"
        return f"LayerNorm narrows the range of good learning rates in {about}{losses}{more}."
    return f"It is not settled whether LayerNorm widens the range of good learning rates in {about}{losses}."


def _parts(records: Sequence[Record], whole: Comparison) -> str:
    """Return sentences on the parts of an arm's robustness; empty unless it is shown."""
    if not _is_shown(whole):
        return ""
    arm = whole.arm
    parts = {row.part: row for row in comparisons(records, Term.SENSITIVITY_PART, arm)}
    if Part.ONE_GAIN not in parts:
        return "How much of the wider range one gain for all tokens brings cannot be measured without a static arm."
    shown = [
        f"{NAMES[part]} brings {estimate(row, 4)} ({_judged(row)})"
        for part in NAMES
        if (row := parts.get(part)) is not None
    ]
    text = f"Of the wider range, {listed(shown) if len(shown) < 2 else '; '.join(shown)}."
    text += _skipped(parts)
    static = parts[Part.SCALE].against
    supplied = {
        "no": "",
        "yes": f" ln_final gives {static} a scale for each token, so the part of one gain may contain it.",
        "unknown": f" It was not measured whether ln_final gives {static} a scale for each token at these rates.",
    }
    return text + supplied[rescales(records, static)]


def _skipped(parts: Mapping[Part | None, Comparison]) -> str:
    """Return a sentence if the scale and its gradient were not separated, because the study lacks an arm."""
    scale = parts[Part.SCALE]
    skips = Part.GRADIENT not in parts and ";" in scale.adds
    return f" The part of the scale contains: {scale.adds}." if skips else ""


def _judged(row: Comparison) -> str:
    """Return what the interval of a part settles."""
    if row.low is None or row.high is None:
        return "no interval"
    if row.verdict is Verdict.EQUIVALENT:
        return "too little to matter"
    if row.low > 0:
        return "shown"
    return "it takes away" if row.high < 0 else "not settled"


# --- the tokens --------------------------------------------------------------------------------------


def located(records: Sequence[Record], arm: str, name: str, design: str = "") -> str:
    """Return where the best static arm loses more than an arm, and at BOS; empty without losses by token."""
    each = _one(
        found for found in of_kind(records, Located) if (found.arm, found.design) == (arm, design)
    )
    if each is None:
        return ""
    text = f"By token, {name} against {each.against} ({seeds(each.n)}): {PLACES[each.where]}"
    bos = _one(
        row
        for row in comparisons(records, Term.WHERE, arm, design=design)
        if row.group == BOS_TOKENS
    )
    text += "" if bos is None else _at_bos(bos)
    supplied = SUPPLIED[rescales(records, each.against)]
    if each.where is Where.NOT_HIGH_GAIN and supplied not in beside(records, arm, name, design):
        text += supplied
    return text


def _at_bos(row: Comparison) -> str:
    if row.low is None or row.high is None:
        return ""
    if row.verdict is Verdict.EQUIVALENT:
        return " At BOS the two are equivalent."
    if row.low > 0:
        return f" At BOS it loses {estimate(row, 4)} nats more."
    if row.high < 0:
        return f" At BOS it loses {estimate(_opposite(row), 4)} nats less."
    return " At BOS the difference is not settled."


def _opposite(row: Comparison) -> Comparison:
    """Return the same difference with its arms exchanged."""
    value, low, high = (None if each is None else -each for each in (row.value, row.high, row.low))
    return replace(row, value=value, low=low, high=high)


def _one(rows: Iterable[R]) -> R | None:
    return next(iter(rows), None)
