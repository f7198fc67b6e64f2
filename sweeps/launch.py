"""Train a grid of runs from a sweep file, one after another, then probe and report them.

    python sweeps/launch.py sweeps/demo.yaml study=mine train.steps=2000 eval.n_tokens=4000

Words are the sweep file and key=value, which go to every run; those with `eval.` before them go to
the evaluation. What is finished is not trained again.
"""

from pathlib import Path

from soluscope.errors import UserError, run_command
from soluscope.sweep import run


def main(arguments: list[str]) -> None:
    if "--help" in arguments:
        print(__doc__)
        return
    files = [word for word in arguments if "=" not in word]
    if len(files) != 1:
        raise UserError(
            f"{len(files)} sweep files given, wanted one, as in: python sweeps/launch.py sweeps/demo.yaml"
        )
    page = run(Path(files[0]), [word for word in arguments if "=" in word])
    print(f"report: {page}")


if __name__ == "__main__":
    run_command(main)
