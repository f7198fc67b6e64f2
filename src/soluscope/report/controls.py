"""Validation of probes: their results on control models, whose answer is known.

Source: protocol.md sections 5 ("Null calibration") and 6 ("Gate rule").
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Literal

from soluscope.report.findings import estimate
from soluscope.results import FalsePositives, GateResult, ProbeWords, Record, of_kind

if TYPE_CHECKING:
    from rich.console import ConsoleRenderable, Group
    from rich.table import Table
    from rich.text import Text

N_COLUMNS = 8
"""Number of controls per table, so that a terminal of 80 columns has room for the names of the probes."""

Standing = Literal["passed", "failed", "not run"]


def gates(records: Iterable[Record], probe: str) -> dict[str, list[GateResult]]:
    """Return a probe's gate results by control, in the order of the controls' sections."""
    result: dict[str, list[GateResult]] = {}
    for gate in sorted(of_kind(records, GateResult), key=by_section):
        if gate.probe == probe:
            result.setdefault(gate.control, []).append(gate)
    return result


def standing(records: Iterable[Record], probe: str) -> Standing:
    """Return `passed` if a probe passed all its controls, `failed` if not, `not run` if it has no results."""
    results = [gate for gate in of_kind(records, GateResult) if gate.probe == probe]
    if not results:
        return "not run"
    return "passed" if all(gate.passed for gate in results) else "failed"


def failures(records: Iterable[Record], probe: str) -> list[str]:
    """Return the controls that a probe failed."""
    return [name for name, results in gates(records, probe).items() if failed(results)]


def failed(gates: Iterable[GateResult]) -> bool:
    """Return whether any of the gates failed."""
    return not all(gate.passed for gate in gates)


def sign(gates: Iterable[GateResult]) -> str:
    """Return `C+` if the probe must find an effect, `C-` if it must find none, or both."""
    signs = {gate.sign for gate in gates}
    labels = (("positive", "C+"), ("negative", "C-"))
    return "/".join(label for sign, label in labels if sign in signs)


def asked(gate: GateResult) -> str:
    """Return a gate's verdict, its requirement and its note."""
    note = f"; {gate.note}" if gate.note else ""
    return f"{_verdict(gate.passed)}: {gate.asked}{note}"


def line(gate: GateResult) -> str:
    """Return a gate as text: the measured quantity, the number with its interval, and the requirement."""
    return f"{gate.measured}: {estimate(gate)} {gate.unit}; {asked(gate)}"


def _verdict(passed: bool) -> str:
    return "pass" if passed else "FAIL"


def false_positives(records: Iterable[Record], probe: str) -> list[FalsePositives]:
    """Return the rates at which a probe's test finds something where there is nothing, by source."""
    return [each for each in of_kind(records, FalsePositives) if each.probe == probe]


def rate(of: FalsePositives) -> str:
    """Return a rate of false positives as text."""
    if of.value is None:
        return f"{of.source}: {of.note}"
    return f"{of.source}: {estimate(of)} over {of.n} draws; {_rated(of)}"


def _rated(of: FalsePositives) -> str:
    verdict = "" if of.passed is None else _verdict(of.passed)
    return ": ".join(part for part in (verdict, of.note) if part)


def summary(records: Sequence[Record]) -> str:
    """Return one line with the number of probes that ran on controls, and the controls that they failed."""
    probes = _probes(records)
    if not probes:
        return "controls: none run"
    count = f"controls: {len(probes)} probe{'s'[: len(probes) != 1]}"
    wrong = [f"{name} ({', '.join(bad)})" for name in probes if (bad := failures(records, name))]
    return f"{count}, {len(wrong)} failed: {', '.join(wrong)}" if wrong else f"{count}, all passed"


def matrix(records: Sequence[Record]) -> Group:
    """Build the terminal's matrix of probes and controls with pass or fail, then the numbers of failed gates.

    Column headings are the controls' numbers in protocol.md section 6, with a key below. Controls that do
    not fit beside each other are spread over several tables.

    Args:
        records: gate results, rates of false positives, and the probes' descriptions.
    """
    from rich.console import Group
    from rich.text import Text

    parts: list[ConsoleRenderable] = []
    if probes := _probes(records):
        gates_in_order = sorted(of_kind(records, GateResult), key=by_section)
        controls = list(dict.fromkeys((gate.control, gate.section) for gate in gates_in_order))
        key = (f"{section} {name}" for name, section in controls)
        parts += [
            *(
                _gates(records, probes, controls[i : i + N_COLUMNS])
                for i in range(0, len(controls), N_COLUMNS)
            ),
            Text(", ".join(key)),
            *(
                Text(f"- {probe} on {gate.control}: {line(gate)}")
                for probe in probes
                for results in gates(records, probe).values()
                for gate in results
                if not gate.passed
            ),
            Text(summary(records)),
        ]
    if tested := of_kind(records, FalsePositives):
        parts.append(_rates(tested))
    return Group(*parts)


def _gates(
    records: Sequence[Record], probes: Sequence[str], controls: Sequence[tuple[str, str]]
) -> Table:
    """Return the part of the matrix for these controls, given by name and section."""
    from rich.text import Text

    result = _table(["", "probe", *(section for _, section in controls)])
    for probe in probes:
        by_control = gates(records, probe)
        if {name for name, _ in controls} & set(by_control):
            cells = (_cell(by_control.get(name)) for name, _ in controls)
            result.add_row(Text(_section(records, probe)), Text(probe), *cells)
    return result


def _rates(tested: Sequence[FalsePositives]) -> Table:
    from rich.text import Text

    result = _table(["false positives of", "on", "rate [95%]", "draws", ""])
    for each in tested:
        cells = (each.probe, each.source, estimate(each), str(each.n), _rated(each))
        result.add_row(*(Text(cell) for cell in cells))
    return result


def _table(heads: Iterable[str]) -> Table:
    from rich.table import Table
    from rich.text import Text

    result = Table(box=None, padding=(0, 1, 0, 0))
    for head in heads:
        result.add_column(Text(head), no_wrap=len(head) <= 3, overflow="fold")
    return result


def _cell(gates: Sequence[GateResult] | None) -> Text:
    from rich.text import Text

    if gates is None:
        return Text("")
    return Text("FAIL", style="bold red") if failed(gates) else Text("pass", style="green")


def _probes(records: Sequence[Record]) -> list[str]:
    """Return the probes that ran on controls, in the order of their sections."""
    return in_order(records, {gate.probe for gate in of_kind(records, GateResult)})


def words_of(records: Iterable[Record], probe: str) -> ProbeWords | None:
    """Return a probe's description, or None without a stored description."""
    return next((words for words in of_kind(records, ProbeWords) if words.probe == probe), None)


def in_order(records: Sequence[Record], probes: Iterable[str]) -> list[str]:
    """Sort probes by their section in protocol.md; probes without a stored description come last."""
    return sorted(probes, key=lambda probe: (_number(_section(records, probe)), probe))


def _section(records: Iterable[Record], probe: str) -> str:
    """Return a probe's section, such as `P4`; empty if no description is stored."""
    words = words_of(records, probe)
    return words.section if words else ""


def by_section(gate: GateResult) -> tuple[int, str]:
    return _number(gate.section), gate.control


def _number(section: str) -> int:
    """Return the number in `P11` or `C3`; without a number, return 999, which sorts last."""
    digits = re.match(r"[PC](\d+)", section)
    return int(digits[1]) if digits else 999
