"""Whether a probe can be believed: what it found on models whose answer is known.

Source: science.md sections 5 ("Null calibration") and 7 ("Control pass rule").
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
"""Controls side by side in a terminal of 80 columns, so that the names of probes fit beside them."""

Standing = Literal["passed", "failed", "not run"]


def gates(records: Iterable[Record], probe: str) -> dict[str, list[GateResult]]:
    """Return a probe's gate results by control, in the order of the controls' sections."""
    result: dict[str, list[GateResult]] = {}
    for gate in sorted(of_kind(records, GateResult), key=_by_section):
        if gate.probe == probe:
            result.setdefault(gate.control, []).append(gate)
    return result


def standing(records: Iterable[Record], probe: str) -> Standing:
    """Return whether a probe passed its controls: only where it has some, and passed all of them."""
    results = [gate for gate in of_kind(records, GateResult) if gate.probe == probe]
    if not results:
        return "not run"
    return "passed" if all(gate.passed for gate in results) else "failed"


def failures(records: Iterable[Record], probe: str) -> list[str]:
    """Return the controls that a probe failed."""
    return [name for name, results in gates(records, probe).items() if failed(results)]


def failed(gates: Iterable[GateResult]) -> bool:
    """Return whether any of the gates was failed."""
    return not all(gate.passed for gate in gates)


def sign(gates: Iterable[GateResult]) -> str:
    """`C+` where the probe must find something, `C-` where it must find nothing, or both."""
    signs = {gate.sign for gate in gates}
    labels = (("positive", "C+"), ("negative", "C-"))
    return "/".join(label for sign, label in labels if sign in signs)


def asked(gate: GateResult) -> str:
    """A gate's verdict, what was asked, and its note."""
    note = f"; {gate.note}" if gate.note else ""
    return f"{_verdict(gate.passed)}: {gate.asked}{note}"


def line(gate: GateResult) -> str:
    """A gate in words: what was measured, the number and its interval, what was asked."""
    return f"{gate.measured}: {estimate(gate)} {gate.unit}; {asked(gate)}"


def _verdict(passed: bool) -> str:
    return "pass" if passed else "FAIL"


def false_positives(records: Iterable[Record], probe: str) -> list[FalsePositives]:
    """Return how often a probe's test finds something where there is nothing, by source."""
    return [each for each in of_kind(records, FalsePositives) if each.probe == probe]


def rate(of: FalsePositives) -> str:
    """A rate of false positives in words."""
    if of.value is None:
        return f"{of.source}: {of.note}"
    return f"{of.source}: {estimate(of)} of {of.n} draws; {_rated(of)}"


def _rated(of: FalsePositives) -> str:
    verdict = "" if of.passed is None else _verdict(of.passed)
    return ": ".join(part for part in (verdict, of.note) if part)


def summary(records: Sequence[Record]) -> str:
    """One line: how many probes ran on controls, and which failed what."""
    probes = _probes(records)
    if not probes:
        return "controls: none run"
    count = f"controls: {len(probes)} probe{'s'[: len(probes) != 1]}"
    wrong = [f"{name} ({', '.join(bad)})" for name in probes if (bad := failures(records, name))]
    return f"{count}, {len(wrong)} failed: {', '.join(wrong)}" if wrong else f"{count}, all passed"


def matrix(records: Sequence[Record]) -> Group:
    """For the terminal: probe x control with pass or fail, then the numbers of what failed.

    Controls head the columns by their number in science.md section 6, with a key below; those that do
    not fit beside the others are a table of their own.

    Args:
        records: gate results, rates of false positives, and the probes' words.
    """
    from rich.console import Group
    from rich.text import Text

    parts: list[ConsoleRenderable] = []
    if probes := _probes(records):
        by_section = sorted(of_kind(records, GateResult), key=_by_section)
        controls = list(dict.fromkeys((gate.control, gate.section) for gate in by_section))
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
    """The matrix for some of the controls, given by name and section."""
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
    """Probes that ran on controls, in the order of their sections."""
    return in_order(records, {gate.probe for gate in of_kind(records, GateResult)})


def words_of(records: Iterable[Record], probe: str) -> ProbeWords | None:
    """Return what a probe says of itself; None where no words are stored with its numbers."""
    return next((words for words in of_kind(records, ProbeWords) if words.probe == probe), None)


def in_order(records: Sequence[Record], probes: Iterable[str]) -> list[str]:
    """Sort probes as science.md does; those without stored words come last."""
    return sorted(probes, key=lambda probe: (_number(_section(records, probe)), probe))


def _section(records: Iterable[Record], probe: str) -> str:
    """`P4`; empty where no words are stored."""
    words = words_of(records, probe)
    return words.section if words else ""


def _by_section(gate: GateResult) -> tuple[int, str]:
    return _number(gate.section), gate.control


def _number(section: str) -> int:
    """The number in `P11` or `C3`; where there is none, one that sorts last."""
    digits = re.match(r"[PC](\d+)", section)
    return int(digits[1]) if digits else 999
