"""Compute automatic proxies for people's ratings of neurons, and how well each finds known answers.

    soluscope proxy runs/first
    soluscope proxy runs/first n_neurons=200 stages=[post]
    soluscope proxy runs/first lm_url=http://127.0.0.1:8080/v1 lm_model=NAME

A proxy is not a rating. The command needs stored neurons: 'soluscope neurons runs/first' makes them. It asks no
language model without lm_url=. After 'soluscope rate', the same command compares the proxies with people's answers.
"""

from __future__ import annotations

from pathlib import Path

from soluscope.commands import Command, Parser
from soluscope.config import load_typed
from soluscope.config_help import help_lines
from soluscope.errors import UserError
from soluscope.rating.settings import ProxyConfig


def build_parser() -> Parser:
    """Return the parser of `soluscope proxy`."""
    parser = Parser(__doc__, lambda: "\n".join(help_lines(ProxyConfig)))
    parser.add_argument("study", type=Path, help="folder of a study with stored neurons")
    parser.add_argument("words", nargs="*", default=[], help="key=value")
    return parser


def run(arguments: list[str]) -> None:
    """Run `soluscope proxy`."""
    options = build_parser().parse_intermixed_args(arguments)
    config = load_typed(ProxyConfig, options.words)
    if not options.study.is_dir():
        raise UserError(f"no folder {options.study}: name a study, as in runs/demo")
    # Imported late, so that mistakes are answered at once.
    from soluscope.rating import records

    records.publish_proxies(options.study, config)


COMMAND = Command(build_parser, run)
