"""Train one model, or finish one that was interrupted.

    python train/run.py variant=solu_ln seed=1 size=tiny train.steps=200

Words are key=value, or YAML files whose keys come before the command line's.
  --cfg   print the merged configuration and stop
  --help  this text and every key, its default and its meaning
"""

from soluscope.config import load_config, to_yaml, train_help
from soluscope.errors import run_command
from soluscope.runs.folder import Run


def main(arguments: list[str]) -> None:
    if "--help" in arguments:
        print(__doc__ + "\n" + train_help())
        return
    config = load_config([word for word in arguments if word != "--cfg"])
    if "--cfg" in arguments:
        print(to_yaml(config), end="")
        return
    from soluscope.training.run import train  # here, so that the lines above answer at once

    was_done = Run(config.run_dir).is_done()
    run_dir = train(config)
    print(f"{run_dir} {'was finished already' if was_done else 'is finished'}")


if __name__ == "__main__":
    run_command(main)
