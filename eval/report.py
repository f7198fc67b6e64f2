"""Make a study's report from its results.jsonl alone; with --wandb, its dashboard too.

python eval/report.py runs/demo
python eval/report.py runs/demo --wandb entity/project
python eval/report.py runs/demo --wandb entity/project --dry-run    # prints the dashboard, sends nothing
"""

from pathlib import Path

from soluscope.errors import UserError, run_command


def main(arguments: list[str]) -> None:
    if "--help" in arguments:
        print(__doc__)
        return
    place = None
    rest = [word for word in arguments if word != "--dry-run"]
    if "--wandb" in rest:
        at = rest.index("--wandb")
        place = next(iter(rest[at + 1 :]), "")
        rest = rest[:at] + rest[at + 2 :]
    unknown = [word for word in rest if word.startswith("--")]
    if unknown:
        raise UserError(
            f"no flag {unknown[0]}: there are --wandb entity/project, --dry-run, --help"
        )
    if len(rest) != 1:
        raise UserError(
            f"{len(rest)} words given, wanted one folder, as in: python eval/report.py runs/demo"
        )
    if "--dry-run" in arguments and place is None:
        raise UserError("--dry-run shows what --wandb would save: give --wandb entity/project too")
    from soluscope.report import dashboard, publish

    folder = Path(rest[0])
    where = None if place is None else dashboard.place(place)
    if where and "--dry-run" in arguments:
        print(dashboard.preview(folder, where))
        return
    if where:
        dashboard.sign_in()
    print(f"report: {publish(folder)}")
    if where:
        print(f"dashboard: {dashboard.publish(folder, where)}")


if __name__ == "__main__":
    run_command(main)
