"""Train one model, or resume an interrupted training.

    soluscope train variant=solu_ln seed=1 size=tiny train.steps=200
    soluscope train variant=solu_ln mid.kappa=0.42 tag=kappa0.42 --cfg

Arguments are settings, as key=value, and YAML files of settings. Later values override earlier ones: first
the defaults below, then the files in configs/ for the variant, the size and the data, then your YAML files,
then key=value. So size=demo, the default, replaces the default of model.d_model. --cfg shows the result.
"""

from __future__ import annotations

from soluscope.commands import Command, Parser
from soluscope.config import load_config, to_yaml
from soluscope.config_help import train_help
from soluscope.memory import check_training
from soluscope.runs.folder import Run
from soluscope.terminal import answer


def build_parser() -> Parser:
    """Return the parser of `soluscope train`."""
    parser = Parser(__doc__, train_help)
    parser.add_argument("words", nargs="*", help="key=value, or a YAML file")
    parser.add_argument(
        "--cfg", action="store_true", help="print the merged configuration and stop"
    )
    return parser


def run(arguments: list[str]) -> None:
    """Run `soluscope train`."""
    options = build_parser().parse_intermixed_args(arguments)
    config = load_config(options.words)
    if options.cfg:
        answer(*to_yaml(config).rstrip("\n").split("\n"))
        return
    check_training(config)
    from soluscope.training.run import train  # imported late, so that mistakes are answered at once

    was_done = Run(config.run_dir).is_done()
    run_dir = train(config)
    answer(f"{run_dir} {'was already finished' if was_done else 'is finished'}")


COMMAND = Command(build_parser, run)
