"""Make a study's report from its results.jsonl alone; with --wandb, its dashboard too.

python eval/report.py runs/demo
python eval/report.py runs/demo --wandb entity/project
python eval/report.py runs/demo --wandb entity/project --dry-run    # prints the dashboard, sends nothing
"""

from pathlib import Path

from soluscope.command import Parser, run_command


def main(arguments: list[str]) -> None:
    parser = Parser(__doc__)
    parser.add_argument("study", type=Path, help="folder of a study that was evaluated")
    parser.add_argument("--wandb", metavar="ENTITY/PROJECT", help="save the dashboard there")
    parser.add_argument("--dry-run", action="store_true", help="print what --wandb would save")
    given = parser.parse_intermixed_args(arguments)
    if given.dry_run and given.wandb is None:
        parser.error("--dry-run shows what --wandb would save: give --wandb entity/project too")
    from soluscope.report import dashboard, publish

    where = None if given.wandb is None else dashboard.place(given.wandb)
    if where and given.dry_run:
        print(dashboard.preview(given.study, where))
        return
    if where:
        dashboard.sign_in()
    print(f"report: {publish(given.study)}")
    if where:
        print(f"dashboard: {dashboard.publish(given.study, where)}")


if __name__ == "__main__":
    run_command(main)
