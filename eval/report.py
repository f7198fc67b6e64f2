"""Make a study's report from its results.jsonl alone.

python eval/report.py runs/demo
"""

from pathlib import Path

from soluscope.errors import UserError, run_command


def main(arguments: list[str]) -> None:
    if "--help" in arguments:
        print(__doc__)
        return
    if len(arguments) != 1:
        raise UserError(
            f"{len(arguments)} words given, wanted one folder, as in: python eval/report.py runs/demo"
        )
    from soluscope.report import publish

    print(f"report: {publish(Path(arguments[0]))}")


if __name__ == "__main__":
    run_command(main)
