"""What the commands share: a parser whose mistakes are one line, and how a command ends."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import NoReturn

from soluscope.errors import UserError


class Parser(argparse.ArgumentParser):
    """A command's parser: flags, and words such as `train.steps=200` that a configuration reads."""

    def __init__(self, doc: str | None, keys: Callable[[], str] = str) -> None:
        """Describe a command.

        Args:
            doc: the script's docstring.
            keys: returns the configuration's keys with their defaults and meanings, one a line; it
                is called for --help alone.
        """
        super().__init__(
            usage=argparse.SUPPRESS,
            description=doc,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self._keys = keys

    def format_help(self) -> str:
        return f"{super().format_help()}\n{self._keys()}".rstrip() + "\n"

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help lists what there is")


def run_command(main: Callable[[list[str]], None]) -> NoReturn:
    """Run a command's `main(arguments)`; a UserError is one line on stderr and exit status 2."""
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
    sys.exit(0)
