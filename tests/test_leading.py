"""The table of the numbers by which the arms differ most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace

from _records import LN, number, passed, words

from soluscope.report import leading
from soluscope.report.blocks import Table
from soluscope.results import Measurement, Record, Setting, Untrained

ARMS: Sequence[Setting] = (
    replace(LN, arm="solu", variant="solu", role="plain"),
    LN,
    replace(LN, arm="gelu", variant="gelu", role="baseline"),
)
COUNT = "participation ratio: post"


def of_arm(arm: str, probe: str, quantity: str, value: float, half: float) -> list[Measurement]:
    unit = words(probe).quantities[quantity].unit
    statistic = words(probe).quantities[quantity].statistics[0]
    return [
        number(
            probe, quantity, value + seed, half, arm=arm, variant=arm, run=f"{arm}-s{seed}", seed=seed, unit=unit,
            statistic=statistic, constant=half == 0,
        )
        for seed in (0, 1)
    ]  # fmt: skip


def records() -> list[Record]:
    """Return three numbers of two probes; with two seeds each, one apart, so that a mean is .5 higher."""
    rows: list[Record] = [*ARMS, words("neuron_statistics"), words("engagement")]
    for arm, value in (("solu", 3.0), ("solu_ln", 9.0), ("gelu", 33.0)):
        rows += of_arm(arm, "neuron_statistics", COUNT, value, 3.0)
        rows += of_arm(arm, "neuron_statistics", "participation ratio: mid", value, 4.0)
    for arm, value in (("solu", 0.0), ("solu_ln", 2.0)):
        rows += of_arm(arm, "engagement", "max_p", value, 1.0)
        rows += of_arm(arm, "engagement", "r", value, 0.0 if arm == "solu" else 1e-9)
    return rows


def lines(rows: Sequence[Record]) -> list[list[object]]:
    return [
        list(line)
        for each in leading.blocks(rows)
        if isinstance(each, Table)
        for line in each.lines
    ]


def test_numbers_are_sorted_by_the_largest_difference_over_the_interval_one_for_each_probe() -> (
    None
):
    found = lines([*records(), *passed("neuron_statistics", "engagement")])
    assert [line[0][0].split(",")[0] for line in found] == [
        f"P13 median of {COUNT}",
        "P1 median of max_p",
    ]  # type: ignore[index]
    assert [line[-1] for line in found] == ["7.1", "1.4"]  # 30 / sqrt(3^2 + 3^2), 2 / sqrt(1 + 1)
    assert found[0][1:-1] == [["3 to 4"], ["9 to 10"], ["33 to 34"]]
    assert found[1][1:-1] == [["0 to 1"], ["2 to 3"], [""]]  # not measured in gelu


def test_a_probe_without_passed_controls_leads_nothing() -> None:
    (line,) = lines([*records(), *passed("engagement")])
    assert line[-1] == "1.4"
    assert lines(records()) == []


def test_the_numbers_before_training_stand_beside_those_after() -> None:
    rows = records()
    shared = {each.name for each in fields(Untrained)} & {each.name for each in fields(Measurement)}
    untrained = [
        replace(
            Untrained(**{name: getattr(row, name) for name in shared}, difference=0.0), value=60.0
        )
        for row in rows
        if isinstance(row, Measurement) and (row.arm, row.quantity) == ("solu", COUNT)
    ]
    found = lines([*rows, *untrained, *passed("neuron_statistics")])
    assert found[0][1] == ["3 to 4", "untrained 60"]
