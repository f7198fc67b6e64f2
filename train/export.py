"""Write a finished run so that others can load it, with a model card; with --push, to the hub too.

    python train/export.py runs/demo/solu_ln-s0 out/
    python train/export.py runs/demo/solu_ln-s0 out/ --push user/name

config.yaml goes with it as the run has it, with the names of its folders. --push needs a token (HF_TOKEN, or
'hf auth login'), makes the repository, public, if it is not there, and replaces an earlier export in one commit.
"""

from pathlib import Path

from soluscope.command import Parser, run_command


def main(arguments: list[str]) -> None:
    parser = Parser(__doc__)
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("out", type=Path, help="a new folder")
    parser.add_argument("--push", metavar="USER/NAME", help="upload it to this repository too")
    given = parser.parse_intermixed_args(arguments)
    from soluscope.export import export  # here, so that --help answers at once

    obstacle, url = export(given.run, given.out, given.push)
    print(f"{given.run} is exported to {given.out}")
    if obstacle:
        print(f"soluscope alone loads it: {obstacle}")
    if url:
        print(f"pushed: {url}")


if __name__ == "__main__":
    run_command(main)
