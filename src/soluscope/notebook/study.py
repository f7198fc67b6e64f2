"""`soluscope.study`: the results of a study as tables and figures."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import fields
from functools import cached_property
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from soluscope import results
from soluscope.errors import UserError
from soluscope.files import check_links
from soluscope.report import sections
from soluscope.report.figures import titled
from soluscope.results import (
    NOT_PROBES,
    Comparison,
    Measurement,
    OfRun,
    R,
    Record,
    Setting,
    TokenValue,
    Untrained,
    of_kind,
)
from soluscope.terminal import shown
from soluscope.text import plural

if TYPE_CHECKING:
    import plotly.graph_objects as go


class Figures(dict[str, Any]):
    """Plotly figures by name. `repr` lists the names, because a study has about a hundred figures."""

    def __missing__(self, name: object) -> go.Figure:
        near = difflib.get_close_matches(str(name), self, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise UserError(
            f"no figure called {name!r:.100}.{hint} list(study.figures) has the {len(self)} names"
        )

    def __repr__(self) -> str:
        return "\n".join(map(shown, self)) or "no figures"


class Study:
    """The results of a study. The tables have one row per record and one column per field of its class.

    `soluscope.results` describes the fields. In the tables, characters that cannot be seen are escapes.
    """

    records: list[Record]
    """All records, also of the kinds that have no table: training curves, gates, choices of settings."""

    def __init__(self, folder: Path) -> None:
        path = folder / "results.jsonl"
        check_links(path, folder)
        self.folder = folder
        self.records = results.read(path)

    def __repr__(self) -> str:
        runs = {each.run for each in self.records if isinstance(each, OfRun)}
        arms = {each.arm for each in self.records if each.arm}
        probes = set(self.probes["probe"])
        counts = ((len(runs), "run"), (len(arms), "arm"), (len(probes), "probe"))
        parts = [f"{n} {plural(n, noun)}" for n, noun in counts]
        return shown(f"Study {self.folder}: {', '.join(parts)}, {len(self.records):,} records")

    @cached_property
    def losses(self) -> pd.DataFrame:
        """Return each run's loss on the report split, in nats per token."""
        of_runs = of_kind(self.records, Measurement)
        return _table([row for row in of_runs if row.probe == "loss"], Measurement)

    @cached_property
    def comparisons(self) -> pd.DataFrame:
        """Return the comparisons of arms; each has one row per `cluster` (new seeds, or new documents)."""
        return _table(of_kind(self.records, Comparison), Comparison)

    @cached_property
    def probes(self) -> pd.DataFrame:
        """Return the probes' numbers on the trained models."""
        of_runs = of_kind(self.records, Measurement)
        return _table([row for row in of_runs if row.probe not in NOT_PROBES], Measurement)

    @cached_property
    def untrained(self) -> pd.DataFrame:
        """Return the probes' numbers before training, and their differences from the trained models'."""
        return _table(of_kind(self.records, Untrained), Untrained)

    @cached_property
    def tokens(self) -> pd.DataFrame:
        """Return the values at each token of the text that the report shows."""
        return _table(of_kind(self.records, TokenValue), TokenValue)

    @cached_property
    def settings(self) -> pd.DataFrame:
        """Return the arms' settings and roles; the settings `values` are columns, and `chain` is text."""
        rows = of_kind(self.records, Setting)
        table = _table(rows, Setting).drop(columns="values")
        table["chain"] = [" -> ".join(shown(step.variant) for step in row.chain) for row in rows]
        named = [{shown(name): value for name, value in row.values.items()} for row in rows]
        values = pd.DataFrame(named, index=table.index)
        return table.join(values[[name for name in values if name not in table]])

    @cached_property
    def figures(self) -> Figures:
        """Return the figures of the report's page by name: the section, then the figure's title if it has one."""
        result = Figures()
        for section in sections.build(self.records):
            for plot in section.plots:
                name = f"{section.name}: {plot.caption}" if plot.caption else section.name
                unique = chain([name], (f"{name} ({n})" for n in count(2)))
                key = next(each for each in unique if each not in result)
                result[key] = titled(plot.figure, name)
        return result


def study(folder: str | Path) -> Study:
    """Read the results of a study.

    Args:
        folder: the study's folder, such as `runs/demo`, with the results.jsonl of `soluscope probe`.

    Returns:
        An object with the DataFrames `losses`, `comparisons`, `probes`, `untrained`, `tokens` and `settings`, the
        plotly `figures` by name, and all `records`.

    Raises:
        UserError: if there are no results, none can be read, or another version wrote them.
    """
    return Study(Path(folder).expanduser())


def _table(rows: Sequence[R], kind: type[R]) -> pd.DataFrame:
    """Return records of one class as a table, also if there are none."""
    names = [field.name for field in fields(kind)]
    return pd.DataFrame(
        [[_cell(getattr(row, name)) for name in names] for row in rows], columns=names
    )


def _cell(value: Any) -> Any:
    """Return a field's value; text gets escapes for characters that cannot be seen, tabs and line ends kept."""
    return "\n".join(map(shown, value.split("\n"))) if type(value) is str else value
