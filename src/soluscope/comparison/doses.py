"""Ladders: arms that differ in one setting, and their numbers against it.

The settings are a constant gain, the weight of the entropy penalty, and the number of neurons at one d_model. A
ladder has three doses or more. The probes stored its numbers for each run. Here they become means over seeds, and
differences from the ladder's reference dose, paired by seed.

Source: protocol.md section 7, P25.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from soluscope.comparison import stats
from soluscope.comparison.compare import passed_over
from soluscope.results import (
    READABILITY,
    AtDose,
    Ladder,
    Measurement,
    ProbeWords,
    Record,
    Setting,
    Untrained,
    of_kind,
)

FEWEST = 3
"""Least number of doses of a ladder."""
FREE = ("lr", "mlp_out_scale")
"""Settings at which each arm has its own best value."""


@dataclass(frozen=True)
class _Quantity:
    """A number that a probe stores for each run."""

    name: str
    probe: str
    quantity: str
    statistic: str
    proxy: bool = False


LOSS = _Quantity("loss", "loss", "loss", "mean")
RULES = _Quantity(READABILITY, "neurons", READABILITY, "median", proxy=True)
"""Number of `soluscope neurons`."""

_Key = tuple[object, ...]
_BySeed = dict[int, float]


def doses(records: Sequence[Record]) -> list[AtDose]:
    """Return the numbers of all ladders.

    Args:
        records: the settings of `compare`, and the measurements of the reported runs. Arms whose rate was not
            chosen are left out.

    Returns:
        For each ladder, arm and quantity: the mean over seeds with Student's t interval, of the trained models and
        of their initialisations; and the mean's difference from that at the reference dose, over the seeds of both.
        The reference is the smallest gain or width, and no penalty.
    """
    left_out = passed_over(records)
    arms = [
        each
        for each in of_kind(records, Setting)
        if each.arm not in left_out and not each.matched and not each.only_tried
    ]
    quantities = _quantities(records)
    numbers = _numbers(records, quantities, untrained=False)
    before = _numbers(records, quantities, untrained=True)
    return [
        record
        for setting in Ladder
        for ladders in _ladders(arms, setting).values()
        for key, ladder in ladders.items()
        for record in _of_ladder(
            setting, _fixed(key, [*ladders]), ladder, quantities, numbers, before
        )
    ]


def dose_of(arm: Setting, setting: Ladder) -> float | None:
    """Return an arm's value of a ladder's setting, or None for an arm that belongs to no such ladder."""
    penalty = arm.values.get("entropy_penalty", 0.0)
    if setting is Ladder.ENTROPY:
        return penalty
    if setting is Ladder.WIDTH:
        return arm.values.get("d_mlp")
    return None if penalty or arm.role not in ("static", "other") else arm.values.get("gain")


def _ladders(
    arms: Iterable[Setting], setting: Ladder
) -> dict[str, dict[_Key, dict[float, Setting]]]:
    """Return the ladders by variant and by the settings that their arms share; each has its arms by dose."""
    found: dict[str, dict[_Key, dict[float, Setting]]] = {}
    for arm in sorted(arms, key=lambda each: each.arm):
        x = dose_of(arm, setting)
        if x is not None:
            of_variant = found.setdefault(arm.variant, {})
            of_variant.setdefault(_shared(arm, setting), {}).setdefault(x, arm)
    result = {}
    for variant, by_key in found.items():
        long = {
            key: dict(sorted(ladder.items()))
            for key, ladder in by_key.items()
            if len(ladder) >= FEWEST
        }
        if long:
            result[variant] = long
    return result


def _shared(arm: Setting, setting: Ladder) -> _Key:
    """Return the settings of an arm that all arms of its ladder share, as (name, value)."""
    without = {*FREE, _NAMES[setting]}
    # A gain that was matched to a per-token norm was measured: the kappa of that norm is the setting.
    without |= {"gain"} if "matched_kappa" in arm.values else set()
    without |= {"matched_kappa"} if setting is Ladder.GAIN else set()
    return tuple(
        (name, float(f"{value:.6g}"))
        for name, value in sorted(arm.values.items())
        if name not in without
    )


_NAMES = {Ladder.GAIN: "gain", Ladder.ENTROPY: "entropy_penalty", Ladder.WIDTH: "d_mlp"}
"""Names of the ladders' settings among an arm's values."""


def _fixed(key: _Key, keys: Sequence[_Key]) -> str:
    """Return the settings that distinguish a ladder from the other ladders of its variant, as text."""
    shared = set.intersection(*(set(each) for each in keys))
    own = [pair for pair in key if pair not in shared and isinstance(pair, tuple)]
    return ", ".join(f"{str(name).replace('_', ' ')} {value:.4g}" for name, value in own)


def _quantities(records: Iterable[Record]) -> list[_Quantity]:
    """Return the numbers of a ladder in the order in which they are drawn: those of probes as they declare them."""
    declared = [
        _Quantity(name, words.probe, name, statistic, quantity.on_ladders == "proxy")
        for words in of_kind(records, ProbeWords)
        for name, quantity in words.quantities.items()
        if quantity.on_ladders
        for statistic in ("median", "")  # an estimate has no statistic
    ]
    every = [
        LOSS, *(each for each in declared if not each.proxy), RULES,
        *(each for each in declared if each.proxy),
    ]  # fmt: skip
    return list(dict.fromkeys(every))  # each run has the words of its probes


def _numbers(
    records: Iterable[Record], quantities: Iterable[_Quantity], untrained: bool
) -> Mapping[tuple[str, _Quantity], tuple[_BySeed, str]]:
    """Return each arm's numbers by seed, with their unit, trained or before training."""
    known = {(each.probe, each.quantity, each.statistic): each for each in quantities}
    kind: type[Measurement | Untrained] = Untrained if untrained else Measurement
    result: dict[tuple[str, _Quantity], tuple[_BySeed, str]] = {}
    for row in of_kind(records, kind):
        quantity = known.get((row.probe, row.quantity, row.statistic))
        place = (row.stream, row.positions, row.group) == ("natural", "not BOS", "")
        is_point = isinstance(row, Measurement) and row.x is not None
        if quantity and place and not is_point and row.seed is not None and row.value is not None:
            by_seed, _ = result.setdefault((row.arm, quantity), ({}, row.unit))
            by_seed[row.seed] = row.value
    return result


def _of_ladder(
    setting: Ladder,
    fixed: str,
    ladder: Mapping[float, Setting],
    quantities: Iterable[_Quantity],
    numbers: Mapping[tuple[str, _Quantity], tuple[_BySeed, str]],
    before: Mapping[tuple[str, _Quantity], tuple[_BySeed, str]],
) -> Iterator[AtDose]:
    reference = 0.0 if setting is Ladder.ENTROPY and 0.0 in ladder else min(ladder, key=abs)
    for quantity in quantities:
        at_reference, _ = numbers.get((ladder[reference].arm, quantity), ({}, ""))
        for x, arm in ladder.items():
            for untrained, source in ((False, numbers), (True, before)):
                by_seed, unit = source.get((arm.arm, quantity), ({}, ""))
                if not by_seed:
                    continue
                about = _About(setting, fixed, arm, x, quantity, unit, untrained)
                yield about.record([*by_seed.values()])
                both = sorted(by_seed.keys() & at_reference.keys())
                if not untrained and x != reference and both:
                    differences = [by_seed[seed] - at_reference[seed] for seed in both]
                    yield about.record(differences, since=reference)


@dataclass(frozen=True)
class _About:
    """The fields that a number and its difference from the reference share."""

    setting: Ladder
    fixed: str
    arm: Setting
    x: float
    quantity: _Quantity
    unit: str
    untrained: bool

    def record(self, by_seed: Sequence[float], since: float | None = None) -> AtDose:
        interval = stats.paired_seeds(by_seed)
        return AtDose(
            study=self.arm.study, arm=self.arm.arm, variant=self.arm.variant, commit=self.arm.commit,
            config=self.arm.config, setting=self.setting, x=self.x, since=since, fixed=self.fixed,
            quantity=self.quantity.name, statistic=self.quantity.statistic, proxy=self.quantity.proxy,
            untrained=self.untrained, value=interval.value, low=interval.low, high=interval.high,
            unit=self.unit, n=interval.n, n_clusters=interval.n, cluster="seed",
        )  # fmt: skip
