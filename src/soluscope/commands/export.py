"""Export a finished run with a model card, so that others can load it; with --push, upload it.

    soluscope export runs/demo/solu_ln-s0 out/
    soluscope export runs/demo/solu_ln-s0 out/ --push user/name

The export holds the run's settings without the folders of this machine. --push needs a token (HF_TOKEN, or
'hf auth login'). It creates a public repository if none exists, and replaces an earlier export in one commit.
"""

from __future__ import annotations

from pathlib import Path

from soluscope.commands import Command, Parser
from soluscope.terminal import answer


def build_parser() -> Parser:
    """Return the parser of `soluscope export`."""
    parser = Parser(__doc__)
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("out", type=Path, help="a new folder")
    parser.add_argument("--push", metavar="USER/NAME", help="upload to this repository of the hub")
    return parser


def run(arguments: list[str]) -> None:
    """Run `soluscope export`."""
    options = build_parser().parse_intermixed_args(arguments)
    from soluscope.export import export  # imported late, so that --help answers at once

    obstacle, url = export(options.run, options.out, options.push)
    answer(f"{options.run} is exported to {options.out}")
    if obstacle:
        answer(f"only soluscope loads it: {obstacle}")
    if url:
        answer(f"pushed: {url}")


COMMAND = Command(build_parser, run)
