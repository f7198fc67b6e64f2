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


def columns(rows: Sequence[Record]) -> dict[str, list[object]]:
    """Return the table's columns by their heads."""
    tables = [each for each in leading.blocks(rows) if isinstance(each, Table)]
    return {
        str(head): [line[i] for line in table.lines]
        for table in tables
        for i, head in enumerate(table.heads)
    }


def test_numbers_are_sorted_by_the_largest_difference_over_the_interval_one_for_each_probe() -> (
    None
):
    names, counts, peaks = columns([*records(), *passed("neuron_statistics", "engagement")]).items()
    assert names[1][1:-1] == ["solu", "solu_ln", "gelu"]
    assert counts[0] == f"P13 median of {COUNT}, neurons"
    assert counts[1][1:] == [["3 to 4"], ["9 to 10"], ["33 to 34"], "7.1"]  # 30 / sqrt(3^2 + 3^2)
    assert peaks[0] == "P1 median of max_p, probability"
    assert peaks[1][1:] == [
        ["0 to 1"],
        ["2 to 3"],
        [""],
        "1.4",
    ]  # 2 / sqrt(1 + 1); not measured in gelu


def test_a_probe_without_passed_controls_leads_nothing() -> None:
    assert [*columns([*records(), *passed("engagement")])][1:] == [
        "P1 median of max_p, probability"
    ]
    assert columns(records()) == {}


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
    found = columns([*rows, *untrained, *passed("neuron_statistics")])
    assert found[f"P13 median of {COUNT}, neurons"][1] == ["3 to 4", "untrained 60"]
