"""The report of a study, as an HTML page and as tables for the terminal.

Its only input is results.jsonl; it never loads a model. `build` writes the page; `table` and `matrix` are for the
terminal; `figures.draw` draws one figure of a probe; paper.py writes figures and tables for a paper.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from soluscope import results
from soluscope.files import check_links, write_text
from soluscope.report import controls, page, paper, words
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
from soluscope.terminal import console

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

OPTIMUM = {
    Grid.INSIDE: "inside",
    Grid.LOWER_EDGE: "AT THE LOWER EDGE",
    Grid.UPPER_EDGE: "AT THE UPPER EDGE",
    Grid.TOO_FEW: "no grid",
}
"""Texts for the position of the chosen setting on its grid."""

__all__ = ["brief", "build", "matrix", "publish", "table"]


def publish(
    study_dir: Path,
    out: Path | None = None,
    figures: Path | None = None,
    tables: Path | None = None,
) -> Path:
    """Write the report, print its table and headline to the terminal, and return the report's path.

    Args:
        study_dir: folder with results.jsonl.
        out: folder of the report, if not the study's.
        figures: new folder for the main figures as images; None: no images.
        tables: new folder for the tables and the methods paragraph of a paper; None: no such files.
    """
    paper.check(figures, tables)
    records = _read(study_dir)
    paper.write(records, figures, tables)
    path = _write(out or study_dir, records)
    console().print(table(records))
    return path


def brief(folder: Path, study_dir: Path) -> list[str]:
    """Write the report, and return five lines: the answer, how sure it is, and where to read more.

    Args:
        folder: folder with results.jsonl, into which the report is written.
        study_dir: folder of the study's runs, often the same.
    """
    records = _read(folder)
    path = _write(folder, records)
    return [
        f"answer: {' '.join([*words.warnings(records), words.answer(records)])}",
        f"how sure: {'; '.join(words.certainty(records))}. {words.not_shown(records)}".rstrip(),
        f"report: {path}",
        f"table: soluscope report {folder}",
        f"states of the runs: soluscope sweep --status {study_dir}",
    ]


def build(study_dir: Path) -> Path:
    """Write `study_dir`/report.html from `study_dir`/results.jsonl, and return its path.

    Raises:
        UserError: if there are no results, or the page cannot be written.
    """
    return _write(study_dir, _read(study_dir))


def _read(study_dir: Path) -> list[Record]:
    path = study_dir / "results.jsonl"
    check_links(path, study_dir)
    return results.read(path)


def _write(folder: Path, records: list[Record]) -> Path:
    path = folder / "report.html"
    write_text(path, page.render(records))
    return path


def table(records: list[Record]) -> Group:
    """Build the terminal's report: losses by arm, effects by kappa, chosen settings, controls, and headline."""
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
    """Yield a table of a size's losses and, if there are several kappas, one of LayerNorm's effects by kappa."""
    kappas = by_kappa(records)
    dosed = {arm for of_variant in kappas.values() for arm in of_variant}
    # A column for each kappa would be too wide for the terminal, so the kappas have a separate table.
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
    decimals = {Term.BENEFIT: 4, Term.STATIC: 4, Term.SHARE: 2}
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
    """Yield a table of the rate and the gain that were chosen on the select split, with the tried settings."""
    lines = [
        [at.arm, f"{at.setting} {at.x:.3g}", choice.tried, str(at.n), OPTIMUM[at.grid]]
        for choice in choices(records)
        if (at := choice.chosen).grid
    ]
    if lines:
        heads = ["arm", "chosen", "tried", "seeds", "optimum"]
        yield _table(heads, lines, "chosen on the select split")


def _table(heads: Sequence[str], lines: Iterable[Sequence[str]], title: str = "") -> Table:
    """Return a table whose cells are plain text, so that rich does not interpret names as markup."""
    from rich.table import Table
    from rich.text import Text

    result = Table(title=Text(title) if title else None, title_justify="left")
    for heading in heads:
        result.add_column(Text(heading))
    for line in lines:
        result.add_row(*map(Text, line))
    return result
