"""Run the unfinished jobs of a sweep, then probe and report its study.

    soluscope sweep variants study=first engine=ray eval.n_tokens=4000
    soluscope sweep my_sweep.yaml study=first --dry-run
    soluscope sweep --status runs/first

Arguments are a sweep and settings, as key=value. A sweep is a file, or the name of one that ships with
soluscope: {shipped}. Keys that are not listed below are
settings of every run (soluscope train --help).
The same command resumes an interrupted sweep. Finished jobs are not run again.
"""

from __future__ import annotations

from pathlib import Path

from soluscope.commands import Command, Parser
from soluscope.launching import jobs, launch
from soluscope.launching.sweep import find_sweep, shipped_sweeps
from soluscope.reading import is_path


def build_parser() -> Parser:
    """Return the parser of `soluscope sweep`."""
    doc = __doc__.format(shipped=", ".join(shipped_sweeps()))
    parser = Parser(doc, launch.launch_help)
    parser.add_argument("words", nargs="*", help="a sweep, and key=value")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the jobs, their states, and the tokens and FLOPs to go; then stop",
    )
    parser.add_argument(
        "--status", type=Path, metavar="STUDY", help="show the states of a study's jobs, live in a terminal"
    )  # fmt: skip
    parser.add_argument(
        "--preregister",
        action="store_true",
        help="write the study's plan with a checksum before any run at a reported seed; then stop",
    )
    parser.add_argument("--retry-failed", action="store_true", help="run failed jobs again")
    return parser


def run(arguments: list[str]) -> None:
    """Run `soluscope sweep`."""
    options = build_parser().parse_intermixed_args(arguments)
    if options.status is not None:
        if options.words or options.dry_run or options.retry_failed or options.preregister:
            build_parser().error(
                "--status takes a study and nothing else, as in: --status runs/first"
            )
        jobs.follow(options.status)
        return
    if options.preregister and options.dry_run:
        build_parser().error(
            "--preregister writes the plan and --dry-run writes nothing: give one of them"
        )
    sweeps = [word for word in options.words if is_path(word)]
    if len(sweeps) != 1:
        build_parser().error(f"{len(sweeps)} sweeps given, wanted one, as in: soluscope sweep demo")
    words = [word for word in options.words if word not in sweeps]
    path = find_sweep(sweeps[0])
    launch.launch(path, words, options.dry_run, options.retry_failed, options.preregister)


COMMAND = Command(build_parser, run)
