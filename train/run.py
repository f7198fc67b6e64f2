"""Train one model, or finish one that was interrupted.

    python train/run.py variant=solu_ln seed=1 size=tiny train.steps=200

Words are key=value, or YAML files whose keys come before the command line's.
"""

from soluscope.command import Parser, run_command
from soluscope.config import load_config, to_yaml
from soluscope.config_help import train_help
from soluscope.runs.folder import Run


def main(arguments: list[str]) -> None:
    parser = Parser(__doc__, train_help)
    parser.add_argument("words", nargs="*", help="key=value, or a YAML file")
    parser.add_argument(
        "--cfg", action="store_true", help="print the merged configuration and stop"
    )
    given = parser.parse_intermixed_args(arguments)
    config = load_config(given.words)
    if given.cfg:
        print(to_yaml(config), end="")
        return
    from soluscope.training.run import train  # here, so that the lines above answer at once

    was_done = Run(config.run_dir).is_done()
    run_dir = train(config)
    print(f"{run_dir} {'was finished already' if was_done else 'is finished'}")


if __name__ == "__main__":
    run_command(main)
