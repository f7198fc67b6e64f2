"""Text and tables as LaTeX. Text that comes from data is escaped, so that it cannot contain a command."""

from __future__ import annotations

import re
from collections.abc import Sequence

from soluscope.terminal import shown

SPECIAL = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "_": r"\_",
    "%": r"\%", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}",
    ">": r"\textgreater{}", "|": r"\textbar{}", '"': r"\textquotedbl{}", "[": "{[}", "]": "{]}", "*": "{*}",
}  # fmt: skip
"""Characters that LaTeX interprets. A bracket or a star after the end of a table's line would be an argument."""
LONG = 40
"""Number of characters from which a column's text is broken into lines."""
N_ON_A_PAGE = 40
"""Largest number of lines of a table that stays on one page."""
PACKAGES = r"% Needs \usepackage{booktabs,longtable} and \usepackage[T1]{fontenc}."


def escape(text: str) -> str:
    """Return text as LaTeX prints it, on one line; characters that cannot be seen are shown as escapes."""
    seen = shown(" ".join(text.split()))
    escaped = "".join(SPECIAL.get(character, character) for character in seen)
    return re.sub("-(?=-)", "-{}", escaped)  # two hyphens would become a dash


def numbers(text: str) -> str:
    """Return a text of numbers as LaTeX, with minus signs in place of hyphens."""
    return re.sub(r"(?<![\w.])-(?=[\d.])", "$-$", escape(text))


def table(
    name: str,
    caption: str,
    heads: Sequence[str],
    lines: Sequence[Sequence[str]],
    is_number: Sequence[bool],
) -> str:
    """Return a table with the rules of booktabs; a table that does not fit on a page is a longtable.

    Args:
        name: end of the table's label.
        caption: text above the table.
        heads: heading of each column.
        lines: cells as text.
        is_number: True for each column of numbers.
    """
    longest = [max(len(line[i]) for line in [heads, *lines]) for i in range(len(heads))]
    columns = "".join(r"p{4cm}" if length > LONG else "l" for length in longest)
    rows = [
        " & ".join(
            numbers(cell) if number else escape(cell)
            for cell, number in zip(line, is_number, strict=True)
        )
        + r" \\"
        for line in lines
    ]
    above = rf"\caption{{{escape(caption)}}}\label{{tab:{name}}}"
    head = [r"\toprule", " & ".join(map(escape, heads)) + r" \\", r"\midrule"]
    if len(lines) > N_ON_A_PAGE:
        begin = [rf"\begin{{longtable}}{{@{{}}{columns}@{{}}}}", above + r" \\", *head, r"\endhead"]
        return "\n".join([PACKAGES, *begin, *rows, r"\bottomrule", r"\end{longtable}", ""])
    begin = [r"\begin{table}", r"\centering", above, rf"\begin{{tabular}}{{@{{}}{columns}@{{}}}}"]
    end = [r"\bottomrule", r"\end{tabular}", r"\end{table}"]
    return "\n".join([PACKAGES, *begin, *head, *rows, *end, ""])
