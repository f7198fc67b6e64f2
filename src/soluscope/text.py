"""Text as people see it: tokens, and nouns after a number."""

from __future__ import annotations

from rich.cells import cell_len

from soluscope.terminal import escape


def readable(text: str) -> str:
    """Return a token's text with escapes for characters that cannot be seen, such as `\\u200d`, and for bytes
    that are only a part of a character, such as `\\xe4`.

    Tabs and line ends are kept, and so are spaces beside other characters. Spaces alone are written as `\u2423`.
    """
    if not text.strip(" "):
        return text.replace(" ", "\u2423")
    unseen = text.isprintable() and cell_len(text) == 0  # a lone accent, for example
    return "".join(
        c if c in "\t\n" or (c.isprintable() and not unseen) else escape(c) for c in text
    )


def plural(n: int, noun: str) -> str:
    """Return the noun as it stands after the number n: `seed` after 1, `seeds` after any other."""
    return noun if n == 1 else f"{noun}s"


def brief_number(value: float) -> str:
    """Return a setting's value with three significant digits, or four from 1,000 on: `41.9`, `4e-5`, `1541`."""
    return f"{value:.3g}".replace("e-0", "e-") if abs(value) < 1000 else f"{value:.4g}"
