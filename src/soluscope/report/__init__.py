"""From rows to a page and a terminal table. Reads stored rows only; never sees a model.

`build` writes the page; `table` and `matrix` are for the terminal; `figures.draw` draws one figure of
a probe.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from soluscope import results
from soluscope.files import write_text
from soluscope.report import controls, page, words
from soluscope.report.controls import matrix
from soluscope.report.findings import (
    NORMED,
    Choice,
    arms_of,
    by_kappa,
    choices,
    comparisons,
    engagement,
    estimate,
    sizes,
    span,
    tuned,
)
from soluscope.results import Row

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

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
    """For the terminal: one line an arm, what was chosen, the doses, the controls, the headline sentences."""
    from rich.console import Group
    from rich.text import Text

    compared = tuned(rows)
    tables = [made for size, mine in sizes(compared).items() for made in _of_size(size, mine)]
    passed = Text(controls.summary(rows))
    said = [f"- {one}" for one in words.in_view(words.headline(rows), page.N_SENTENCES)]
    return Group(*tables, *_chosen(rows), passed, *map(Text, said))


def _of_size(size: str, rows: list[Row]) -> Iterator[Table]:
    """The losses of a size's arms; and what LayerNorm does at each kappa, where there are several."""
    references = arms_of(rows, NORMED)
    kappas = by_kappa(rows)
    if kappas:
        references = []  # a column each would leave the others no room; they have a table of their own
    lines = []
    for row in comparisons(rows, "loss"):
        differences = (
            comparisons(rows, "difference", arm=row.arm, group=f"minus {reference}")
            for reference in references
        )
        lines.append(
            [
                row.arm,
                str(row.n),
                estimate(row, decimals=4),
                *(estimate(found[0], decimals=4) if found else "" for found in differences),
                span([r.value for r in engagement(rows, row.arm, "not BOS")]),
            ]
        )
    heads = ["arm", "seeds", "loss, nats / token", *(f"minus {a}" for a in references), "median r"]
    if lines:
        yield _table(heads, lines, size)
    terms = {"gain of LN": 4, "static - LN": 4, "Phi_dyn": 2}
    if kappas:
        doses = [
            [
                f"{kappa:.3g}",
                *(
                    estimate(found[0], decimals) if found else ""
                    for term, decimals in terms.items()
                    for found in [comparisons(rows, term, arm=arm)]
                ),
            ]
            for arm, kappa in kappas.items()
        ]
        yield _table(["kappa", *terms], doses, size)


def _chosen(rows: list[Row]) -> Iterator[Table]:
    """Which rate and which gain each arm was given on the select split, and from what."""
    made = choices(rows)
    lines = [
        [
            one.chosen.arm,
            f"{one.setting} {one.chosen.x:.3g}",
            one.grid,
            str(one.chosen.n),
            _place(one),
        ]
        for one in made
    ]
    if lines:
        yield _table(["chosen on the select split", "", "of", "seeds", "optimum"], lines)


def _place(one: Choice) -> str:
    if not one.is_grid:
        return "no grid"
    return f"AT THE {one.edge.upper()} EDGE" if one.edge else "inside"


def _table(heads: Sequence[str], lines: Iterable[Sequence[str]], title: str = "") -> Table:
    """A table whose cells are text as it is: rich would read markup in names."""
    from rich.table import Table
    from rich.text import Text

    made = Table(title=Text(title) if title else None, title_justify="left")
    for heading in heads:
        made.add_column(Text(heading))
    for line in lines:
        made.add_row(*map(Text, line))
    return made
