"""What was found in models that others have trained: sentences and a table about each.

A pretrained model is compared with none: its tokens and its vocabulary are its own, and one model does
not tell what would be without LayerNorm. What is said is what it does.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from soluscope.report import controls
from soluscope.report.blocks import Block, Paragraph, Table
from soluscope.report.findings import (
    ENGAGED,
    IDLE,
    engagement,
    envelope,
    estimate,
    measured,
    number,
)
from soluscope.results import LeftOut, Measurement, OfRun, Record, of_kind

PROBE = "pretrained"
"""Of the measurements that hold what is known of a model and no probe measures."""
SAME = 1e-5
"""Relative difference up to which a gain that was computed in fp32 is what the formula gives."""


def arms(records: Iterable[Record]) -> list[str]:
    """Return the names of the pretrained models."""
    return sorted({record.arm for record in records if _is_pretrained(record)})


def trained(records: Iterable[Record]) -> list[Record]:
    """Return all records but those of pretrained models."""
    return [record for record in records if not _is_pretrained(record)]


def _is_pretrained(record: Record) -> bool:
    return isinstance(record, OfRun) and record.pretrained


def sentences(records: Sequence[Record]) -> list[str]:
    """For each model whether its norm is engaged or pinned, and by what; then what it was measured on."""
    result: list[str] = []
    models = arms(records)
    for arm in models:
        of_arm = [record for record in records if record.arm == arm]
        if controls.standing(records, "engagement") == "passed":
            result += _engaged(of_arm, arm)
        result += [*_epsilon(of_arm, arm), *_basis(of_arm, arm), *_left_out(of_arm, arm)]
    if models:
        result.append(
            f"No loss of {' or '.join(models)} is compared with another model's: their tokens and "
            "vocabularies are not the same. And a model by itself shows what its LayerNorm does, not what "
            "would be without it: that takes models trained to differ in it alone."
        )
    return result


def verdict(ends: tuple[float, float] | None) -> str:
    """Whether a norm is active, by the ends of the intervals of r and not by their middles."""
    if ends is None:
        return "how far the norm is engaged has no interval"
    if ends[0] > ENGAGED:
        return "the norm is engaged at the typical token"
    if ends[1] < IDLE:
        return "the norm is close to one static gain at the typical token, pinned by its epsilon"
    return "the norm is partly engaged"


def blocks(records: Sequence[Record]) -> list[Block]:
    """What is known of each model, one column a model; nothing where there is none."""
    models = arms(records)
    facts = [row for row in of_kind(records, Measurement) if row.probe == PROBE]
    if not facts:
        return []
    names = dict.fromkeys((row.quantity, row.statistic, row.unit) for row in facts)
    lines = []
    for quantity, statistic, unit in names:
        of = {
            row.arm: estimate(row) if row.low is not None else number(row.value, _places(row))
            for row in facts
            if (row.quantity, row.statistic) == (quantity, statistic)
        }
        what = f"{statistic} of {quantity}" if statistic != "mean" else quantity
        label = f"{what}, {unit}" if unit else what
        lines.append([label, *(of.get(arm, "") for arm in models)])
    lead = "Its loss is on a text of its own, and is to be compared with nothing else on this page."
    return [Paragraph(lead), Table(["", *models], lines)]


def _places(row: Measurement) -> int | None:
    """Counts are shown whole."""
    return 0 if row.value is not None and row.value == int(row.value) else None


def _engaged(records: Sequence[Record], arm: str) -> list[str]:
    content = engagement(records, arm, "not BOS")
    if not content:
        return []
    if not _facts(records, "eps"):
        return [f"{arm} has no norm in its MLP: its gain is 1 and r is 0, by construction."]
    text = f"{arm}: {verdict(envelope(content))}; median r {estimate(content[0])}"
    shares = measured(records, "engagement", "r", arm, statistic=f"share above {IDLE}")
    if shares:
        text += f", above {IDLE} at a share of {estimate(shares[0])} of the tokens after BOS"
    if at_bos := engagement(records, arm, "BOS"):
        text += f", {number(at_bos[0].value)} at BOS"
    of_gain = [
        rows[0]
        for statistic in ("median", "q05", "q95")
        if (rows := measured(records, "engagement", "gain", arm, statistic=statistic))
    ]
    if len(of_gain) == 3:
        middle, low, high = (number(row.value) for row in of_gain)
        text += f"; median gain {middle} (5% to 95% of the tokens: {low} to {high})"
    return [f"{text}. r is 0 where all tokens have one gain, and 1 in a true LayerNorm."]


def _epsilon(records: Sequence[Record], arm: str) -> list[str]:
    """Whether the gain is 1 / sqrt(var + eps) with the epsilon that the model says it has."""
    names = ("eps", "1/g^2 - var", "|g^2 (var + eps) - 1|")
    values = [
        row.value for name in names for row in _facts(records, name)[:1] if row.value is not None
    ]
    if len(values) < len(names):
        return []
    eps, implied, off = values
    is_it = "as LayerNorm has it" if off <= SAME else "which LayerNorm has not"
    return [
        f"{arm}: 1/g^2 - var is {implied:.4e} at the median token, and the epsilon that the model states is "
        f"{eps:.4g}; g^2 (var + eps) is 1 to within {off:.1g} at every token, {is_it}."
    ]


def _basis(records: Sequence[Record], arm: str) -> list[str]:
    source = next((row.note for row in _facts(records, "n_layers")), "")
    loss = next(iter(_facts(records, "loss")), None)
    if loss is None:
        return []
    return [f"{arm} is {source}, read as published; natural text is {loss.note}."]


def _left_out(records: Sequence[Record], arm: str) -> list[str]:
    """Probes that are not valid for the model, by their reasons."""
    why: dict[str, list[str]] = {}
    for each in of_kind(records, LeftOut):
        if not each.stream:
            why.setdefault(each.note, []).append(each.probe)
    return [
        f"{arm}, left out: {', '.join(sorted(probes))} ({note})." for note, probes in why.items()
    ]


def _facts(records: Iterable[Record], quantity: str) -> list[Measurement]:
    return [
        row
        for row in of_kind(records, Measurement)
        if (row.probe, row.quantity) == (PROBE, quantity)
    ]
