"""From rows to a page and a terminal table. Reads stored rows only; never sees a model.

`build` writes the page; `table` and `matrix` are for the terminal; `figures.draw` draws one figure of
a probe.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from soluscope import results
from soluscope.files import write_text
from soluscope.report import controls, page, words
from soluscope.report.controls import matrix
from soluscope.report.findings import NORMED, arms_of, comparisons, engagement, estimate, span
from soluscope.results import Row

if TYPE_CHECKING:
    from rich.console import Group

__all__ = ["build", "matrix", "publish", "table"]


def publish(study_dir: Path) -> Path:
    """Write the report and print its table and headline to the terminal; the report's path."""
    from rich.console import Console

    rows = results.read(study_dir / "results.jsonl")
    path = _write(study_dir, rows)
    Console().print(table(rows))
    return path


def build(study_dir: Path) -> Path:
    """Write `study_dir`/report.html from `study_dir`/results.jsonl, and return its path.

    Raises:
        UserError: if there are no results, or the page cannot be written.
    """
    return _write(study_dir, results.read(study_dir / "results.jsonl"))


def _write(study_dir: Path, rows: list[Row]) -> Path:
    path = study_dir / "report.html"
    write_text(path, page.render(rows))
    return path


def table(rows: list[Row]) -> Group:
    """For the terminal: one line an arm, whether the controls passed, and the headline sentences."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    references = arms_of(rows, NORMED)
    made = Table()
    for heading in (
        "arm",
        "seeds",
        "loss, nats / token",
        *(f"minus {a}" for a in references),
        "median r",
    ):
        made.add_column(Text(heading))
    for row in comparisons(rows, "loss"):
        differences = (
            comparisons(rows, "difference", arm=row.arm, group=f"minus {reference}")
            for reference in references
        )
        engaged = engagement(rows, row.arm, "not BOS")
        cells = [
            row.arm,
            str(row.n),
            estimate(row, decimals=4),
            *(estimate(found[0], decimals=4) if found else "" for found in differences),
            span([r.value for r in engaged]),
        ]
        made.add_row(*(Text(cell) for cell in cells))
    passed = Text(controls.summary(rows))
    return Group(made, passed, *(Text(f"- {sentence}") for sentence in words.headline(rows)))
