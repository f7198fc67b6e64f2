"""Run a sweep: its jobs that are not done, then the probes and the report.

    python sweeps/launch.py sweeps/variants.yaml study=first engine=ray eval.n_tokens=4000
    python sweeps/launch.py sweeps/variants.yaml study=first --dry-run
    python sweeps/launch.py --status runs/first

Words are a sweep file and key=value; keys that are not below go to every run (train/run.py --help).
The same command goes on where an interrupted one stopped; what is finished is not done again.
"""

from pathlib import Path

from soluscope.command import Parser, run_command
from soluscope.launching import jobs, launch


def main(arguments: list[str]) -> None:
    parser = Parser(__doc__, launch.launch_help)
    parser.add_argument("words", nargs="*", help="a sweep file, and key=value")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the jobs, their states, and the tokens and FLOPs to go; then stop",
    )
    parser.add_argument(
        "--status", type=Path, metavar="STUDY", help="show the states of a study's jobs, live on a terminal"
    )  # fmt: skip
    parser.add_argument("--retry-failed", action="store_true", help="run failed jobs again")
    given = parser.parse_intermixed_args(arguments)
    if given.status is not None:
        if given.words or given.dry_run or given.retry_failed:
            parser.error("--status takes a study and nothing else, as in: --status runs/first")
        jobs.follow(given.status)
        return
    paths = [word for word in given.words if "=" not in word]
    if len(paths) != 1:
        parser.error(
            f"{len(paths)} sweep files given, wanted one, as in: python sweeps/launch.py sweeps/demo.yaml"
        )
    words = [word for word in given.words if "=" in word]
    launch.launch(Path(paths[0]), words, given.dry_run, given.retry_failed)


if __name__ == "__main__":
    run_command(main)
