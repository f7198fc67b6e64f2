"""Sentences and a table about pretrained models, which others have trained.

A pretrained model is not compared with other models: it has its own vocabulary and tokens, and a single
model does not show the effect of removing LayerNorm. The report describes the norm's behaviour only.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from soluscope.report import controls
from soluscope.report.blocks import Block, Paragraph, Table
from soluscope.report.findings import (
    IDLE,
    Gain,
    engagement,
    estimate,
    gain_varies,
    measured,
    number,
)
from soluscope.results import LeftOut, Measurement, OfRun, Record, Records, of_kind

PROBE = "pretrained"
"""Probe name of the measurements with facts about a model that no probe measures."""
SAME = 1e-5
"""Relative difference up to which a gain computed in fp32 agrees with the formula."""

VERDICTS: dict[Gain, str] = {
    "varies": "the gain varies between tokens",
    "one constant": "the gain is one constant in effect, pinned by the norm's epsilon",
    "open": "it is not settled whether the gain varies between tokens",
}


def arms(records: Iterable[Record]) -> list[str]:
    """Return the names of the pretrained models."""
    return sorted({record.arm for record in records if _is_pretrained(record)})


def trained(records: Iterable[Record]) -> list[Record]:
    """Return all records except records of pretrained models."""
    if isinstance(records, Records):
        return records.once(trained, lambda: Records(trained([*records])))
    return [record for record in records if not _is_pretrained(record)]


def _is_pretrained(record: Record) -> bool:
    return isinstance(record, OfRun) and record.pretrained


def sentences(records: Sequence[Record]) -> list[str]:
    """Return, for each model, sentences on whether its norm is engaged or pinned, and on the text measured."""
    result: list[str] = []
    models = arms(records)
    for arm in models:
        of_arm = [record for record in records if record.arm == arm]
        if controls.standing(records, "engagement") == "passed":
            result += _engaged(of_arm, arm)
        result += [*_epsilon(of_arm, arm), *_basis(of_arm, arm), *_left_out(of_arm, arm)]
    if models:
        result.append(
            f"No loss of {' or '.join(models)} is compared with another model's loss, because their tokens and "
            "vocabularies differ. A single model shows the behaviour of its LayerNorm, but not the effect of "
            "removing it. That needs models that were trained to differ in the LayerNorm alone."
        )
    return result


def blocks(records: Sequence[Record]) -> list[Block]:
    """Return a table of facts about each model, one column per model; empty if there is no model."""
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
        name = f"{statistic} of {quantity}" if statistic != "mean" else quantity
        label = f"{name}, {unit}" if unit else name
        lines.append([label, *(of.get(arm, "") for arm in models)])
    lead = (
        "Each model's loss is measured on its own text and must not be compared with any other loss on this "
        "page."
    )
    return [Paragraph(lead), Table(["", *models], lines)]


def _places(row: Measurement) -> int | None:
    """Return 0 decimals for counts, which are whole numbers; None for other numbers."""
    return 0 if row.value is not None and row.value == int(row.value) else None


def _engaged(records: Sequence[Record], arm: str) -> list[str]:
    content = engagement(records, arm, "not BOS")
    if not content:
        return []
    if not _facts(records, "eps"):
        return [f"{arm} has no norm in its MLP, so its gain is 1 and r is 0 by construction."]
    text = f"{arm}: {VERDICTS[gain_varies(records, arm)]}; median r {estimate(content[0])}"
    shares = measured(records, "engagement", "r", arm, statistic=f"share above {IDLE}")
    if shares:
        text += f"; share of tokens after BOS with r above {IDLE}: {estimate(shares[0])}"
    if at_bos := engagement(records, arm, "BOS"):
        text += f"; r at BOS {number(at_bos[0].value)}"
    of_gain = [
        rows[0]
        for statistic in ("median", "q05", "q95")
        if (rows := measured(records, "engagement", "gain", arm, statistic=statistic))
    ]
    if len(of_gain) == 3:
        middle, low, high = (number(row.value) for row in of_gain)
        text += f"; median gain {middle} (5% to 95% of the tokens: {low} to {high})"
    return [f"{text}. r is 0 if all tokens have one gain, and 1 in a true LayerNorm."]


def _epsilon(records: Sequence[Record], arm: str) -> list[str]:
    """Return a sentence on whether the gain is 1 / sqrt(var + eps) with the epsilon of the model's norm."""
    names = ("eps", "1/g^2 - var", "|g^2 (var + eps) - 1|")
    values = [
        row.value for name in names for row in _facts(records, name)[:1] if row.value is not None
    ]
    if len(values) < len(names):
        return []
    eps, implied, off = values
    agrees = "as in a LayerNorm" if off <= SAME else "unlike in a LayerNorm"
    return [
        f"{arm}: 1/g^2 - var is {implied:.4e} at the median token (g: gain, var: variance over neurons), and the "
        f"epsilon of the model's norm is {eps:.4g}; g^2 (var + eps) is 1 to within {off:.1g} at every token, "
        f"{agrees}."
    ]


def _basis(records: Sequence[Record], arm: str) -> list[str]:
    source = next((row.note for row in _facts(records, "n_layers")), "")
    loss = next(iter(_facts(records, "loss")), None)
    if loss is None:
        return []
    return [f"{arm} is {source}, loaded as published; natural text is {loss.note}."]


def _left_out(records: Sequence[Record], arm: str) -> list[str]:
    """Return sentences on the probes that are not valid for the model, grouped by reason."""
    why: dict[str, list[str]] = {}
    for each in of_kind(records, LeftOut):
        if not each.stream:
            why.setdefault(each.note, []).append(each.probe)
    return [
        f"{arm}: probes left out: {', '.join(sorted(probes))} ({note})."
        for note, probes in why.items()
    ]


def _facts(records: Iterable[Record], quantity: str) -> list[Measurement]:
    return [
        row
        for row in of_kind(records, Measurement)
        if (row.probe, row.quantity) == (PROBE, quantity)
    ]
