"""Run a sweep: its jobs that are not done, then the probes and the report.

    python sweeps/launch.py sweeps/variants.yaml study=first engine=ray eval.n_tokens=4000
    python sweeps/launch.py sweeps/variants.yaml study=first --dry-run
    python sweeps/launch.py --status runs/first

Words are a sweep file and key=value; keys that are not below go to every run (train/run.py --help).
The same command goes on where an interrupted one stopped; what is finished is not done again.
  --dry-run       the jobs, where they stand, and the tokens and FLOPs to go; then stop
  --status STUDY  where a study's jobs stand, live on a terminal
  --retry-failed  run jobs again that failed
  --help          this text and every key, its default and its meaning
"""

from pathlib import Path

from soluscope.errors import UserError, run_command
from soluscope.launching import jobs, launch


def main(arguments: list[str]) -> None:
    if "--help" in arguments:
        print(f"{__doc__}\n{launch.launch_help()}")
        return
    flags = {word for word in arguments if word.startswith("--")}
    paths = [word for word in arguments if "=" not in word and word not in flags]
    unknown = sorted(flags - {"--dry-run", "--status", "--retry-failed"})
    if unknown:
        raise UserError(
            f"no flag {unknown[0]}: there are --dry-run, --status, --retry-failed, --help"
        )
    if len(paths) != 1:
        raise UserError(
            f"{len(paths)} sweep files given, wanted one, as in: python sweeps/launch.py sweeps/demo.yaml"
        )
    if "--status" in flags:
        if len(arguments) > 2:
            raise UserError("--status takes a study and nothing else, as in: --status runs/first")
        jobs.follow(Path(paths[0]))
        return
    words = [word for word in arguments if "=" in word]
    launch.launch(Path(paths[0]), words, "--dry-run" in flags, "--retry-failed" in flags)


if __name__ == "__main__":
    run_command(main)
