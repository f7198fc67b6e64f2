"""Selection of records by arm, probe and term, and the format of numbers in the report and the terminal."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from soluscope.results import (
    HELD_OUT,
    HIGH_GAIN,
    OUTPUT_SIZE,
    SCALED_SIZE,
    ChoicePoint,
    Comparison,
    LeftOut,
    Measurement,
    Number,
    OfRun,
    Record,
    Records,
    Setting,
    Term,
    Untrained,
    Verdict,
    of_kind,
)
from soluscope.text import plural

VARIES, CONSTANT = 0.1, 0.01
"""Standard deviation of log gain above which a gain varies, and below which it is one constant."""
IDLE, FEW = 0.05, 0.01
"""r below which a token's gain is at its ceiling, and the share of the loss that may lie at other tokens."""
SHARE_OF_LOSS = f"share of loss where r is above {IDLE}"
"""Estimate of the probe `engagement`."""
NO_COST = 0.001
"""Threshold below which a change of the loss counts as none, in nats per token (protocol.md section 7, P4)."""

Side = Literal["zero", "above", "below", "open"]
Gain = Literal["varies", "one constant", "open"]
Rescales = Literal["yes", "no", "unknown"]


@dataclass(frozen=True)
class Choice:
    """A setting that was chosen on the select split, and the points of the curve that it was chosen from."""

    points: tuple[ChoicePoint, ...]
    """The eligible points, lowest setting first."""
    chosen: ChoicePoint
    """The point with the least loss."""
    without: tuple[ChoicePoint, ...] = ()
    """Points that lack seeds and were not eligible."""

    @property
    def tried(self) -> str:
        """List the eligible settings as text."""
        return ", ".join(f"{point.x:.3g}" for point in self.points)


def choices(records: Iterable[Record]) -> list[Choice]:
    """Return each choice that a study's comparison made, learning rates before gains."""
    curves: dict[tuple[str, str], list[ChoicePoint]] = {}
    for point in of_kind(records, ChoicePoint):
        curves.setdefault((point.setting, point.chosen_arm), []).append(point)
    result = []
    for (_, chosen_arm), curve in sorted(curves.items(), key=lambda item: item[0][0], reverse=True):
        curve.sort(key=lambda point: point.x)
        points = tuple(point for point in curve if point.eligible)
        without = tuple(point for point in curve if not point.eligible)
        chosen = next(point for point in points if point.arm == chosen_arm)
        result.append(Choice(points, chosen, without))
    return result


def tuned(records: Sequence[Record]) -> list[Record]:
    """Return all records except records of arms that are not compared.

    These are arms whose learning rate was not chosen, and arms that were only tried out at select seeds.
    """
    if isinstance(records, Records):
        return records.once(tuned, lambda: Records(tuned([*records])))
    only_tried = {arm for arm, setting in settings(records).items() if setting.only_tried}
    return [record for record in at_best_rate(records) if record.arm not in only_tried]


def at_best_rate(records: Sequence[Record]) -> list[Record]:
    """Return all records except records of arms whose learning rate was not chosen, or of a fixed design alone.

    A point of the line of rates may be no candidate, because it was trained at the reported seeds only. It is left
    out too, if there are candidates that differ from it only in the rate and in the scale of the MLP's output.
    """
    if isinstance(records, Records):
        return records.once(at_best_rate, lambda: Records(at_best_rate([*records])))
    rates = [point for point in of_kind(records, ChoicePoint) if point.setting == "lr"]
    known = settings(records)
    passed_over = {point.arm for point in rates if point.arm != point.chosen_arm}
    passed_over |= {arm for arm, setting in known.items() if setting.matched}
    candidates = {point.arm for point in rates}
    families = {known[arm].family for arm in candidates & known.keys()} - {""}
    passed_over |= {arm for arm in known.keys() - candidates if known[arm].family in families}
    return [record for record in records if record.arm not in passed_over]


def settings(records: Iterable[Record]) -> dict[str, Setting]:
    """Return each arm's settings and its role in the comparison, by the arm's name."""
    return {setting.arm: setting for setting in of_kind(records, Setting)}


def sizes(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Return the records of each size's arms, by the text that distinguishes the size, smallest size first."""
    if isinstance(records, Records):
        of_size = records.once(
            sizes, lambda: {size: Records(found) for size, found in sizes([*records]).items()}
        )
        return dict(of_size)
    size_of = {arm: setting.size for arm, setting in settings(records).items()}
    result: dict[str, list[Record]] = {size: [] for size in dict.fromkeys(size_of.values())}
    for record in records:
        if record.arm:
            result.setdefault(size_of.get(record.arm, ""), []).append(record)
    return result


def held_out_gaps(records: Sequence[Record]) -> list[Measurement]:
    """Return each run's loss on held-out documents minus that of the plain arm's run with the same seed.

    Both losses are means over the same tokens after the same number of steps, so the gap distinguishes lines
    that coincide in a figure of the losses.
    """
    gaps = []
    for of_one in sizes(records).values():
        plain = [arm for arm, setting in settings(of_one).items() if setting.role == "plain"]
        rows = [row for row in of_kind(of_one, Measurement) if row.quantity == HELD_OUT]
        there = {(row.seed, row.x): row.value for row in rows if row.arm in plain[:1]}
        for row in rows:
            other = there.get((row.seed, row.x))
            if row.arm not in plain[:1] and other is not None and row.value is not None:
                name = f"{HELD_OUT} minus that of {plain[0]}"
                gaps.append(replace(row, quantity=name, value=row.value - other))
    return gaps


def of_size(caption: str, size: str) -> str:
    """Return the caption, followed by the size if the study has several sizes."""
    return f"{caption}: {size}" if size else caption


def titles(records: Sequence[Record]) -> dict[str, str]:
    """Return a short name for each compared arm: its variant, and the settings that differ between its arms.

    An arm with a label has its name already (names.py). If two arms would have the same short name, each keeps
    its full name.
    """
    known = settings(at_best_rate(records))
    result = {}
    for arm, setting in sorted(known.items(), key=lambda item: _by_setting(item[1])):
        alike = [other.values for other in known.values() if other.variant == setting.variant]
        differing = [
            f"{name} {setting.values[name]:.3g}"
            for name in ("kappa", "gain", "mlp_out_scale", "entropy_penalty")
            if name in setting.values and len({values.get(name) for values in alike}) > 1
        ]
        result[arm] = arm if setting.label else ", ".join([setting.variant, *differing])
    several = [title for title in result.values() if list(result.values()).count(title) > 1]
    return {arm: arm if title in several else title for arm, title in result.items()}


def series(records: Iterable[Record]) -> dict[str, str]:
    """Return the name that an arm shares with the same arm at other sizes: its variant and its own settings.

    Only settings that differ within a size are named. A gain that was matched to a per-token norm is named by the
    kappa of that norm.
    """
    known = settings(records)
    result = {}
    for arm, of in known.items():
        alike = [
            each for each in known.values() if (each.variant, each.size) == (of.variant, of.size)
        ]
        own = "matched_kappa" if "matched_kappa" in of.values else "gain"
        differing = [
            f"{name.replace('_', ' ')} {of.values[name]:.3g}"
            for name in ("kappa", own, "entropy_penalty")
            if name in of.values and len({each.values.get(name) for each in alike}) > 1
        ]
        result[arm] = ", ".join([of.variant, *differing])
    return result


def _by_setting(setting: Setting) -> tuple[str | float, ...]:
    values = (
        setting.values.get(name, 0.0)
        for name in ("kappa", "gain", "mlp_out_scale", "entropy_penalty")
    )
    return setting.variant, *values


DOMINATES = 5.0
"""Least |o| / |r0| at which ln_final swallows a change of the gain.

The stream after the MLP is r0 + o, and g multiplies o. ln_final keeps its direction only, which turns by at most
|r0| / |o| (in radians) for each unit of log gain, where o is the longer: less than .2 from here on. A change
of the gain that costs nothing then shows only that ln_final rescales each token anyway."""

# --- arms by their role in the comparison ---------------------------------------------------------


def per_token(records: Iterable[Record]) -> list[str]:
    """Return the names of the arms whose norm has a gain for each token, in the order of the records."""
    return [arm for arm, each in settings(records).items() if each.role == "per_token"]


def twins(records: Iterable[Record], of: str | None = None) -> list[str]:
    """Return the sorted names of the static twins of an arm with a per-token norm; without `of`, of all such arms.

    A twin has one gain, which was matched to the arm's norm before training. An arm of the twin's variant with
    another gain is no twin, unless it is the only arm of that variant.
    """
    known = settings(records)
    normed = [each for arm, each in known.items() if each.role == "per_token" and of in (None, arm)]
    found = set()
    for norm in normed:
        alike = {
            arm: each.values
            for arm, each in known.items()
            if norm.twin
            and (each.variant, each.size) == (norm.twin, norm.size)
            and not each.values.get("entropy_penalty")
        }
        kappa = norm.values.get("kappa", math.nan)
        matched = {
            arm
            for arm, values in alike.items()
            if math.isclose(values.get("matched_kappa", math.inf), kappa, rel_tol=1e-6)
        }
        found |= matched or (set(alike) if len(alike) == 1 else set())
    return sorted(found)


def rescales(records: Sequence[Record], arm: str) -> Rescales:
    """Return whether ln_final rescales the MLP's output at each token of an arm; without numbers it is unknown."""
    bounds = envelope(measured(records, OUTPUT_SIZE, SCALED_SIZE, arm, "median"))
    if bounds is None:
        return "unknown"
    return "no" if bounds[1] < DOMINATES else "yes"


def rescaled(records: Sequence[Record], arm: str) -> list[Measurement]:
    """Return |o| / |r0| by seed where ln_final rescales the MLP's output at each token, and [] elsewhere."""
    is_rescaled = rescales(records, arm) == "yes"
    return measured(records, OUTPUT_SIZE, SCALED_SIZE, arm, "median") if is_rescaled else []


def by_kappa(records: Iterable[Record]) -> Mapping[str, Mapping[str, float]]:
    """Return the kappa of each arm, by variant, lowest kappa first.

    Contains only variants with a per-token norm that were trained at several kappas.
    """
    known = settings(records)
    result: dict[str, dict[str, float]] = {}
    for arm in per_token(known.values()):
        if "kappa" in known[arm].values:
            result.setdefault(known[arm].variant, {})[arm] = known[arm].values["kappa"]
    return {
        variant: dict(sorted(kappas.items(), key=lambda item: item[1]))
        for variant, kappas in sorted(result.items())
        if len(set(kappas.values())) > 1
    }


def per_token_by_kappa(records: Sequence[Record]) -> list[str]:
    """Return the arms with a per-token norm; variants with several kappas come first, lowest kappa first."""
    dosed = [arm for kappas in by_kappa(records).values() for arm in kappas]
    return [*dosed, *(arm for arm in per_token(records) if arm not in dosed)]


def at_one_rate(records: Sequence[Record]) -> list[str]:
    """Return the arms trained at one rate that was not tuned for them, if rates, gains or kappas are compared."""
    points = of_kind(records, ChoicePoint)
    if not points and not any(by_kappa(of_one) for of_one in sizes(records).values()):
        return []
    untuned = {arm for arm, each in settings(records).items() if each.rate and not each.after}
    return sorted(untuned - {p.arm for p in points if p.setting == "lr"})


def untuned(records: Sequence[Record]) -> list[Setting]:
    """Return the compared arms whose one learning rate was not tuned for them.

    An arm with several rates in the study has the best of these; their grid is judged elsewhere.
    """
    several = {each.arm for each in of_kind(records, ChoicePoint) if each.setting == "lr"}
    return [
        each
        for each in settings(tuned(records)).values()
        if each.rate and not each.after and each.arm not in several
    ]


def nothing_at_high_gain(records: Sequence[Record], arm: str, design: str = "") -> bool:
    """Return whether it is settled that the best static arm loses nothing at the top quarter of an arm's gain."""
    rows = comparisons(records, Term.WHERE, arm, design=design)
    return any(
        row.verdict is Verdict.EQUIVALENT or (row.high is not None and row.high < 0)
        for row in rows
        if row.group == HIGH_GAIN
    )


def runs_of(records: Iterable[Record]) -> set[str]:
    """Return the names of the run folders that the records are about."""
    return {record.run for record in records if isinstance(record, OfRun)}


def run_name(row: Measurement | Untrained | LeftOut) -> str:
    """Return the name of a run for people: its arm and its seed."""
    return row.arm if row.seed is None else f"{row.arm}, seed {row.seed}"


def seeds_of(records: Iterable[Record], arm: str) -> int:
    """Return the number of seeds of an arm in the records."""
    of_arm = (record for record in records if record.arm == arm and isinstance(record, OfRun))
    return len({record.seed for record in of_arm} - {None})


# --- numbers --------------------------------------------------------------------------------------


def comparisons(
    records: Iterable[Record],
    term: Term,
    arm: str | None = None,
    against: str | None = None,
    cluster: str = "seed",
    design: str = "",
) -> list[Comparison]:
    """Return the comparisons of a term between arms at their own best points; by default for new seeds.

    With a design, the arms follow its rule for the scale of the MLP's output.
    """
    return [
        each
        for each in of_kind(records, Comparison)
        if (each.term, each.cluster, each.lr, each.design) == (term, cluster, None, design)
        and (arm is None or each.arm == arm)
        and (against is None or each.against == against)
    ]


def remarks(row: Comparison) -> str:
    """Return the remarks that belong beside a comparison: its note, the choice of its arm, and its size."""
    role = {Term.BENEFIT: "plain arm:", Term.STEP: "step to"}.get(row.term, "best static arm:")
    chosen = f"{role} {row.choice}" if row.choice else ""
    return "; ".join(part for part in (row.note, chosen, row.size) if part)


def for_these_models(records: Iterable[Record], of: Comparison) -> Comparison | None:
    """Return the same comparison with the interval for other documents, or None without such a record."""
    same = comparisons(records, of.term, of.arm, of.against, cluster="document", design=of.design)
    alike = (each for each in same if (each.step, each.group) == (of.step, of.group))
    return next(alike, None)


def by_stream(row: Measurement) -> tuple[bool, str]:
    """Return a sort key that puts natural text first and the other streams after it by name."""
    return row.stream != "natural", row.stream


def streams(rows: Iterable[Measurement]) -> list[str]:
    """Return the streams of measurements: natural text, then streams with intervals, then all others."""
    bounded: dict[str, bool] = {}
    for row in rows:
        bounded[row.stream] = bounded.get(row.stream, False) or row.low is not None
    return sorted(bounded, key=lambda stream: (stream != "natural", not bounded[stream], stream))


def measured(
    records: Iterable[Record],
    probe: str,
    quantity: str,
    arm: str,
    statistic: str = "mean",
    group: str = "",
    stream: str = "natural",
    positions: str = "not BOS",
    x: float | None = None,
) -> list[Measurement]:
    """Return a probe's numbers for an arm, sorted by seed; estimates have no statistic and match any."""
    result = [
        row
        for row in _of_quantity(records, probe, quantity, arm)
        if row.group == group
        and (row.stream, row.positions) == (stream, positions)
        and row.statistic in (statistic, "")
        and row.x == x
        and row.value is not None
    ]
    return sorted(result, key=lambda row: row.seed or 0)


def _of_quantity(
    records: Iterable[Record], probe: str, quantity: str, arm: str
) -> Sequence[Measurement]:
    """Return an arm's measurements of a quantity, in their order."""
    if not isinstance(records, Records):
        return [
            row
            for row in of_kind(records, Measurement)
            if (row.probe, row.quantity, row.arm) == (probe, quantity, arm)
        ]

    def index() -> dict[tuple[str, str, str], list[Measurement]]:
        result: dict[tuple[str, str, str], list[Measurement]] = {}
        for row in of_kind(records, Measurement):
            result.setdefault((row.probe, row.quantity, row.arm), []).append(row)
        return result

    return records.once(_of_quantity, index).get((probe, quantity, arm), [])


def number_key(row: Measurement | Untrained) -> tuple[object, ...]:
    """Return the key that a number of a run and the same number before training share."""
    fields = (row.probe, row.quantity, row.statistic, row.stream, row.positions, row.group)
    return row.arm, row.seed, *fields


def engagement(records: Iterable[Record], arm: str, positions: str) -> list[Measurement]:
    """Return an arm's median r on natural text, one row per seed."""
    return measured(records, "engagement", "r", arm, statistic="median", positions=positions)


def gain_varies(records: Sequence[Record], arm: str) -> Gain:
    """Return whether an arm's gain varies between tokens, judged by the seeds' interval bounds.

    The typical token's r does not decide it: most tokens may have their gain at its ceiling while the gain of
    others is far lower.

    Source: protocol.md section 1.3.
    """
    spread = envelope(measured(records, "engagement", "log gain", arm, "sd"))
    top = envelope(measured(records, "engagement", "r", arm, "q99"))
    share = envelope(measured(records, "engagement", SHARE_OF_LOSS, arm, ""))
    if spread is None:
        return "open"
    if spread[0] > VARIES:
        return "varies"
    at_ceiling = top is not None and share is not None and top[1] < IDLE and share[1] < FEW
    return "one constant" if spread[1] < CONSTANT or at_ceiling else "open"


def before_norm(records: Sequence[Record], arm: str) -> list[str]:
    """Return the arms without a norm to compare an arm with: baselines, and its chain before its static twin."""
    known = settings(records)
    of = known[arm]
    chain = {step.variant for step in of.chain} - {of.variant, of.twin}
    return sorted(
        name
        for name, each in known.items()
        if each.size == of.size
        and (
            each.role == "baseline"
            or (each.variant in chain and not each.values.get("entropy_penalty"))
        )
    )


def is_constant(row: Number) -> bool:
    """Return whether a number is the same at every token and therefore needs no interval."""
    return isinstance(row, Measurement) and row.constant


def number(value: float | None, decimals: int | None = None) -> str:
    """Format a number with `decimals` places, or with three significant digits; None gives "undefined"."""
    if value is None:
        return "undefined"
    if decimals is not None:
        return f"{round(value, decimals) + 0.0:.{decimals}f}"  # no "-0.00"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.4g}"


def signed(value: float) -> str:
    """Format a number with a sign and four places; values that round to 0 give +0.0000."""
    return f"{round(value, 4) + 0.0:+.4f}"


def estimate(row: Number, decimals: int | None = None) -> str:
    """Format an estimate: `value [low, high]`, `value (no interval)`, `value (constant)`, or `undefined`."""
    value = number(row.value, decimals)
    if row.value is None:
        return value
    if is_constant(row):
        return f"{value} (constant)"
    if row.low is None or row.high is None:
        return f"{value} (no interval)"
    return f"{value} [{number(row.low, decimals)}, {number(row.high, decimals)}]"


def span(values: Iterable[float | None], decimals: int | None = None) -> str:
    """Format the seeds' values as `low to high`, or as one number if all seeds gave the same number."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    low, high = number(min(known), decimals), number(max(known), decimals)
    return low if low == high else f"{low} to {high}"


def normed(records: Sequence[Record]) -> list[str]:
    """Return the arms with a per-token norm, by size and kappa."""
    return [arm for of_one in sizes(records).values() for arm in per_token_by_kappa(of_one)]


def listed(names: Sequence[str]) -> str:
    """Return names as a list, with semicolons if a name has a comma."""
    return ("; " if any("," in name for name in names) else ", ").join(names)


def seeds(n: int) -> str:
    return f"{n} {plural(n, 'seed')}"


def envelope(rows: Sequence[Number]) -> tuple[float, float] | None:
    """Return the lowest and the highest bound of the rows' intervals.

    A value that is constant over tokens counts as an interval of width 0. Any other row without bounds
    makes the result None.
    """
    bounds = [(row.value, row.value) if is_constant(row) else (row.low, row.high) for row in rows]
    lows = [low for low, _ in bounds if low is not None]
    highs = [high for _, high in bounds if high is not None]
    if not rows or len(lows) < len(rows) or len(highs) < len(rows):
        return None
    return min(lows), max(highs)


def side_of_zero(rows: Sequence[Number], margin: float) -> Side:
    """Return the side of 0 on which all the rows' intervals lie, taken together; see `side`."""
    return side(envelope(rows), margin)


def side(bounds: tuple[float, float] | None, margin: float) -> Side:
    """Return the side of 0 that an interval settles; values closer to 0 than `margin` count as 0.

    An interval wholly within `margin` of 0 gives `zero`. An interval wholly above `margin` gives `above`,
    and one wholly below -`margin` gives `below`. An interval that contains `margin` or -`margin` gives
    `open`, even if it excludes 0; so does a missing interval.
    """
    if bounds is None:
        return "open"
    low, high = bounds
    if -margin < low and high < margin:
        return "zero"
    if low > margin:
        return "above"
    return "below" if high < -margin else "open"
