"""Text of tokens as people see it."""

from __future__ import annotations

from rich.cells import cell_len


def readable(text: str) -> str:
    """Return a token's text with escapes for characters that cannot be seen, such as `\\u200d`, and for bytes
    that are only a part of a character, such as `\\xe4`.

    Tabs and line ends are kept, and so are spaces beside other characters. Spaces alone are written as `\u2423`.
    """
    if not text.strip(" "):
        return text.replace(" ", "\u2423")
    unseen = text.isprintable() and cell_len(text) == 0  # a lone accent, for example
    return "".join(
        c if c in "\t\n" or (c.isprintable() and not unseen) else _escape(c) for c in text
    )


def _escape(character: str) -> str:
    if "\udc80" <= character <= "\udcff":
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()
