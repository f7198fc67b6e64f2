"""The terminal: only this module writes to it.

Names and messages come from files of other people. A control character in them could hide text, forge lines, or
change the terminal itself, so each character that cannot be seen is shown as an escape, such as `\\x1b`.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.console import Console


def answer(*lines: str) -> None:
    """Print the result of a command on stdout, each text on one line."""
    for line in lines:
        _print(line, sys.stdout)


def say(*lines: str) -> None:
    """Print messages for the user on stderr, each text on one line."""
    for line in lines:
        _print(line, sys.stderr)


def _print(line: str, stream: TextIO) -> None:
    """Print a text on one line. If the reader of a pipe has left, as `head` does, discard all text from now on."""
    try:
        print(shown(line), file=stream, flush=True)
    except BrokenPipeError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def console(stderr: bool = False, width: int | None = None) -> Console:
    """Return rich's console for stdout or stderr. It shows text as `say` does, and takes no text for markup."""
    from rich.console import Console
    from rich.segment import Segment

    class Escaping(Console):
        def render(self, *renderable: Any, **options: Any) -> Any:
            for segment in super().render(*renderable, **options):
                if segment.control or segment.text.isprintable():
                    yield segment
                else:
                    lines = segment.text.split("\n")
                    yield Segment("\n".join(map(shown, lines)), segment.style)

    # In a notebook, as in a file: one line per finished run, since bars would need ipywidgets.
    jupyter: dict[str, Any] = (
        {"force_jupyter": False, "force_terminal": sys.stderr.isatty()} if stderr else {}
    )
    return Escaping(stderr=stderr, width=width, markup=False, emoji=False, **jupyter)


def shown(text: str) -> str:
    """Return text with escapes for characters that cannot be seen, line ends included; tabs are kept."""
    if text.isprintable():
        return text
    return "".join(c if c == "\t" or c.isprintable() else escape(c) for c in text)


def escape(character: str) -> str:
    """Return a character's escape: `\\u200d`, or `\\xe4` for a byte that is only a part of a character."""
    if "\udc80" <= character <= "\udcff":
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()
