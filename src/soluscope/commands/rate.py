"""Let people judge a study's neurons blind, in a page on this machine; with --analyse, compute the results.

    soluscope rate runs/first
    soluscope rate runs/first modes=[top,full] stages=[mid,post]
    soluscope rate runs/first --power
    soluscope rate runs/first --analyse

Rating needs stored neurons: 'soluscope neurons runs/first' makes them. The first call draws the plan; later calls
resume it. Several people may rate, one after another or at the same time.
"""

from __future__ import annotations

from pathlib import Path

from soluscope.commands import Command, Parser
from soluscope.config import load_typed
from soluscope.config_help import help_lines
from soluscope.errors import UserError
from soluscope.rating.settings import RatingConfig
from soluscope.terminal import answer


def build_parser() -> Parser:
    """Return the parser of `soluscope rate`."""
    parser = Parser(__doc__, lambda: "\n".join(help_lines(RatingConfig)))
    parser.add_argument("study", type=Path, help="folder of a study with stored neurons")
    parser.add_argument("words", nargs="*", default=[], help="key=value")
    actions = parser.add_mutually_exclusive_group()
    actions.add_argument(
        "--analyse", action="store_true", help="compute the results of the ratings, and stop"
    )
    actions.add_argument(
        "--power",
        action="store_true",
        help="print the differences that n_neurons= can find, and stop",
    )
    return parser


def run(arguments: list[str]) -> None:
    """Run `soluscope rate`."""
    options = build_parser().parse_intermixed_args(arguments)
    config = load_typed(RatingConfig, options.words)
    if not options.study.is_dir():
        raise UserError(f"no folder {options.study}: name a study, as in runs/demo")
    # Imported late, so that mistakes are answered at once.
    if options.power:
        from soluscope.rating import power

        answer(*(power.sentence(config.n_neurons, n_raters) for n_raters in (1, 2, 3)))
    elif options.analyse:
        from soluscope.rating import records

        records.publish(options.study)
    else:
        from soluscope.rating.serve import serve
        from soluscope.rating.source import Stored

        serve(options.study, Stored(options.study), config)


COMMAND = Command(build_parser, run)
