"""The one exception that a user is meant to read."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NoReturn


class UserError(Exception):
    """Something the user can put right. One line: what came, what was wanted, which knob to turn."""


class Stopped(UserError):
    """A run was stopped by what is not its own: a full disk, a lost machine. The same command goes on."""


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
