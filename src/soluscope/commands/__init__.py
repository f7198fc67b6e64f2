"""The command line: `soluscope train ...` runs train.py of this folder, and so on for every file here."""

from __future__ import annotations

import argparse
import codecs
import io
import sys
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

from soluscope import plugins
from soluscope.errors import UserError
from soluscope.garbage import collect_rarely
from soluscope.terminal import answer, say

PACKAGE = "soluscope.commands"
INTRODUCTION = """\
What does LayerNorm do in SoLU language models? Train small models, probe them, compare them.

commands ('soluscope COMMAND --help' explains one):
"""


class Parser(argparse.ArgumentParser):
    """A command's parser: flags, and words such as `train.steps=200` that a configuration reads."""

    def __init__(self, doc: str | None, keys: Callable[[], str] = str) -> None:
        """Describe a command.

        Args:
            doc: docstring of the command's module.
            keys: returns the configuration's keys with their defaults and meanings, one per line. Only
                --help calls it.
        """
        super().__init__(
            usage=argparse.SUPPRESS,
            description=doc,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self._keys = keys

    def format_help(self) -> str:
        """Return the help text, with the configuration's keys at the end."""
        return f"{super().format_help()}\n{self._keys()}".rstrip() + "\n"

    def error(self, message: str) -> NoReturn:
        """Refuse a command line in one line."""
        raise UserError(f"{message}; --help lists the flags and keys")


@dataclass(frozen=True)
class Command:
    """One command of `soluscope`."""

    build_parser: Callable[[], Parser]
    """The first line of the parser's description is the summary."""
    run: Callable[[list[str]], None]
    """Runs it with the words after its name."""

    @property
    def summary(self) -> str:
        return str(self.build_parser().description).splitlines()[0]


def main() -> NoReturn:
    """Run the command that the first word names: `soluscope train variant=solu_ln`."""
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in {"-h", "--help"}:
        run_command(lambda _: answer(*introduction().rstrip("\n").split("\n")), arguments)
    if name == "--print-completion":
        run_command(_print_completion, arguments)
    run(name, arguments)


def run(name: str, arguments: list[str] | None = None) -> NoReturn:
    """Run one command and exit.

    Args:
        name: a file of this folder.
        arguments: the words after the command's name; None for the process's own.
    """

    run_command(
        lambda words: plugins.pick(PACKAGE, name).run(words),
        sys.argv[1:] if arguments is None else arguments,
    )


def run_command(command: Callable[[list[str]], None], arguments: list[str]) -> NoReturn:
    """Call `command(arguments)` and exit; a UserError is one line on stderr and exit status 2."""
    collect_rarely()
    codecs.register_error("spelled out", _spelled_out)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="spelled out")
    try:
        command(arguments)
    except UserError as error:
        say(f"error: {error}")
        sys.exit(2)
    except KeyboardInterrupt:
        say("interrupted; the same command resumes from here")
        sys.exit(130)
    sys.exit(0)


def _spelled_out(error: UnicodeError) -> tuple[str, int]:
    """Return ASCII for characters that a terminal's encoding lacks: `...` for an ellipsis, `?` without a form."""
    assert isinstance(error, UnicodeEncodeError)
    characters = unicodedata.normalize("NFKD", error.object[error.start : error.end])
    return characters.encode("ascii", "replace").decode(), error.end


def introduction() -> str:
    """Return the text of `soluscope --help`: each command with its summary."""
    lines = [
        f"  {name:<8} {plugins.pick(PACKAGE, name).summary}" for name in plugins.names(PACKAGE)
    ]
    return (
        INTRODUCTION + "\n".join(lines) + "\n\nShell completion: --print-completion bash or zsh\n"
    )


def _print_completion(arguments: list[str]) -> None:
    """Print a completion script for the shell that the only word names."""
    import shtab

    if len(arguments) != 1 or arguments[0] not in shtab.SUPPORTED_SHELLS:
        raise UserError(f"--print-completion takes one of: {', '.join(shtab.SUPPORTED_SHELLS)}")
    tree = argparse.ArgumentParser(prog="soluscope")
    branches = tree.add_subparsers()
    for name in plugins.names(PACKAGE):
        command = plugins.pick(PACKAGE, name)
        branches.add_parser(
            name, parents=[command.build_parser()], add_help=False, help=command.summary
        )
    answer(*shtab.complete(tree, arguments[0]).split("\n"))
