"""A study for a paper: its main figures as images, its tables as CSV and LaTeX, a methods paragraph, references.

    figures=DIR   one .svg and .png per figure, and captions.md
    tables=DIR    one .csv and .tex per table, methods.tex, references.bib

The paragraph is LaTeX, like the tables: \\input takes it over, and its citations are the keys of references.bib.
Each folder is new, and is complete or absent.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from soluscope.errors import UserError
from soluscope.files import replacing_folder, write_text
from soluscope.report import images, latex, names, paragraph, tables
from soluscope.results import Record


def check(figures: Path | None, tables: Path | None) -> None:
    """Refuse folders that exist or contain each other, and figures that cannot be drawn here.

    Raises:
        UserError: naming the folder, or the missing program.
    """
    for folder in (figures, tables):
        if folder is None:
            continue
        if folder.is_symlink() or (
            folder.exists() and not (folder.is_dir() and not any(folder.iterdir()))
        ):
            raise UserError(
                f"{folder} exists already: name a new folder, or delete the existing one"
            )
    if figures is not None and tables is not None:
        one, other = figures.resolve(), tables.resolve()
        if one.is_relative_to(other) or other.is_relative_to(one):
            raise UserError(
                f"figures={figures} and tables={tables} overlap: name two separate folders"
            )
    if figures is not None:
        images.check()


def write(records: Sequence[Record], figures: Path | None, tables: Path | None) -> list[Path]:
    """Write the folders that are not None, and return them.

    Raises:
        UserError: if a figure cannot be drawn, or a file cannot be written. Neither folder exists then.
    """
    arms = names.arms(records)
    named = names.named(records)
    identifiers = {name: arm for arm, name in arms.items()}
    with ExitStack() as folders:
        if tables is not None:
            _write_tables(folders.enter_context(_whole(tables)), named, identifiers)
        if figures is not None:
            chosen = images.choose(named, identifiers)
            images.write(folders.enter_context(_whole(figures)), chosen)
    return [folder for folder in (figures, tables) if folder is not None]


def _write_tables(folder: Path, records: list[Record], identifiers: dict[str, str]) -> None:
    for table in tables.build(records, identifiers):
        write_text(folder / f"{table.name}.csv", table.csv())
        write_text(folder / f"{table.name}.tex", table.tex())
    made = paragraph.tex(paragraph.sentences(records))
    write_text(folder / "methods.tex", f"{latex.PACKAGES}\n{made}")
    write_text(folder / "references.bib", paragraph.bibtex(records))


@contextmanager
def _whole(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder. At the end it is renamed to `folder`; after an error it is removed."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with replacing_folder(folder.resolve()) as beside:
            yield beside
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error}") from error
