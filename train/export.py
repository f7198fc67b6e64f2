"""Write a finished run so that others can load it, with a model card; with --push, to the hub too.

    python train/export.py runs/demo/solu_ln-s0 out/
    python train/export.py runs/demo/solu_ln-s0 out/ --push user/name

config.yaml goes with it as the run has it, with the names of its folders. --push needs a token (HF_TOKEN, or
'hf auth login'), makes the repository, public, if it is not there, and replaces an earlier export in one commit.
"""

from pathlib import Path

from soluscope.errors import UserError, run_command


def main(arguments: list[str]) -> None:
    if "--help" in arguments:
        print(__doc__)
        return
    repo = None
    rest = list(arguments)
    if "--push" in rest:
        at = rest.index("--push")
        repo = next(iter(rest[at + 1 :]), "")
        rest = rest[:at] + rest[at + 2 :]
    if len(rest) != 2:
        raise UserError(
            f"{len(rest)} words given, wanted a run and a new folder, as in: "
            "python train/export.py runs/demo/solu_ln-s0 out/"
        )
    from soluscope.export import export  # here, so that --help answers at once

    run_dir, out = map(Path, rest)
    obstacle, url = export(run_dir, out, repo)
    print(f"{run_dir} is exported to {out}")
    if obstacle:
        print(f"soluscope alone loads it: {obstacle}")
    if url:
        print(f"pushed: {url}")


if __name__ == "__main__":
    run_command(main)
