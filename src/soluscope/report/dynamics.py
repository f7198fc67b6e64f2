"""Curves of the runs' numbers during training, the gaps between arms, and their change once a LayerNorm un-pins.

Source: protocol.md section 7, P23.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from soluscope.report import figures
from soluscope.report.blocks import Block, Bullets, Paragraph, Table, plot
from soluscope.report.figures import Style, along
from soluscope.report.findings import (
    comparisons,
    estimate,
    for_these_models,
    number,
    of_size,
    seeds,
    sizes,
    span,
    titles,
)
from soluscope.results import (
    CROSSES,
    DYNAMICS,
    UNPINNED,
    Comparison,
    Figure,
    Measurement,
    Record,
    Term,
    Verdict,
    of_kind,
)

LEAD = (
    "Each run kept its weights at steps whose distances grow in proportion, and is measured at each of them on the "
    "same held-out tokens without BOS. One thin line per run; its band is the 95% interval for other documents. r "
    "and the gain are those of the median token."
)
GAPS = (
    "Loss of an arm minus loss of a reference arm with the same seed, on the same tokens; below 0 the arm is "
    "better. Thick bars: 95% for these models; thin bars: for new seeds too."
)
JUDGED = {
    Verdict.EQUIVALENT: "does not change by as much as .005 nats",
    Verdict.DIFFERENT: "changes by more than .005 nats",
    Verdict.INCONCLUSIVE: "may change; these seeds do not settle it",
}
"""Meaning of the verdict on the change of a gap."""


def blocks(records: Sequence[Record], look: Mapping[str, Style]) -> list[Block]:
    """Return the sentences on un-pinning, the curves, the gaps and their tables; empty without snapshots."""
    rows = [row for row in of_kind(records, Measurement) if row.probe == DYNAMICS]
    if not rows:
        return []
    found = sentences(records)
    result: list[Block] = [*([Bullets(found)] if found else []), Paragraph(LEAD)]
    for name in dict.fromkeys(row.quantity for row in rows if row.x is not None):
        later = [row for row in rows if row.x]  # a logarithmic axis has no 0
        statistic = next(row.statistic for row in rows if row.quantity == name)
        spec = Figure(
            name, (name,), kind="curve", statistic=statistic, x_title="tokens seen (log)",
            log_x=True, log_y=name not in ("r", "log gain"),
        )  # fmt: skip
        result += plot(figures.draw(later, spec, look), f"{statistic} of {name}")
    result += _gaps(records, look)
    return [*result, *_before_training(rows), *_changes(records)]


def sentences(records: Sequence[Record]) -> list[str]:
    """Return a sentence on each arm with an r: when it un-pins, and whether the gap to the static arm follows."""
    crossings: dict[str, list[Measurement]] = {}
    for row in of_kind(records, Measurement):
        if (row.probe, row.quantity) == (DYNAMICS, CROSSES):
            crossings.setdefault(row.arm, []).append(row)
    return [_crossing(arm, rows) + _followed(records, arm) for arm, rows in crossings.items()]


def _crossing(arm: str, rows: Sequence[Measurement]) -> str:
    known = [row for row in rows if row.value is not None]
    if not known:
        return f"{arm} ({seeds(len(rows))}): {rows[0].note}."
    return (
        f"{arm} is no longer pinned (median r above {UNPINNED}) after {span(row.value for row in known)} tokens of "
        f"training, at {len(known)} of {seeds(len(rows))}."
    )


def _followed(records: Sequence[Record], arm: str) -> str:
    parts = [
        f" Its gap to {row.against} {JUDGED[row.verdict]} {row.group} ({estimate(row, 4)} nats, 95% for new seeds)."
        for row in comparisons(records, Term.SINCE, arm)
        if row.verdict in JUDGED
    ]
    return "".join(parts)


def _gaps(records: Sequence[Record], look: Mapping[str, Style]) -> list[Block]:
    """Draw the gaps along training, one panel per reference."""
    result: list[Block] = []
    for size, of_one in sizes(records).items():
        panels: dict[str, list[figures.Point]] = {}
        for row in of_kind(of_one, Comparison):
            if row.term is Term.GAP and row.x:
                point = figures.Point(row.x, row, row.arm)
                panels.setdefault(f"minus {row.against}", []).append(point)
        drawn = along(panels, "tokens seen", look, titles(of_one))
        result += plot(drawn, of_size("Gap of the loss during training", size), GAPS)
    return result


def _before_training(rows: Sequence[Measurement]) -> list[Block]:
    """Return a table of the numbers before the first step and at the end, one line per run."""
    names = list(dict.fromkeys(row.quantity for row in rows if row.x is not None))
    by_run: dict[str, dict[str, dict[float, float | None]]] = {}
    for row in rows:
        if row.x is not None:
            by_run.setdefault(row.run, {}).setdefault(row.quantity, {})[row.x] = row.value
    lines = [
        [run, *(_ends(of_run[name]) if name in of_run else "" for name in names)]
        for run, of_run in by_run.items()
    ]
    return [Paragraph("At the first and the last of these steps:"), Table(["run", *names], lines)]


def _ends(curve: Mapping[float, float | None]) -> str:
    return f"{number(curve[min(curve)])} to {number(curve[max(curve)])}"


def _changes(records: Sequence[Record]) -> list[Block]:
    """Return the table of the changes of the gap before and after un-pinning."""
    lines = []
    for row in comparisons(records, Term.SINCE):
        fixed = for_these_models(records, row)
        numbers = [estimate(row, 4), estimate(fixed, 4) if fixed else ""]
        lines.append(
            [
                f"{row.arm} minus {row.against}",
                row.group,
                *numbers,
                str(row.n),
                str(row.verdict),
                row.note,
            ]
        )
    heads = [
        "", "stretch", "change of the gap, nats [95%, new seeds and documents]", "[95%, these models]",
        "seeds", "against .005 nats", "note",
    ]  # fmt: skip
    return [Table(heads, lines)] if lines else []
