"""Sentences on the meaning of a probe's result. They claim no more than the intervals support.

A sentence begins with the probe's own answer to its question, if all seeds' intervals lie in the range of numbers
that the answer is for. The number and its interval follow as evidence. A study of an earlier version has no
answers; its sentences give the number, and its side of 0 or of a control's threshold.

The intervals are for these trained models on other documents, so each sentence is about these models.
Claims about a variant need the paired differences.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from soluscope.report.findings import (
    NO_COST,
    envelope,
    number,
    number_key,
    seeds,
    side,
    span,
    streams,
)
from soluscope.results import Direction, Gate, Measurement, ProbeWords, Quantity, Untrained

NEGLIGIBLE = {"nats": NO_COST, "correlation": 0.01, "difference": 0.01}
"""Thresholds below which a signed number counts as 0, by a word that its unit contains.

Source: protocol.md section 6, "Gate rule"."""


def sentences(
    words: ProbeWords,
    rows: Sequence[Measurement],
    arms: Sequence[str],
    before: Sequence[Untrained] = (),
) -> list[str]:
    """Return a sentence for each arm and stream that has numbers.

    The sentences are about the probe's tested quantity. If it has no rows, they are about the first quantity
    for which smearing predicts a direction. They cover natural text, or all streams if there is no
    number on natural text.

    Args:
        words: description of the probe.
        rows: measurements of the probe.
        arms: arms with a per-token norm, their static twins, and pretrained models.
        before: the probe's numbers before training. Without them no sentence names the side that smearing
            predicts.
    """
    for name in _main_names(words):
        selected = _main(rows, name, words.quantities[name])
        each = (
            [row for row in selected if row.arm == arm and row.stream == stream]
            for arm in arms
            for stream in streams(selected)
        )
        if result := [_sentence(words, of_arm, before) for of_arm in each if of_arm]:
            return result
    return []


def main(words: ProbeWords, rows: Sequence[Measurement]) -> list[Measurement]:
    """Return the rows of a probe's main number, by arm and stream; empty if it has no rows."""
    found = (_main(rows, name, words.quantities[name]) for name in _main_names(words))
    return next((selected for selected in found if selected), [])


def _main_names(words: ProbeWords) -> list[str]:
    """Return the tested quantity, then the quantities for which smearing predicts a direction."""
    known = words.quantities
    leaning = [name for name, q in known.items() if q.more_smeared_when != "neither"]
    return [words.tested] * (words.tested in known) + leaning


def _main(rows: Iterable[Measurement], name: str, quantity: Quantity) -> list[Measurement]:
    """Return a quantity's unsplit rows with its first statistic, on natural text if there are such rows."""
    selected = [
        row
        for row in rows
        if row.quantity == name and row.statistic in (*quantity.statistics[:1], "")
        if row.x is None and row.value is not None and (row.group, row.positions) == ("", "not BOS")
    ]
    return [row for row in selected if row.stream == "natural"] or selected


def _sentence(words: ProbeWords, rows: Sequence[Measurement], before: Sequence[Untrained]) -> str:
    first = rows[0]
    bounds = envelope(rows)
    change = _change(words, rows, before)
    if words.answers and first.quantity == words.tested:
        return f"{first.arm}: {_answer(words, bounds)} {_evidence(rows, bounds)}{change}."
    name = f"{first.statistic} of {first.quantity}" if first.statistic else first.quantity
    text = f"{first.arm}, {first.stream}: {name} is {_estimate(rows, bounds)}"
    if bounds is not None and (judged := _judged(words, first, bounds)):
        text += f": {judged}"
    return f"{text}{change}."


def _answer(words: ProbeWords, bounds: tuple[float, float] | None) -> str:
    """Return the answer that holds for the whole interval, or "Not settled" with the ranges that it allows."""
    if bounds is None:
        return "Not settled: there is no interval."
    for answer in words.answers:
        if answer.holds(*bounds):
            return answer.text
    allowed = [answer.label for answer in words.answers if answer.overlaps(*bounds)]
    if not 0 < len(allowed) < len(words.answers):
        return "Not settled: the interval leaves every answer open."
    return f"Not settled: the number may be {' or '.join(allowed)}."


def _evidence(rows: Sequence[Measurement], bounds: tuple[float, float] | None) -> str:
    """Return the main number on its text, with the intervals of its seeds, as a sentence without a full stop."""
    first = rows[0]
    text = "natural text" if first.stream == "natural" else f'the text "{first.stream}"'
    name = (
        f'The {first.statistic} of "{first.quantity}"' if first.statistic else f'"{first.quantity}"'
    )
    return f"{name} on {text} is {_estimate(rows, bounds)}"


def _estimate(rows: Sequence[Measurement], bounds: tuple[float, float] | None) -> str:
    """Return the seeds' values and the bounds of their intervals."""
    text = f"{span(row.value for row in rows)} {rows[0].unit}"
    if bounds is None:
        return f"{text} over {seeds(len(rows))}, without an interval"
    shown = {number(value or 0.0) for value in (*bounds, *(row.value for row in rows))}
    if len(shown) == 1:
        return f"{text} in each of {seeds(len(rows))}" if len(rows) > 1 else text
    each = "95% interval"
    if len(rows) > 1:
        each = f"the 95% intervals of {seeds(len(rows))} reach from"
    return f"{text} ({each} {number(bounds[0])} to {number(bounds[1])})"


def _change(words: ProbeWords, rows: Sequence[Measurement], before: Sequence[Untrained]) -> str:
    """Return the change by training and its direction, as a clause; empty if a seed has no number before it.

    Without an interval the clause gives the numbers before training alone.
    """
    known = {number_key(each): each for each in before}
    twins = [known.get(number_key(row)) for row in rows]
    found = [replace(each, value=each.difference) for each in twins if each is not None]
    bounds = envelope(found)
    if len(found) < len(rows):
        return ""
    untrained = span(each.value for each in twins if each is not None)
    if bounds is None or envelope(rows) is None:
        return f"; untrained {untrained}"
    text = (
        f"; untrained {untrained}, a change of {span(each.value for each in found)} ({number(bounds[0])} to "
        f"{number(bounds[1])})"
    )
    margins = [margin for word, margin in NEGLIGIBLE.items() if word in rows[0].unit]
    quantity = words.quantities[rows[0].quantity]
    if not margins or quantity.more_smeared_when == "neither":
        return text
    return f"{text}: {_sign(bounds, margins[0], quantity.more_smeared_when)}"


def _judged(words: ProbeWords, row: Measurement, bounds: tuple[float, float]) -> str:
    """Return the conclusion that an interval supports, from the controls' requirements and from its sign.

    The text is empty if the interval supports no conclusion.
    """
    low, high = bounds
    gates = [g for g in words.gates if _is_about(g, row)]
    for gate in gates:
        if gate.within is not None and max(gate.around - low, high - gate.around) < gate.within:
            return f"within {gate.within:g} of {gate.around:g}, as on a control without an effect"
    margins = [margin for word, margin in NEGLIGIBLE.items() if word in row.unit]
    if margins:
        return _sign(bounds, margins[0])
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


def _sign(bounds: tuple[float, float], margin: float, predicted_side: Direction = "neither") -> str:
    low, high = bounds
    where = side(bounds, margin)
    if where == "zero":
        return f"closer to 0 than {margin:g}, which counts as 0"
    if where == "open" and low <= 0 <= high:
        return "the sign is not settled"
    if where == "open":
        return f"{'above' if low > 0 else 'below'} 0, but possibly by less than {margin:g}, which would not matter"
    if predicted_side == "neither":
        return f"{where} 0"
    predicted = (where == "above") == (predicted_side == "higher")
    return f"{where} 0, the side that smearing {'predicts' if predicted else 'does not predict'}"
