"""What a probe's result means, from its numbers: never more than the intervals say.

The intervals are those of trained models on other documents, so a sentence is about these models;
what holds of a variant is for the paired differences to say.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from soluscope.report.findings import NO_COST, by_stream, envelope, number, seeds, side, span
from soluscope.results import Gate, Measurement, ProbeWords, Quantity

NEGLIGIBLE = {"nats": NO_COST, "correlation": 0.01, "difference": 0.01}
"""By a word of the units that have a sign: closer to 0 than this is as good as 0.

Source: science.md section 7, "Control pass rule"."""


def sentences(words: ProbeWords, rows: Sequence[Measurement], arms: Sequence[str]) -> list[str]:
    """Return a sentence for each arm and stream; none where there is nothing to say.

    The sentences are about the quantity that the probe is tested by, or else the first that says which way
    smearing lies; on natural text, or on each of the streams where none is natural.

    Args:
        words: of the probe.
        rows: what it measured.
        arms: those with a per-token norm, their static twins, and pretrained models.
    """
    known = words.quantities
    leaning = [name for name, q in known.items() if q.more_smeared_when != "neither"]
    for name in [words.tested] * (words.tested in known) + leaning:
        selected = _main(rows, name, known[name])
        streams = sorted({by_stream(row) for row in selected})
        each = (
            [row for row in selected if row.arm == arm and by_stream(row) == stream]
            for arm in arms
            for stream in streams
        )
        if result := [_sentence(words, of_arm) for of_arm in each if of_arm]:
            return result
    return []


def _main(rows: Iterable[Measurement], name: str, quantity: Quantity) -> list[Measurement]:
    """The quantity's rows, unsplit, by its first statistic; on natural text where there is any."""
    selected = [
        row
        for row in rows
        if row.quantity == name and row.statistic in (*quantity.statistics[:1], "")
        if row.x is None and row.value is not None and (row.group, row.positions) == ("", "not BOS")
    ]
    return [row for row in selected if row.stream == "natural"] or selected


def _sentence(words: ProbeWords, rows: Sequence[Measurement]) -> str:
    first = rows[0]
    what = f"{first.statistic} of {first.quantity}" if first.statistic else first.quantity
    text = f"{first.arm}, {first.stream}: {what} is {span(r.value for r in rows)} {first.unit}"
    ends = envelope(rows)
    if ends is None:
        return f"{text} over {seeds(len(rows))}, without an interval."
    each = "95% interval" if len(rows) == 1 else f"the 95% intervals of {seeds(len(rows))} reach"
    text += f" ({each} {number(ends[0])} to {number(ends[1])})"
    judged = _judged(words, first, ends)
    return f"{text}: {judged}." if judged else f"{text}."


def _judged(words: ProbeWords, row: Measurement, ends: tuple[float, float]) -> str:
    """What an interval settles: by what the controls had to show, and by its sign; or nothing."""
    low, high = ends
    gates = [g for g in words.gates if _is_about(g, row)]
    for gate in gates:
        if gate.within is not None and max(gate.around - low, high - gate.around) < gate.within:
            return f"within {gate.within:g} of {gate.around:g}, as where there is nothing to find"
    margins = [margin for word, margin in NEGLIGIBLE.items() if word in row.unit]
    if margins:
        return _sign(ends, margins[0], words.quantities[row.quantity])
    for gate in gates:
        if gate.above is not None and low > gate.above:
            return f"above {gate.above:g}, as on the control {gate.control}"
        if gate.below is not None and high < gate.below:
            return f"below {gate.below:g}, as on the control {gate.control}"
    return ""


def _is_about(gate: Gate, row: Measurement) -> bool:
    key = (gate.quantity, gate.group, gate.x, gate.positions)
    return key == (row.quantity, "", None, row.positions) and row.statistic in (
        gate.statistic,
        "",
    )


def _sign(ends: tuple[float, float], margin: float, quantity: Quantity) -> str:
    low, high = ends
    where = side(ends, margin)
    if where == "zero":
        return f"closer to 0 than {margin:g}, as good as 0"
    if where == "open" and low <= 0 <= high:
        return "which side of 0 is not settled"
    if where == "open":
        return (
            f"{'above' if low > 0 else 'below'} 0, but not settled whether by as much as {margin:g}"
        )
    if quantity.more_smeared_when == "neither":
        return f"{where} 0"
    predicted = (where == "above") == (quantity.more_smeared_when == "higher")
    return f"{where} 0, the side that smearing {'predicts' if predicted else 'does not predict'}"
