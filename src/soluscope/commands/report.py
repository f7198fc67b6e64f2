"""Write a study's report from its results.jsonl; with --wandb, save its dashboard too.

soluscope report runs/demo
soluscope report runs/demo out=mine
soluscope report runs/demo --figures paper/figures --tables paper/tables
soluscope report runs/demo --wandb entity/project
soluscope report runs/demo --wandb entity/project --dry-run
"""

from __future__ import annotations

from pathlib import Path

from soluscope.commands import Command, Parser
from soluscope.config import ReportConfig, load_typed
from soluscope.config_help import help_lines
from soluscope.terminal import answer
from soluscope.wandb_client import place


def build_parser() -> Parser:
    """Return the parser of `soluscope report`."""
    parser = Parser(__doc__, lambda: "\n".join(help_lines(ReportConfig)))
    parser.add_argument("study", type=Path, help="folder of a probed study")
    parser.add_argument("words", nargs="*", default=[], help="key=value")
    parser.add_argument(
        "--figures", metavar="DIR", type=Path, help="as figures=DIR: main figures as SVG and PNG"
    )
    parser.add_argument(
        "--tables", metavar="DIR", type=Path, help="as tables=DIR: tables and methods for a paper"
    )
    parser.add_argument("--wandb", metavar="ENTITY/PROJECT", help="save the dashboard there")
    parser.add_argument("--dry-run", action="store_true", help="print what --wandb would save")
    return parser


def run(arguments: list[str]) -> None:
    """Run `soluscope report`."""
    options = build_parser().parse_intermixed_args(arguments)
    if options.dry_run and options.wandb is None:
        build_parser().error(
            "--dry-run needs --wandb entity/project: it prints what --wandb would save"
        )
    config = load_typed(ReportConfig, options.words)
    from soluscope.report import dashboard, publish

    out, figures, tables = (
        None if each is None else Path(each)
        for each in (config.out, options.figures or config.figures, options.tables or config.tables)
    )
    where = None if options.wandb is None else place("--wandb ", options.wandb)
    if where and options.dry_run:
        answer(*dashboard.preview(options.study, where).split("\n"))
        return
    if where:
        dashboard.sign_in()
    answer(f"report: {publish(options.study, out, figures, tables)}")
    for name, folder in (("figures", figures), ("tables", tables)):
        if folder:
            answer(f"{name}: {folder}")
    if where:
        answer(f"dashboard: {dashboard.publish(options.study, where)}")


COMMAND = Command(build_parser, run)
