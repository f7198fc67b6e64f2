"""The report's tables for papers and spreadsheets, as CSV and as LaTeX.

A number has the form of the report, `value [low, high]`. The CSV has three more columns for it, with the value and
the bounds exactly as the records have them.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from soluscope.report import controls, latex, meaning
from soluscope.report.figures import QUARTILE, term_name
from soluscope.report.findings import (
    by_stream,
    choices,
    comparisons,
    estimate,
    for_these_models,
    number,
    number_key,
    remarks,
    settings,
    tuned,
)
from soluscope.report.names import file_name
from soluscope.results import (
    NOT_PROBES,
    FalsePositives,
    GateResult,
    Measurement,
    Number,
    Record,
    Term,
    Untrained,
    of_kind,
)
from soluscope.terminal import shown

TERMS = (
    Term.DIFFERENCE, Term.BENEFIT, Term.STATIC, Term.SHARE, Term.STEP, Term.CONTRAST, Term.WHERE,
    Term.SINCE, Term.PROBE,
)  # fmt: skip
"""Terms of the comparisons, in the order of their lines."""


@dataclass(frozen=True)
class Estimate:
    """A number with its interval: the report's text, and the exact numbers."""

    text: str
    value: float | None
    low: float | None
    high: float | None


Cell = str | int | float | Estimate | None


@dataclass(frozen=True)
class Table:
    """A table of text and numbers."""

    name: str
    """Name of its files, without the ending."""
    caption: str
    heads: tuple[str, ...]
    estimates: frozenset[str]
    """Headings of the columns that hold an `Estimate`, or None."""
    lines: Sequence[Sequence[Cell]]
    n_tex: int | None = None
    """Number of lines at the top that the LaTeX has; None: all lines. The CSV has all lines."""

    def csv(self) -> str:
        """Return the table as CSV, with the exact value and bounds of each estimate."""
        heads: list[str] = []
        for head in self.heads:
            more = [f"{head}: {part}" for part in ("value", "low", "high")]
            heads += [head, *(more if head in self.estimates else ())]
        file = io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(heads)
        for line in self.lines:
            row: list[str] = []
            for head, cell in zip(self.heads, line, strict=True):
                row.append(_safe(_text(cell, exact=True)))
                if head in self.estimates:
                    each = cell if isinstance(cell, Estimate) else Estimate("", None, None, None)
                    row += [_exact(part) for part in (each.value, each.low, each.high)]
            writer.writerow(row)
        return file.getvalue()

    def tex(self) -> str:
        """Return the table as LaTeX; a column whose lines all have the same text is in the caption instead."""
        printed = self.lines[: self.n_tex]
        texts = [[_text(cell) for cell in line] for line in printed]
        fixed: dict[int, str] = {}
        for i, head in enumerate(self.heads):
            values = {line[i] for line in texts}
            if values == {""} or (
                len(values) == 1 and len(texts) > 1 and head not in self.estimates
            ):
                fixed[i] = values.pop()
        kept = [i for i in range(len(self.heads)) if i not in fixed]
        same = [f"{self.heads[i]}: {value}" for i, value in fixed.items() if value]
        caption = f"{self.caption}." + (f" In all lines: {'; '.join(same)}." if same else "")
        more = len(self.lines) - len(printed)
        caption += f" {self.name}.csv has {more:,} more lines." if more else ""
        is_number = [any(not isinstance(line[i], str) for line in printed) for i in kept]
        return latex.table(
            self.name,
            caption,
            [self.heads[i] for i in kept],
            [[line[i] for i in kept] for line in texts],
            is_number,
        )


def _text(cell: Cell, exact: bool = False) -> str:
    if isinstance(cell, Estimate):
        return cell.text
    if isinstance(cell, float) and cell.is_integer():
        return str(int(cell))
    if isinstance(cell, float):
        return _exact(cell) if exact else number(cell)
    return "" if cell is None else str(cell)


def _exact(value: float | None) -> str:
    return "" if value is None or not math.isfinite(value) else repr(float(value))


def _safe(text: str) -> str:
    """Return a cell on one line. A spreadsheet would run a text that starts like a formula."""
    one_line = shown("; ".join(part.strip() for part in text.splitlines() if part.strip()))
    return f"'{one_line}" if re.match(r"[=@\t]|[+-](?![\d.])", one_line) else one_line


def _estimate(row: Number | None, decimals: int | None = None) -> Estimate | None:
    if row is None:
        return None
    return Estimate(estimate(row, decimals), row.value, row.low, row.high)


def build(records: list[Record], identifiers: Mapping[str, str]) -> list[Table]:
    """Return all tables that have lines.

    Args:
        records: the study's records.
        identifiers: the identifiers of the arms, by their names in the records.
    """
    compared = tuned(records)
    tables = [
        _losses(compared, identifiers),
        _comparisons(compared),
        _settings(records, identifiers),
        _tuning(records, identifiers),
        _main(records, compared),
        *_probes(records, compared),
        _controls(records),
        _false_positives(records),
    ]
    return [table for table in tables if table.lines]


def _table(
    name: str,
    caption: str,
    heads: Sequence[str],
    estimates: Iterable[str],
    lines: Sequence[Sequence[Cell]],
) -> Table:
    return Table(name, caption, tuple(heads), frozenset(estimates), lines)


def _losses(records: Sequence[Record], identifiers: Mapping[str, str]) -> Table:
    means = comparisons(records, Term.LOSS)
    runs = [row for row in of_kind(records, Measurement) if row.probe == "loss"]
    lines: list[list[Cell]] = []
    for arm in dict.fromkeys(row.arm for row in [*means, *runs]):
        known = [arm, identifiers.get(arm, arm)]
        of_arm = sorted((row for row in runs if row.arm == arm), key=lambda row: row.seed or 0)
        for row in of_arm:
            seed = "" if row.seed is None else str(row.seed)
            lines.append(
                [*known, seed, _estimate(row, 4), "other documents", row.n_clusters, row.n]
            )
        for mean in (row for row in means if row.arm == arm):
            on = "new seeds, these documents"
            lines.append([*known, f"mean of {mean.n}", _estimate(mean, 4), on, None, None])
    heads = [
        "arm", "identifier", "seed", "loss, nats / token [95%]", "interval for", "documents", "tokens",
    ]  # fmt: skip
    caption = "Loss on the report split, in nats per token"
    return _table("losses", caption, heads, heads[3:4], lines)


def _comparisons(records: Sequence[Record]) -> Table:
    lines: list[list[Cell]] = []
    for term in TERMS:
        for row in comparisons(records, term):
            decimals = None if term is Term.PROBE else 2 if row.unit == "share" else 4
            is_probe = term is Term.PROBE
            name = f"{row.probe}: {row.quantity}" if is_probe else term_name(row)
            lines.append(
                [
                    row.arm,
                    "the same runs before training" if is_probe else row.against,
                    name,
                    row.unit,
                    _estimate(row, decimals),
                    _estimate(for_these_models(records, row), decimals),
                    row.n,
                    row.p,
                    row.p_adj,
                    "" if row.verdict is None else str(row.verdict),
                    remarks(row),
                ]
            )
    heads = [
        "arm", "against", "term", "unit", "estimate [95%, new seeds and documents]",
        "[95%, these models, other documents]", "seeds", "p", "p, Holm", "verdict", "note",
    ]  # fmt: skip
    return _table("comparisons", "Comparisons of arms", heads, heads[4:6], lines)


def _settings(records: Sequence[Record], identifiers: Mapping[str, str]) -> Table:
    known = settings(records)
    compared = settings(tuned(records))
    chosen = {each.chosen.arm for each in choices(records) if each.chosen.setting == "lr"}
    names = [*dict.fromkeys(name for each in known.values() for name in each.values)]
    lines: list[list[Cell]] = []
    for arm, each in known.items():
        rate = "chosen on the select split" if arm in chosen else each.rate
        lines.append(
            [
                arm,
                identifiers.get(arm, arm),
                each.role,
                each.n,
                "yes" if arm in compared else "no",
                *(each.values.get(name) for name in names),
                rate if "lr" in each.values else "",
            ]
        )
    heads = ["arm", "identifier", "role", "seeds", "compared", *names, "learning rate"]
    return _table("settings", "Settings of the arms", heads, (), lines)


def _tuning(records: Sequence[Record], identifiers: Mapping[str, str]) -> Table:
    lines: list[list[Cell]] = []
    for choice in choices(records):
        for point in (*choice.points, *choice.without):
            is_chosen = point.arm == choice.chosen.arm
            lines.append(
                [
                    point.arm,
                    identifiers.get(point.arm, point.arm),
                    point.setting,
                    point.x,
                    _estimate(point, 4),
                    point.n,
                    "chosen" if is_chosen else "" if point.eligible else "not eligible",
                    "" if point.grid is None else str(point.grid),
                    point.note,
                ]
            )
    heads = [
        "arm", "identifier", "setting", "tried", "loss on select, nats / token [95%, new seeds]", "seeds",
        "choice", "position", "note",
    ]  # fmt: skip
    return _table("tuning", "All tried settings", heads, heads[4:5], lines)


TRAINED = ("trained [95%, other documents]", "untrained", "trained minus untrained [95%]")
"""Headings of a probe's numbers."""


def _main(records: Sequence[Record], compared: Sequence[Record]) -> Table:
    """Return the main number of each probe: the number by which the page compares arms."""
    lines: list[list[Cell]] = []
    rows = [row for row in of_kind(compared, Measurement) if row.probe not in NOT_PROBES]
    before = _before(compared)
    for probe in controls.in_order(records, {row.probe for row in rows}):
        words = controls.words_of(records, probe)
        if words is None:
            continue
        found = meaning.main(words, [row for row in rows if row.probe == probe])
        name, standing = f"{words.section} {probe}".strip(), controls.standing(records, probe)
        lines += [
            [
                name,
                _quantity(row),
                row.stream,
                row.arm,
                _seed(row),
                *_numbers(row, before),
                standing,
            ]
            for row in _by_arm(found)
        ]
    heads = ["probe", "number", "text", "arm", "seed", *TRAINED, "controls"]
    return _table("probes", "Main number of each probe", heads, {TRAINED[0], TRAINED[2]}, lines)


def _probes(records: Sequence[Record], compared: Sequence[Record]) -> list[Table]:
    """Return a table of all numbers of each probe, points of curves left out.

    The LaTeX has the numbers on natural text, or else on the first stream, without BOS and without splits.
    """
    before = _before(compared)
    by_probe: dict[str, list[Measurement]] = {}
    for row in of_kind(compared, Measurement):
        if row.probe not in NOT_PROBES and row.x is None:
            by_probe.setdefault(row.probe, []).append(row)
    result: list[Table] = []
    for probe in controls.in_order(records, by_probe):
        words = controls.words_of(records, probe)
        order = {name: i for i, name in enumerate(words.quantities)} if words else {}
        rows = sorted(
            _by_arm(by_probe[probe]),
            key=lambda row: (
                by_stream(row), row.positions != "not BOS", _is_split(row), row.positions, row.group,
                order.get(row.quantity, len(order)), row.quantity, row.statistic,
            ),
        )  # fmt: skip
        first = by_stream(rows[0])
        n_main = sum(
            by_stream(row) == first and row.positions == "not BOS" and not _is_split(row)
            for row in rows
        )
        lines: list[list[Cell]] = [
            [
                row.quantity, row.statistic, row.unit, row.stream, row.positions, row.group, row.arm,
                _seed(row), *_numbers(row, before), row.note,
            ]
            for row in rows
        ]  # fmt: skip
        heads = [
            "quantity", "statistic", "unit", "text", "positions", "split", "arm", "seed", *TRAINED, "note",
        ]  # fmt: skip
        section = words.section if words else ""
        name = file_name(f"probe {section} {probe}", {table.name for table in result})
        caption = f"Numbers of the probe {probe}; controls {controls.standing(records, probe)}"
        made = _table(name, caption, heads, {TRAINED[0], TRAINED[2]}, lines)
        result.append(replace(made, n_tex=n_main or None))
    return result


def _is_split(row: Measurement) -> bool:
    return QUARTILE.fullmatch(row.group) is not None


def _by_arm(rows: Sequence[Measurement]) -> list[Measurement]:
    """Return rows by arm, in the order of the arms in the records, and by seed."""
    places = {arm: i for i, arm in enumerate(dict.fromkeys(row.arm for row in rows))}
    return sorted(rows, key=lambda row: (places[row.arm], row.seed or 0))


def _before(records: Sequence[Record]) -> dict[tuple[object, ...], Untrained]:
    return {number_key(each): each for each in of_kind(records, Untrained)}


def _numbers(row: Measurement, before: Mapping[tuple[object, ...], Untrained]) -> list[Cell]:
    """Return a number of a trained run, the same number before training, and their difference."""
    twin = before.get(number_key(row))
    change = None if twin is None else replace(twin, value=twin.difference)
    return [_estimate(row), None if twin is None else twin.value, _estimate(change)]


def _quantity(row: Measurement) -> str:
    name = f"{row.statistic} of {row.quantity}" if row.statistic else row.quantity
    return ", ".join(part for part in (name, row.unit) if part)


def _seed(row: Measurement) -> str:
    return "" if row.seed is None else str(row.seed)


def _controls(records: Sequence[Record]) -> Table:
    gates = of_kind(records, GateResult)
    places = {
        probe: i for i, probe in enumerate(controls.in_order(records, {g.probe for g in gates}))
    }
    lines: list[list[Cell]] = [
        [
            gate.probe, gate.section, gate.control, "C+" if gate.sign == "positive" else "C-",
            gate.measured, _estimate(gate), gate.unit, gate.asked, "pass" if gate.passed else "FAIL",
            gate.note,
        ]
        for gate in sorted(gates, key=lambda gate: (places[gate.probe], *controls.by_section(gate)))
    ]  # fmt: skip
    heads = [
        "probe", "section", "control", "kind", "number", "result [95%]", "unit", "required", "outcome", "note",
    ]  # fmt: skip
    caption = "Probes on control models, whose answers are known"
    return _table("controls", caption, heads, heads[5:6], lines)


def _false_positives(records: Sequence[Record]) -> Table:
    outcomes = {True: "pass", False: "FAIL", None: "not defined"}
    lines: list[list[Cell]] = [
        [
            each.probe,
            each.tested,
            each.source,
            _estimate(each),
            each.n,
            outcomes[each.passed],
            each.note,
        ]
        for each in of_kind(records, FalsePositives)
    ]
    heads = ["probe", "tested", "source", "rate [95%]", "draws", "outcome", "note"]
    caption = "Rates of findings where there is nothing to find"
    return _table("false-positives", caption, heads, heads[3:4], lines)
