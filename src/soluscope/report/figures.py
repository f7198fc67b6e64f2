"""Plotly figures of records: light, with one colour per arm, and with the interval of every number that has one.

Plotly interprets tags such as `<b>` in labels, so all text that comes from data is escaped.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import plotly.graph_objects as go
from plotly.colors import sample_colorscale

from soluscope.report.findings import by_stream, estimate, number, number_key, run_name
from soluscope.report.sheet import INK, N_COLUMNS, Key, Sheet, Trace
from soluscope.results import (
    AtDose,
    Bound,
    ChoicePoint,
    Comparison,
    Figure,
    Measurement,
    Multiplier,
    Number,
    Record,
    Setting,
    Term,
    Untrained,
    of_kind,
)
from soluscope.text import plural

# Okabe and Ito's colours, which colour-blind readers can distinguish; yellow is hard to see on white and omitted.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross")
DASHES = ("solid", "14px,2px", "10px,4px", "7px,4px", "5px,5px", "3px,4px", "2px,4px")
"""From few gaps to many: where lines coincide, the arms below show through the gaps of the arms drawn later."""
LONG_LABEL = 16
FEWEST_DOSES = 3
"""Number of doses of a variant from which its numbers are drawn against the dose."""
ARROW = 9
"""Size in pixels of an arrow where the frame cuts an interval."""
MANY_ARMS = 9
"""More arms than this are drawn closer together, with labels of one line."""
MOST_FLAT = 20
"""Largest factor between the spans of panels of curves that share an axis."""
INSET = 0.002
"""Distance of an arrow from the border of its frame, as a share of the frame. Plotly does not draw a mark outside
the frame, and on a page the mark's place is rounded."""
TITLE_HEIGHT = 40
"""Height of a figure's title in pixels; the report's page needs none, because it has headings."""
QUARTILE = re.compile(r".* Q[1-4]")
"""Pattern of groups that are quartiles of a split; any other group is a separate line or panel."""

N = TypeVar("N", bound=Number)
Panels = dict[Key, list[N]]
SCALE = "Viridis"
"""Colours of the lines of an ordered setting."""


@dataclass(frozen=True)
class Style:
    """An arm's colour, symbol and dash, the same in all figures of a page."""

    colour: str
    symbol: str
    dash: str


def styles(rows: Iterable[Record]) -> dict[str, Style]:
    """Assign a style to each arm, in the order of the records.

    Arms of one colour differ in the symbol and in the dash.
    """
    return styles_of([*dict.fromkeys(row.arm for row in rows if row.arm)])


def styles_of(lines: Sequence[str]) -> dict[str, Style]:
    """Assign a style to each line; lines of one colour differ in the symbol and in the dash."""
    n = len(COLOURS)
    return {
        line: Style(
            COLOURS[i % n], SYMBOLS[i // n % len(SYMBOLS)], DASHES[(i + i // n) % len(DASHES)]
        )
        for i, line in enumerate(lines)
    }


def ramp(lines: Sequence[str]) -> dict[str, Style]:
    """Assign a style to each line of an ordered setting, from light to dark."""
    shades = sample_colorscale(
        SCALE, [0.15 + 0.85 * i / max(1, len(lines) - 1) for i in range(len(lines))]
    )
    return {
        line: Style(shade, SYMBOLS[i % len(SYMBOLS)], "solid")
        for i, (line, shade) in enumerate(zip(lines, shades, strict=True))
    }


def draw(
    rows: Sequence[Record],
    spec: Figure,
    look: Mapping[str, Style] | None = None,
    before: Iterable[Untrained] = (),
) -> go.Figure:
    """Draw one figure of a probe.

    Args:
        rows: records of one probe; records that are not measurements are ignored.
        spec: specification of the figure.
        look: a style for each arm; by default derived from the arms in `rows`.
        before: the same numbers before training, drawn as grey rings in figures of dots.

    Returns:
        A figure that notebooks display; without traces if no row fits `spec`.
    """
    panels = _panels(rows, spec)
    title = html.escape(spec.title)
    if not panels:
        return go.Figure(layout={"template": "none", "title": f"{title}: no rows to draw"})
    look = look or styles(rows)
    curve = spec.kind == "curve"
    sheet = _curves(panels, spec, look) if curve else _dots(panels, look, spec.log_y, before)
    return sheet.figure(title)


def against_dose(
    rows: Sequence[Measurement], spec: Figure, look: Mapping[str, Style], doses: Doses
) -> go.Figure:
    """Draw the numbers of a figure against the dose, for variants that were trained at three doses or more.

    Args:
        rows: records of one probe.
        spec: specification of the figure, of kind `dots`.
        look: a style for each arm; a variant has the style of its first arm.
        doses: doses of the runs.

    Returns:
        A figure with one panel per quantity, group, stream and kind of dose, and one thin line per seed and
        variant; without traces if no variant has so many.
    """
    several = doses.several()
    panels: Panels[Measurement] = {}
    for key, panel_rows in _panels(rows, spec).items():
        for row in panel_rows:
            dose = doses.of.get(row.run)
            if row.variant in several and dose is not None:
                panels.setdefault((*key, dose.name), []).append(replace(row, x=dose.value))
    if not panels:
        return go.Figure()
    sheet = Sheet(panels, row_height=270, curves=True)
    named: set[str] = set()
    for index, (key, panel_rows) in enumerate(panels.items()):
        for variant, seed in sorted({(row.variant, row.seed or 0) for row in panel_rows}):
            line = [
                Point(row.x or 0.0, row, variant)
                for row in panel_rows
                if (row.variant, row.seed or 0) == (variant, seed)
            ]
            style = look[min(row.arm for row in panel_rows if row.variant == variant)]
            sheet.add(_joined(line, style, variant, named), index)
        sheet.x(index, title=f"{key[-1]} (log)", type="log")
        unit = html.escape(panel_rows[0].unit)
        sheet.y(index, title=unit)
        if spec.log_y and _positive(panel_rows):
            sheet.y(index, **_log_axis(panel_rows, 6))
        else:
            _mark_zero(sheet, panel_rows, index, upright=True)
    return sheet.figure()


@dataclass(frozen=True)
class Point:
    """A number at a setting, such as a learning rate."""

    x: float
    number: Number
    line: str
    """Name of the point's line."""
    ringed: bool = False
    """True if the point has a ring, which marks the chosen setting."""


def along(
    panels: Mapping[str, Sequence[Point]],
    x_title: str,
    look: Mapping[str, Style],
    names: Mapping[str, str],
    one_scale: bool = False,
    ranked: bool = False,
) -> go.Figure:
    """Draw numbers against a setting, such as a learning rate or kappa.

    Args:
        panels: points by title. Points with the interval for new seeds, and points of one run, are joined.
            Intervals for these models on other documents are thick bars.
        x_title: name of the setting; its axis is logarithmic, unless `ranked`.
        look: a style for each line.
        names: name of each line in the legend. Lines of one name have one entry, which shows and hides them all.
        one_scale: True if the panels share the range of their vertical axes.
        ranked: True if the values of the setting are equally far apart, because some are 0 or negative.

    Returns:
        A figure; without traces if there are no points.
    """
    filled = {title: list(points) for title, points in panels.items() if points}
    if not filled:
        return go.Figure()
    values = sorted({point.x for points in filled.values() for point in points})
    place = {x: i if ranked else x for i, x in enumerate(values)}
    filled = {
        title: [replace(point, x=place[point.x]) for point in points]
        for title, points in filled.items()
    }
    keys = [(title, "", "") for title in filled]
    sheet = Sheet(keys, row_height=270, curves=True, gap=112)  # labels are slanted
    named: set[str] = set()
    for index, points in enumerate(filled.values()):
        in_order = sorted({point.line for point in points}, key=list(names).index)
        for line in in_order:
            style = look[line]
            on_line = [point for point in points if point.line == line]
            fixed = [point for point in on_line if _of_these_models(point.number)]
            joined = [point for point in on_line if not _of_these_models(point.number)]
            if fixed:
                x, rows = [point.x for point in fixed], [point.number for point in fixed]
                bars = _intervals(rows, x, style, 5, marked=False, upright=True)
                sheet.add(bars | {"legendgroup": html.escape(names[line])}, index)
            sheet.add(_joined(joined, style, names[line], named), index)
            for point in joined:
                if point.ringed:
                    ring = _ring(point, style) | {"legendgroup": html.escape(names[line])}
                    sheet.add(ring, index)
        at = {point.x for point in points}
        tried = [x for x in values if place[x] in at]
        ticks = {
            "tickvals": [place[x] for x in tried], "tickangle": -40,
            "ticktext": [f"{x:,.0f}" if x >= 1000 else f"{x:.3g}" for x in tried],
        }  # fmt: skip
        title, kind = (x_title, "linear") if ranked else (f"{x_title} (log)", "log")
        sheet.x(index, title=title, type=kind, **ticks)
        rows = [point.number for point in points]
        shown = [point.number for each in filled.values() for point in each] if one_scale else rows
        frame = _frame(shown, with_zero=not _is_loss(rows[0]))  # losses lie far from 0
        sheet.y(index, title=html.escape(rows[0].unit), range=frame)
        colours = [look[point.line].colour for point in points]
        sheet.add(
            _arrows(rows, [point.x for point in points], frame, colours, upright=True),
            index,
        )
        _mark_zero(sheet, rows, index, upright=True)
    return sheet.figure()


def _of_these_models(row: Number) -> bool:
    return isinstance(row, Comparison) and row.cluster == "document"


def _is_loss(row: Number) -> bool:
    """Return whether a number is a loss or a number of a ladder, whose axis need not begin at 0."""
    if isinstance(row, AtDose):
        return row.since is None
    return isinstance(row, ChoicePoint) or (isinstance(row, Comparison) and row.term is Term.LOSS)


@dataclass(frozen=True)
class Pair:
    """Two numbers of one arm, drawn against each other."""

    x: Number
    y: Number
    line: str
    label: str
    """Text beside the point."""


def against_each_other(
    panels: Mapping[str, Sequence[Pair]], look: Mapping[str, Style]
) -> go.Figure:
    """Draw pairs of numbers, joined in their order, with the intervals of both; one panel for each title."""
    filled = {title: list(pairs) for title, pairs in panels.items() if pairs}
    if not filled:
        return go.Figure()
    sheet = Sheet([(title, "", "") for title in filled], row_height=300, curves=True)
    named: set[str] = set()
    for index, (title, pairs) in enumerate(filled.items()):
        for line in dict.fromkeys(pair.line for pair in pairs):
            of_line = [pair for pair in pairs if pair.line == line]
            style = look[line]
            points = [Point(pair.x.value or 0.0, pair.y, line) for pair in of_line]
            trace = _joined(points, style, line, named, in_order=True)
            ends = [(pair.x.high, pair.x.low, pair.x.value or 0.0) for pair in of_line]
            trace["error_x"] = trace["error_y"] | {
                "array": [_gap(high, value) for high, _, value in ends],
                "arrayminus": [-_gap(low, value) for _, low, value in ends],
            }
            trace["mode"] = "lines+markers+text"
            trace["customdata"] = [html.escape(pair.label) for pair in of_line]
            trace["texttemplate"], trace["textposition"] = "%{customdata}", "top right"
            sheet.add(trace, index)
        sheet.x(index, title=html.escape(title))
        sheet.y(index, title=html.escape(pairs[0].y.unit))
    return sheet.figure()


def bars(
    rows: Sequence[Multiplier], line_of: Mapping[str, str], look: Mapping[str, Style], base: float
) -> go.Figure:
    """Draw multipliers as bars from `base`, grouped by size, with one colour for each line.

    Args:
        rows: the multipliers.
        line_of: name of the line of each arm.
        look: a style for each line.
        base: value at which the bars begin.
    """
    known = [row for row in rows if row.value is not None]
    if not known:
        return go.Figure()
    sheet = Sheet([("times the baseline's size", "", "")], row_height=270, curves=True)
    for line in dict.fromkeys(line_of[row.arm] for row in known):
        of_line = sorted(
            (row for row in known if line_of[row.arm] == line), key=lambda row: row.n_weights
        )
        values = [row.value or 0.0 for row in of_line]
        trace = {
            "type": "bar", "x": [f"{row.n_weights:,}" for row in of_line], "base": base,
            "y": [value - base for value in values], "name": html.escape(line),
            "marker": {"color": look[line].colour},
            "error_y": {
                "type": "data", "symmetric": False, "color": INK, "thickness": 1.2, "width": 3,
                "array": [_gap(row.high, value) for row, value in zip(of_line, values, strict=True)],
                "arrayminus": [-_gap(row.low, value) for row, value in zip(of_line, values, strict=True)],
            },
            "text": [_BOUND_MARKS[row.bound] for row in of_line], "textposition": "outside",
            "hovertext": [html.escape(f"{row.arm}: {row.bound} {estimate(row)} times") for row in of_line],
            "hoverinfo": "text",
        }  # fmt: skip
        sheet.add(trace, 0)
    sheet.layout["barmode"] = "group"
    in_order = [f"{n:,}" for n in sorted({row.n_weights for row in known})]
    sheet.x(0, title="weights", type="category", categoryorder="array", categoryarray=in_order)
    sheet.y(0, title="times")
    sheet.mark(base, 0, upright=True)
    return sheet.figure()


_BOUND_MARKS = {Bound.NONE: "", Bound.AT_LEAST: "\u25b2", Bound.AT_MOST: "\u25bc"}
"""Signs of multipliers that are only bounds."""


@dataclass(frozen=True)
class Dose:
    """The setting that determines an arm's output scale."""

    name: str
    """`kappa` if the norm has an epsilon, else `gain`."""
    value: float


@dataclass(frozen=True)
class Doses:
    """The doses of runs and arms."""

    of: Mapping[str, Dose]
    """Dose by run."""
    arms: Mapping[str, tuple[str, Dose]]
    """Variant, and dose of the first seed, by arm."""

    def several(self) -> set[str]:
        """Return the variants that were trained at `FEWEST_DOSES` or more; two doses need no axis."""
        seen: dict[str, set[str]] = {}
        for variant, dose in self.arms.values():
            seen.setdefault(variant, set()).add(f"{dose.value:.3g}")
        return {variant for variant, values in seen.items() if len(values) >= FEWEST_DOSES}

    def caption(self) -> str:
        """Return a text with the dose of each arm whose name lacks it; a model without a norm has the gain 1.

        The text is empty if a variant has several doses, which are drawn instead.
        """
        each = [
            f"{arm}: {dose.name} {number(dose.value)}"
            for arm, (_, dose) in self.arms.items()
            if f"{dose.name} " not in arm and dose != Dose("gain", 1.0)
        ]
        if not each or self.several():
            return ""
        return f"Dose (kappa, or the gain of arms without an epsilon): {'; '.join(each)}."


def doses(rows: Sequence[Record]) -> Doses:
    """Return the doses: kappa = eps * d_mlp^2 of arms with an epsilon, the median gain of arms without.

    Arms with an entropy penalty have another dose (the tab *Dose and size* draws it), so they are left out.

    Source: protocol.md section 1.4 (kappa is the dose) and section 3 (gains of the static arms).
    """
    wanted = {"kappa": 0, "gain": 1}  # kappa first, if there is one; static arms have none
    penalised = {each.arm for each in of_kind(rows, Setting) if each.values.get("entropy_penalty")}
    selected = [
        row
        for row in of_kind(rows, Measurement)
        if row.arm not in penalised
        if row.probe == "engagement" and row.quantity in wanted and row.statistic == "median"
        if (row.stream, row.positions, row.group) == ("natural", "not BOS", "") and row.value
    ]
    selected.sort(key=lambda row: (wanted[row.quantity], row.arm, row.seed or 0))
    of: dict[str, Dose] = {}
    arms: dict[str, tuple[str, Dose]] = {}
    for row in selected:
        if row.value is not None and row.value > 0:  # the axis is logarithmic
            dose = of.setdefault(row.run, Dose(row.quantity, row.value))
            arms.setdefault(row.arm, (row.variant, dose))
    return Doses(of, dict(sorted(arms.items())))


def _panels(rows: Iterable[Record], spec: Figure) -> Panels[Measurement]:
    """Return the rows that `spec` selects, by quantity, group and stream."""
    wanted = [row for row in of_kind(rows, Measurement) if is_drawn(row, spec)]
    order = {quantity: i for i, quantity in enumerate(spec.quantities)}
    panels: Panels[Measurement] = {}
    wanted.sort(key=lambda r: (order[r.quantity], r.group, by_stream(r), r.seed or 0))
    for row in wanted:
        panels.setdefault((row.quantity, row.group, row.stream), []).append(row)
    return panels


def is_drawn(row: Measurement, spec: Figure) -> bool:
    """Return whether a figure shows this number."""
    return (
        row.quantity in spec.quantities
        and row.statistic in (spec.statistic, "")  # an estimate has no statistic
        and row.value is not None
        and (not spec.streams or row.stream in spec.streams)
        and (row.x is not None) == (spec.kind == "curve")
        and (spec.kind == "curve" or row.positions == spec.positions)
        and _in_group(row, spec)
    )


def _in_group(row: Measurement, spec: Figure) -> bool:
    if spec.group:
        return row.group == spec.group or row.group.startswith(f"{spec.group} Q")
    return not QUARTILE.fullmatch(row.group)


def _dots(
    panels: Panels[N],
    look: Mapping[str, Style],
    log: bool = False,
    before: Iterable[Untrained] = (),
) -> Sheet:
    """Draw one panel per quantity, group and stream, with the arms from top to bottom and one dot per number."""
    arms = _in_order(panels, look)
    untrained = {number_key(each): each for each in before}
    one_scale = _have_one_unit(panels)
    drawn = [row for rows in panels.values() for row in rows]
    sheet = Sheet(panels, row_height=20 + _arm_height(len(arms)) * len(arms), shared_x=one_scale)
    for index, rows in enumerate(panels.values()):
        for arm in arms:
            of_arm = [row for row in rows if row.arm == arm]
            heights = [arms.index(arm) + offset for offset in _spread(len(of_arm))]
            sheet.add(_rings_before(of_arm, heights, untrained), index)
            sheet.add(_intervals(of_arm, heights, look[arm]), index)
        sheet.y(index, **_arm_axis(arms, index))
        unit = html.escape(rows[0].unit)
        sheet.x(index, title=unit)
        on_axis = drawn if one_scale else rows
        if log and _positive(on_axis):
            sheet.x(index, **_log_axis(on_axis, 3))
        else:
            _mark_zero(sheet, rows, index)
    return sheet


def _in_order(panels: Panels[N], look: Mapping[str, Style]) -> list[str]:
    """Return the arms of the panels, in their order on the page."""
    drawn = {row.arm for rows in panels.values() for row in rows}
    return [arm for arm in look if arm in drawn]


def _curves(panels: Panels[Measurement], spec: Figure, look: Mapping[str, Style]) -> Sheet:
    """Draw one panel per quantity, group and stream, with one thin line per run and its interval as a band."""
    one_scale = _have_one_unit(panels) and (spec.log_y or spec.relative or _have_one_size(panels))
    drawn = [row for rows in panels.values() for row in rows]
    sheet = Sheet(panels, row_height=250, curves=True)
    named: set[str] = set()
    for index, rows in enumerate(panels.values()):
        lines: dict[tuple[str, int], list[Measurement]] = {}
        for row in sorted(rows, key=lambda row: row.x or 0.0):
            lines.setdefault((row.arm, row.seed or 0), []).append(row)
        in_order = sorted(lines, key=lambda run: ([*look].index(run[0]), run[1]))
        if spec.relative:
            lines = {run: _relative(line) for run, line in lines.items()}
        for arm, seed in in_order:  # bands first, so that none covers a line
            line = lines[arm, seed]
            if all(row.low is not None and row.high is not None for row in line):
                sheet.add(_band(line, look[arm], len(lines)), index)
        for arm, seed in in_order:
            line, style, label = lines[arm, seed], look[arm], html.escape(arm)
            trace = _scatter(
                x=[row.x for row in line],
                y=[None if spec.log_y and not row.value else row.value for row in line],
                mode="lines",
                line={"color": style.colour, "width": 1.5, "dash": style.dash},
                name=label,
                legendgroup=label,
                showlegend=arm not in named,
                hovertemplate=f"{label}, seed {seed}<br>%{{x}}: %{{y:.4g}}<extra></extra>",
            )
            named.add(arm)
            sheet.add(trace, index)
        sheet.x(index, title=html.escape(spec.x_title))
        if one_scale and index:
            sheet.y(index, matches="y")
        if spec.log_x and any(row.x for row in rows):
            sheet.x(index, **_log_scale([row.x for row in drawn if row.x], 5))
        unit = "relative to the last" if spec.relative else html.escape(rows[0].unit)
        on_axis = drawn if one_scale else rows
        if spec.log_y and _positive(on_axis, or_zero=True) and any(row.value for row in on_axis):
            sheet.y(index, **_log_axis(on_axis, 6))
            unit += "" if _positive(on_axis) else " (log; 0 not drawn)"
        if one_scale and index % N_COLUMNS:
            sheet.y(index, showticklabels=False)
        else:
            sheet.y(index, title=unit)
    return sheet


def _rings_before(
    rows: Sequence[Number],
    heights: Sequence[float],
    untrained: Mapping[tuple[object, ...], Untrained],
) -> Trace | None:
    """Draw the numbers before training as grey rings; return None without such numbers."""
    places = {
        height: untrained[key]
        for row, height in zip(rows, heights, strict=True)
        if isinstance(row, Measurement) and (key := number_key(row)) in untrained
    }
    if not places:
        return None
    return _scatter(
        x=[each.value for each in places.values()],
        y=list(places),
        mode="markers",
        marker={"symbol": "circle-open", "size": 10, "color": "#555555", "line": {"width": 1.5}},
        text=[
            html.escape(f"{run_name(each)}, untrained: {number(each.value)} {each.unit}")
            for each in places.values()
        ],
        hovertemplate="%{text}<extra></extra>",
        showlegend=False,
    )


def _positive(rows: Iterable[Number], or_zero: bool = False) -> bool:
    """Return whether all values are above 0, so that a logarithmic axis can show them; `or_zero` also allows 0."""
    known = [row.value for row in rows if row.value is not None]
    return all(value > 0 or (or_zero and value == 0) for value in known)


def _log_axis(rows: Iterable[Number], most: int) -> dict[str, object]:
    """Return a logarithmic axis whose ticks are round numbers, written in full.

    `most` is about the largest number of ticks. Values that span less than a factor of 10 have ticks at 1, 2 and 5
    times a power of 10, and at least two ticks.
    """
    return _log_scale([end for row in rows for end in (row.low, row.value, row.high) if end], most)


def _log_scale(values: Iterable[float], most: int) -> dict[str, object]:
    """Return a logarithmic axis for values above 0; see `_log_axis`."""
    ends = [value for value in values if value > 0]
    low, high = math.log10(min(ends)), math.log10(max(ends))
    room = max(0.05 * (high - low), 0.05)
    decades = range(math.floor(low - room), math.ceil(high + room) + 1)
    ticks = [float(f"{m}e{k}") for k in decades for m in (1, 2, 5)]
    ticks = [tick for tick in ticks if low - room <= math.log10(tick) <= high + room]
    if len(ticks) > most:
        whole = [tick for tick in ticks if f"{tick:e}".startswith("1")]
        ticks = whole[:: -(-len(whole) // most)] if len(whole) > 1 else ticks[::2]
    if len(ticks) < 2:
        ticks = [float(f"{min(ends):.2g}"), float(f"{max(ends):.2g}")]
    names = [f"{tick:g}".replace("e-0", "e-").replace("e+0", "e") for tick in ticks]
    return {"type": "log", "range": [low - room, high + room], "tickvals": ticks, "ticktext": names}


def _relative(line: list[Measurement]) -> list[Measurement]:
    """Divide a run's curve and its intervals by the curve's last value."""
    last = line[-1].value
    if not last:
        return line
    parts = {name: [getattr(r, name) for r in line] for name in ("value", "low", "high")}
    scaled = {name: [v if v is None else v / last for v in vs] for name, vs in parts.items()}
    return [
        replace(row, value=value, low=low, high=high)
        for row, value, low, high in zip(line, *scaled.values(), strict=True)
    ]


def losses(rows: Sequence[Record], look: Mapping[str, Style]) -> go.Figure:
    """Draw each run's loss on the report split, with the interval for other documents."""
    of_runs = [row for row in of_kind(rows, Measurement) if row.probe == "loss"]
    return draw(of_runs, Figure("", ("loss",)), look)


def by_arm(rows: Sequence[Number], look: Mapping[str, Style]) -> go.Figure:
    """Draw one number for each arm, all in one panel; without traces if no number has a value."""
    known = [row for row in rows if row.value is not None]
    return _dots({("", "", ""): known}, look).figure() if known else go.Figure()


def differences(rows: Iterable[Record], look: Mapping[str, Style]) -> go.Figure:
    """Draw paired differences of losses, one panel per reference."""
    panels: Panels[Comparison] = {}
    for row in of_kind(rows, Comparison):
        if row.term is Term.DIFFERENCE:
            panels.setdefault((f"minus {row.against}", "", ""), []).append(row)
    return _forests(panels, _in_order(panels, look), lambda row: row.arm, look)


def relative(
    rows: Sequence[Comparison],
    arms: Sequence[str],
    chains: Iterable[Sequence[str]],
    look: Mapping[str, Style],
) -> go.Figure:
    """Draw the losses of arms minus the loss of one reference arm, and the chains of steps between arms.

    Args:
        rows: the differences, with both intervals; all have the same reference.
        arms: the arms from top to bottom, without the reference, which has the first line.
        chains: arms connected by steps. A chain is drawn only if all its arms are in the figure.
        look: a style for each arm.
    """
    reference = rows[0].against
    names = [reference, *arms]
    sheet = _forest({("", "", ""): list(rows)}, names, lambda row: row.arm, look)
    sheet.layout["height"] = 58 + 29 * len(names)
    sheet.layout["margin"] |= {"t": 4, "b": 50}
    zero = replace(rows[0], arm=reference, value=0.0, low=0.0, high=0.0)
    mark = _intervals([zero], [0.0], look[reference])
    mark.update(
        text=[html.escape(f"{reference}: the reference, 0")], hovertemplate="%{text}<extra></extra>"
    )
    sheet.add(mark, 0)
    places = {row.arm: row.value for row in rows} | {reference: 0.0}
    for chain in chains:
        if all(arm in places for arm in chain):
            steps = _scatter(
                x=[places[arm] for arm in chain],
                y=[names.index(arm) for arm in chain],
                mode="lines",
                line={"color": INK, "width": 1, "dash": "dot", "shape": "vh"},
                hoverinfo="skip",
                showlegend=False,
            )
            sheet.add(steps, 0)
    return sheet.figure()


def terms(rows: Iterable[Record], look: Mapping[str, Style]) -> go.Figure:
    """Draw the benefit of LN, its steps and `static - LN`, one panel per arm with a per-token norm."""
    panels: Panels[Comparison] = {}
    for row in of_kind(rows, Comparison):
        main = row.lr is None and not row.design
        if main and row.term in (Term.BENEFIT, Term.STATIC, Term.STEP):
            panels.setdefault((row.arm, "", ""), []).append(row)
    names = dict.fromkeys(term_name(row) for rows in panels.values() for row in rows)
    return _forests(panels, list(names), term_name, look)


def where(rows: Iterable[Record], look: Mapping[str, Style]) -> go.Figure:
    """Draw the best static arm minus LN by tokens, one panel per arm with a per-token norm."""
    panels: Panels[Comparison] = {}
    for row in of_kind(rows, Comparison):
        if row.term in (Term.WHERE, Term.CONTRAST):
            panels.setdefault((row.arm, "", ""), []).append(row)
    names = dict.fromkeys(row.group for rows in panels.values() for row in rows)
    return _forests(panels, list(names), lambda row: row.group, look)


def term_name(row: Comparison) -> str:
    """Return a comparison's label in figures and tables; a step is labelled by the two variants it connects."""
    if row.group:
        return f"{row.term if row.term is Term.SINCE else Term.STATIC}, {row.group}"
    return " to ".join(row.step) if row.term is Term.STEP else str(row.term)


def _forests(
    panels: Panels[Comparison],
    names: Sequence[str],
    name_of: Callable[[Comparison], str],
    look: Mapping[str, Style],
) -> go.Figure:
    """Return the figure of `_forest`; without traces if there are no panels."""
    return _forest(panels, names, name_of, look).figure() if panels else go.Figure()


def _forest(
    panels: Panels[Comparison],
    names: Sequence[str],
    name_of: Callable[[Comparison], str],
    look: Mapping[str, Style],
) -> Sheet:
    """Draw differences in nats, with a thick bar for these models and a thin bar for new seeds.

    `names` are the lines from top to bottom, and `name_of` returns a comparison's line. With few seeds the
    thin bars can be much longer than everything else: the frame then cuts them, an arrow marks the cut, and
    the table gives their bounds.
    """
    sheet = Sheet(panels, row_height=40 + 34 * len(names))
    for index, rows in enumerate(panels.values()):
        for row in rows:
            new_seeds = row.cluster == "seed"
            width, height = 1.4 if new_seeds else 5, names.index(name_of(row))
            trace = _intervals([row], [height], look[row.arm], width, marked=new_seeds)
            sheet.add(trace, index)
        sheet.y(index, **_arm_axis(names, index))
        frame = _frame(rows)
        sheet.x(index, title="nats / token", range=frame)
        sheet.mark(0, index, upright=False)
        places = [names.index(name_of(row)) for row in rows]
        sheet.add(_arrows(rows, places, frame, [look[row.arm].colour for row in rows]), index)
    return sheet


def _arrows(
    rows: Sequence[Number],
    places: Sequence[float],
    frame: Sequence[float],
    colours: Sequence[str],
    upright: bool = False,
) -> Trace | None:
    """Draw an arrow at each border of the frame where the frame cuts an interval; return None without a cut."""
    along, across = ("y", "x") if upright else ("x", "y")
    down, up = ("triangle-down", "triangle-up") if upright else ("triangle-left", "triangle-right")
    low, high = frame
    inset = INSET * (high - low)
    cuts = []
    for row, place, colour in zip(rows, places, colours, strict=True):
        if row.low is not None and row.low < low:
            cuts.append((low + inset, place, down, colour))
        if row.high is not None and row.high > high:
            cuts.append((high - inset, place, up, colour))
    if not cuts:
        return None
    ends, at, symbols, of = zip(*cuts, strict=True)
    return _scatter(
        **{along: ends, across: at}, mode="markers", hoverinfo="skip", showlegend=False, cliponaxis=False,
        marker={"symbol": symbols, "size": ARROW, "color": of},
    )  # fmt: skip


def _frame(rows: Sequence[Number], with_zero: bool = True) -> list[float]:
    """Return an axis range that contains all estimates and document intervals, and seed intervals up to a limit."""
    inner = [0.0] * with_zero + [row.value for row in rows if row.value is not None]
    outer = list(inner)
    for row in rows:
        bounds = [bound for bound in (row.low, row.high) if bound is not None]
        outer += bounds
        if row.cluster == "document":
            inner += bounds
    room = 1.5 * (max(inner) - min(inner)) or 0.001
    low = max(min(outer), min(inner) - room)
    high = min(max(outer), max(inner) + room)
    return [low - 0.05 * (high - low), high + 0.05 * (high - low)]


# ---------------------------------------------------------------- pieces


def _intervals(
    rows: Sequence[Number],
    places: Sequence[float],
    style: Style,
    width: float = 1.6,
    marked: bool = True,
    upright: bool = False,
) -> Trace:
    """Draw points with bars, horizontal at the heights `places`, or upright; an open mark has no interval."""
    along, across = ("y", "x") if upright else ("x", "y")
    values = [row.value if row.value is not None else float("nan") for row in rows]
    known = [row.low is not None and row.high is not None for row in rows]
    texts = []
    for row in rows:
        name = run_name(row) if isinstance(row, Measurement) else row.arm
        n = row.n_clusters
        unit = f"{n} {plural(n, row.cluster)}" if row.cluster else f"n = {row.n}"
        texts.append(html.escape(f"{name}: {estimate(row)} {row.unit}, {unit}"))
    bars = {
        "type": "data",
        "symmetric": False,
        "array": [_gap(row.high, value) for row, value in zip(rows, values, strict=True)],
        "arrayminus": [-_gap(row.low, value) for row, value in zip(rows, values, strict=True)],
        "color": style.colour,
        "thickness": width,
        "width": 0,
    }
    return _scatter(
        **{along: values, across: list(places), f"error_{along}": bars},
        mode="markers",
        marker={
            "color": style.colour,
            "size": 9 if marked else 0.1,
            "symbol": [style.symbol if has else f"{style.symbol}-open" for has in known],
            "line": {"width": 1.5, "color": style.colour},
        },
        text=texts,
        hovertemplate="%{text}<extra></extra>",
        showlegend=False,
    )


def _joined(
    points: Sequence[Point], style: Style, name: str, named: set[str], in_order: bool = False
) -> Trace:
    """Draw points with upright bars, joined by a thin line in the order of `x`, or `in_order` as they are given.

    `named` contains the names that are already in the legend; this line's name is added to it.
    """
    line = points if in_order else sorted(points, key=lambda point: point.x)
    rows, x = [point.number for point in line], [point.x for point in line]
    trace = _intervals(rows, x, style, width=1, upright=True)
    trace["marker"]["size"] = 6
    trace.update(
        mode="lines+markers",
        line={"color": style.colour, "width": 1, "dash": style.dash},
        name=html.escape(name),
        legendgroup=html.escape(name),
        showlegend=name not in named,
    )
    named.add(name)
    return trace


def _ring(point: Point, style: Style) -> Trace:
    """Draw a ring around a chosen point."""
    return _scatter(
        x=[point.x],
        y=[point.number.value],
        mode="markers",
        marker={"symbol": "circle-open", "size": 16, "color": style.colour, "line": {"width": 2}},
        hoverinfo="skip",
        showlegend=False,
    )


def _gap(end: float | None, value: float) -> float:
    return 0.0 if end is None else end - value


def _scatter(**fields: Any) -> Trace:
    """Return a trace as plotly's JSON: a `go.Scatter` would be validated here and again when it is added."""
    return {"type": "scatter", **fields}


def _band(line: Sequence[Measurement], style: Style, n_lines: int) -> Trace:
    """Draw a line's intervals as a band, the lighter the more lines the panel has."""
    x = [row.x for row in line]
    return _scatter(
        x=x + x[::-1],
        y=[row.high for row in line] + [row.low for row in reversed(line)],
        fill="toself",
        fillcolor=style.colour,
        opacity=max(0.02, min(0.12, 0.36 / n_lines)),
        line={"width": 0},
        mode="lines",
        hoverinfo="skip",
        showlegend=False,
        legendgroup=html.escape(line[0].arm),
    )


def min_width(figure: go.Figure) -> int:
    """Return the width in pixels below which the page scrolls the figure instead of shrinking it."""
    n_columns = len({round(axis.domain[0], 3) for axis in figure.select_xaxes()})
    return 330 if n_columns == 1 else 130 + 210 * n_columns


def titled(figure: go.Figure, title: str) -> go.Figure:
    """Add a title to the figure, with room for it above the panels."""
    if figure.layout.height is None:
        return figure.update_layout(title=html.escape(title))
    return figure.update_layout(
        # At the top of the figure: in the middle of the margin, which is the default, it would cover the legend.
        title={
            "text": html.escape(title),
            "font": {"size": 14},
            "y": 1,
            "yref": "container",
            "yanchor": "top",
            "pad": {"t": 10},
        },
        height=figure.layout.height + TITLE_HEIGHT,
        margin_t=figure.layout.margin.t + TITLE_HEIGHT,
    )


def _arm_axis(labels: Sequence[str], index: int) -> dict[str, object]:
    """Return a vertical axis with the arms from top to bottom, labelled at the left of each row of panels."""
    return {
        "showticklabels": index % N_COLUMNS == 0,
        "tickvals": list(range(len(labels))),
        "ticktext": [
            _broken(label) if len(labels) <= MANY_ARMS else html.escape(label) for label in labels
        ],
        "tickfont": {"size": 11},
        "ticks": "outside",
        "ticklen": ARROW,
        "tickcolor": "rgba(0, 0, 0, 0)",  # room for arrows between the labels and the frame
        "range": [len(labels) - 0.4, -0.6],
        "showgrid": False,
    }


def _broken(label: str) -> str:
    """Return a label in two lines if it is long and has a comma, so that the panels keep room for the data.

    Of several commas, the one that gives the shorter lines is chosen.
    """
    parts = label.split(", ")
    if len(label) <= LONG_LABEL or len(parts) < 2:
        return html.escape(label)
    pairs = [(", ".join(parts[:i]) + ",", ", ".join(parts[i:])) for i in range(1, len(parts))]
    return "<br>".join(map(html.escape, min(pairs, key=lambda pair: max(map(len, pair)))))


def _spread(n: int) -> list[float]:
    """Return offsets that separate the dots of n seeds."""
    return [0.0] if n == 1 else [0.44 * (i / (n - 1) - 0.5) for i in range(n)]


def _have_one_unit(panels: Panels[N]) -> bool:
    """Return whether all panels have one unit, so that a shared axis makes them comparable."""
    return len({row.unit for rows in panels.values() for row in rows}) == 1


def _have_one_size(panels: Panels[N]) -> bool:
    """Return whether every panel's curves can be seen on an axis that all panels share."""
    values = [[row.value for row in rows if row.value is not None] for rows in panels.values()]
    spans = [max(each) - min(each) for each in values if each]
    return min(spans, default=0) * MOST_FLAT >= max(spans, default=0)


def _arm_height(n_arms: int) -> int:
    """Return the height of an arm's line in pixels: room for a label of two lines, unless there are many arms."""
    return 26 if n_arms <= MANY_ARMS else 20


def _mark_zero(sheet: Sheet, rows: Sequence[Number], index: int, upright: bool = False) -> None:
    """Draw a line at 0 if there are values on both sides of it."""
    values = [
        value for row in rows for value in (row.low, row.value, row.high) if value is not None
    ]
    if min(values) < 0 < max(values):
        sheet.mark(0, index, upright)
