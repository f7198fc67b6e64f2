"""From records to a page and a terminal table. Reads results.jsonl only; never sees a model.

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
    by_kappa,
    choices,
    comparisons,
    engagement,
    estimate,
    per_token,
    sizes,
    span,
    tuned,
)
from soluscope.results import Grid, Record, Term

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

OPTIMUM = {
    Grid.INSIDE: "inside",
    Grid.LOWER_EDGE: "AT THE LOWER EDGE",
    Grid.UPPER_EDGE: "AT THE UPPER EDGE",
    Grid.TOO_FEW: "no grid",
}
"""Where on its grid the chosen setting lies."""

__all__ = ["build", "matrix", "publish", "table"]


def publish(study_dir: Path) -> Path:
    """Write the report, print its table and headline to the terminal, and return the report's path."""
    from rich.console import Console

    records = results.read(study_dir / "results.jsonl")
    path = _write(study_dir, records)
    Console().print(table(records))
    return path


def build(study_dir: Path) -> Path:
    """Write `study_dir`/report.html from `study_dir`/results.jsonl, and return its path.

    Raises:
        UserError: if there are no results, or the page cannot be written.
    """
    return _write(study_dir, results.read(study_dir / "results.jsonl"))


def _write(study_dir: Path, records: list[Record]) -> Path:
    path = study_dir / "report.html"
    write_text(path, page.render(records))
    return path


def table(records: list[Record]) -> Group:
    """For the terminal: one line an arm, what was chosen, the doses, the controls, the headline sentences."""
    from rich.console import Group
    from rich.text import Text

    tables = [
        each for size, of_one in sizes(tuned(records)).items() for each in _of_size(size, of_one)
    ]
    passed = Text(controls.summary(records))
    sentences = words.in_view(words.headline(records), page.N_SENTENCES)
    return Group(
        *tables, *_chosen(records), passed, *(Text(f"- {sentence}") for sentence in sentences)
    )


def _of_size(size: str, records: list[Record]) -> Iterator[Table]:
    """The losses of a size's arms; and what LayerNorm does at each kappa, where there are several."""
    kappas = by_kappa(records)
    dosed = {arm for of_variant in kappas.values() for arm in of_variant}
    # A column for each kappa would leave the others no room; they have a table of their own.
    references = [arm for arm in per_token(records) if arm not in dosed]
    lines = []
    for row in comparisons(records, Term.LOSS):
        differences = (
            comparisons(records, Term.DIFFERENCE, row.arm, reference) for reference in references
        )
        lines.append(
            [
                row.arm,
                str(row.n),
                estimate(row, decimals=4),
                *(estimate(each[0], decimals=4) if each else "" for each in differences),
                span([r.value for r in engagement(records, row.arm, "not BOS")]),
            ]
        )
    heads = ["arm", "seeds", "loss, nats / token", *(f"minus {a}" for a in references), "median r"]
    if lines:
        yield _table(heads, lines, size)
    decimals = {Term.GAIN: 4, Term.STATIC: 4, Term.SHARE: 2}
    for variant, of_variant in kappas.items():
        doses = [
            [
                f"{kappa:.3g}",
                *(
                    estimate(each[0], places) if each else ""
                    for term, places in decimals.items()
                    for each in [comparisons(records, term, arm)]
                ),
            ]
            for arm, kappa in of_variant.items()
        ]
        title = ", ".join(part for part in (size, variant if len(kappas) > 1 else "") if part)
        yield _table(["kappa", *decimals], doses, title)


def _chosen(records: list[Record]) -> Iterator[Table]:
    """Which rate and which gain each arm was given on the select split, and from what."""
    lines = [
        [at.arm, f"{at.setting} {at.x:.3g}", choice.tried, str(at.n), OPTIMUM[at.grid]]
        for choice in choices(records)
        if (at := choice.chosen).grid
    ]
    if lines:
        yield _table(["chosen on the select split", "", "of", "seeds", "optimum"], lines)


def _table(heads: Sequence[str], lines: Iterable[Sequence[str]], title: str = "") -> Table:
    """A table whose cells are text as it is: rich would read markup in names."""
    from rich.table import Table
    from rich.text import Text

    result = Table(title=Text(title) if title else None, title_justify="left")
    for heading in heads:
        result.add_column(Text(heading))
    for line in lines:
        result.add_row(*map(Text, line))
    return result
