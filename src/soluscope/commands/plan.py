"""Say how many seeds a study needs to detect a difference of .005 nats, from the spread of a finished study.

soluscope plan runs/first
"""

from __future__ import annotations

from pathlib import Path

from soluscope.commands import Command, Parser


def build_parser() -> Parser:
    """Return the parser of `soluscope plan`."""
    parser = Parser(__doc__)
    parser.add_argument("study", type=Path, help="folder of a probed study of two seeds or more")
    return parser


def run(arguments: list[str]) -> None:
    """Run `soluscope plan`."""
    options = build_parser().parse_args(arguments)
    from soluscope.report import plan

    plan.show(options.study)


COMMAND = Command(build_parser, run)
