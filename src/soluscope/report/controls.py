"""Whether a probe can be believed: what it found on models whose answer is known.

Reads the rows of probe `controls`, one a gate, whose note begins with `pass` or `FAIL`, and those of
`false positives`.

Source: science.md sections 5 ("Null calibration") and 7 ("Control pass rule").
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Literal

from soluscope import plugins
from soluscope.report.findings import estimate
from soluscope.results import Row

if TYPE_CHECKING:
    from rich.console import ConsoleRenderable, Group
    from rich.table import Table
    from rich.text import Text

CONTROLS = "controls"
FALSE_POSITIVES = "false positives"
PACKAGE = "soluscope.controls"
PROBES = "soluscope.probes"
N_COLUMNS = 8
"""Controls side by side in a terminal of 80 columns, so that the names of probes fit beside them."""

Gate = Literal["passed", "failed", "not run"]


def gates(rows: Iterable[Row], probe: str) -> dict[str, list[Row]]:
    """A probe's rows by control, in the order of the controls' sections."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row.probe == CONTROLS and row.quantity == probe:
            found.setdefault(row.group, []).append(row)
    return {name: found[name] for name in sorted(found, key=_by_section)}


def gate(rows: Iterable[Row], probe: str) -> Gate:
    """Passed only where something was asked and all of it held."""
    found = gates(rows, probe)
    if not found:
        return "not run"
    return "failed" if any(failed(those) for those in found.values()) else "passed"


def failures(rows: Iterable[Row], probe: str) -> list[str]:
    """The controls on which a probe failed."""
    return [name for name, found in gates(rows, probe).items() if failed(found)]


def failed(rows: Iterable[Row]) -> bool:
    """What does not say that it passed has failed."""
    return any(not row.note.startswith("pass") for row in rows)


def sign(rows: Iterable[Row]) -> str:
    """`C+` where the probe must find something, `C-` where it must find nothing, or both."""
    negative = {"within" in row.note for row in rows}
    return "/".join(label for is_it, label in ((False, "C+"), (True, "C-")) if is_it in negative)


def line(row: Row) -> str:
    """A gate in words: what was measured, the number and its interval, what was asked."""
    return f"{row.statistic}: {estimate(row)} {row.unit}; {row.note}"


def false_positives(rows: Iterable[Row], probe: str) -> list[Row]:
    return [row for row in rows if row.probe == FALSE_POSITIVES and row.quantity == probe]


def rate(row: Row) -> str:
    """A rate of false positives in words."""
    if row.value is None:
        return f"{row.group}: {row.note}"
    return f"{row.group}: {estimate(row)} of {row.n} draws; {row.note}"


def summary(rows: Sequence[Row]) -> str:
    """One line: how many probes were asked, and which failed what."""
    probes = _probes(rows)
    if not probes:
        return "controls: none run"
    count = f"controls: {len(probes)} probe{'s'[: len(probes) != 1]}"
    wrong = [f"{name} ({', '.join(bad)})" for name in probes if (bad := failures(rows, name))]
    return f"{count}, {len(wrong)} failed: {', '.join(wrong)}" if wrong else f"{count}, all passed"


def matrix(rows: Sequence[Row]) -> Group:
    """For the terminal: probe x control with pass or fail, then the numbers of what failed.

    Controls head the columns by their number in science.md section 6, with a key below; those that do
    not fit beside the others are a table of their own.
    """
    from rich.console import Group
    from rich.text import Text

    parts: list[ConsoleRenderable] = []
    if probes := _probes(rows):
        controls = sorted({row.group for row in rows if row.probe == CONTROLS}, key=_by_section)
        key = (f"{_section(name)} {name}" for name in controls if _section(name))
        parts += [
            *(
                _gates(rows, probes, controls[i : i + N_COLUMNS])
                for i in range(0, len(controls), N_COLUMNS)
            ),
            Text(", ".join(key)),
            *(
                Text(f"- {probe} on {name}: {line(row)}")
                for probe in probes
                for name, found in gates(rows, probe).items()
                for row in found
                if failed([row])
            ),
            Text(summary(rows)),
        ]
    if tested := [row for row in rows if row.probe == FALSE_POSITIVES]:
        parts.append(_rates(tested))
    return Group(*parts)


def _gates(rows: Sequence[Row], probes: Sequence[str], controls: Sequence[str]) -> Table:
    from rich.text import Text

    made = _table(["", "probe", *(_section(name) or name for name in controls)])
    for probe in probes:
        found = gates(rows, probe)
        if set(controls) & set(found):
            cells = (_cell(found.get(name)) for name in controls)
            made.add_row(Text(_section(probe, PROBES)), Text(probe), *cells)
    return made


def _rates(rows: Sequence[Row]) -> Table:
    from rich.text import Text

    made = _table(["false positives of", "on", "rate [95%]", "draws", ""])
    for row in rows:
        cells = (row.quantity, row.group, estimate(row), str(row.n), row.note)
        made.add_row(*(Text(cell) for cell in cells))
    return made


def _table(heads: Iterable[str]) -> Table:
    from rich.table import Table
    from rich.text import Text

    made = Table(box=None, padding=(0, 1, 0, 0))
    for head in heads:
        made.add_column(Text(head), no_wrap=len(head) <= 3, overflow="fold")
    return made


def _cell(found: list[Row] | None) -> Text:
    from rich.text import Text

    if found is None:
        return Text("")
    return Text("FAIL", style="bold red") if failed(found) else Text("pass", style="green")


def _probes(rows: Iterable[Row]) -> list[str]:
    """Probes that were put before controls, in the order of their sections."""
    return sorted({row.quantity for row in rows if row.probe == CONTROLS}, key=by_section)


def by_section(probe: str) -> tuple[int, str]:
    """Sorts probes as science.md does; those that the folder no longer has come last."""
    return _number(_section(probe, PROBES)), probe


def _by_section(control: str) -> tuple[int, str]:
    return _number(_section(control)), control


def _section(name: str, package: str = PACKAGE) -> str:
    """`P4` or `C3`; nothing for what the folder no longer has."""
    return str(plugins.pick(package, name).section) if name in plugins.names(package) else ""


def _number(section: str) -> int:
    """The number in `P11` or `C3`; where there is none, one that sorts last."""
    found = re.match(r"[PC](\d+)", section)
    return int(found[1]) if found else 999
