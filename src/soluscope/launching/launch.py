"""From a command's words to a sweep that runs: everything is checked before any job starts.

What is finished is not done again, what was interrupted goes on, and both are read from the run folders.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from soluscope import plugins
from soluscope.config import Config, EvalConfig, differences, load_typed
from soluscope.config_help import help_lines
from soluscope.errors import UserError
from soluscope.launching import jobs
from soluscope.launching.sweep import Sweep, read_sweep
from soluscope.runs.folder import Run
from soluscope.training.processes import launcher
from soluscope.training.wandb_run import check_login


@dataclass(frozen=True)
class LaunchConfig:
    engine: str = "inline"
    """Who runs the jobs: a file in engines/. Its own keys are below."""
    report: bool = True
    """Whether the study is probed and reported after its last job. `eval.*` are eval/run.py's keys."""


@dataclass(frozen=True)
class Evaluate:
    """What follows the last job. Source of each number: the run folders."""

    study_dir: Path
    jobs: tuple[jobs.Job, ...]
    evaluation: EvalConfig
    report: bool

    def __call__(self) -> None:
        """Probe and report, if all jobs are done.

        Raises:
            UserError: naming what failed or is not finished.
        """
        standings = [jobs.standing(self.study_dir, job) for job in self.jobs]
        behind = [
            f"{job.run} ({now.error or now.state})"
            for job, now in zip(self.jobs, standings, strict=True)
            if now.state != "done"
        ]
        if behind:
            failed = any(now.state == "failed" for now in standings)
            raise UserError(
                f"{jobs.counted([now.state for now in standings])}; not done: {'; '.join(behind)}. "
                f"Give the same command again{' with --retry-failed' if failed else ''}, or "
                f"'python eval/run.py {self.study_dir}' for those that are done"
            )
        if not self.report:
            print(f"{self.study_dir}: {jobs.counted([now.state for now in standings])}")
            return
        from soluscope import report
        from soluscope.evaluation import suite

        suite.evaluate(self.study_dir, self.evaluation, jobs.say)
        print(f"report: {report.publish(self.study_dir)}")


def launch(path: Path, words: Sequence[str], dry_run: bool = False, retry: bool = False) -> None:
    """Run a sweep's jobs that are not done, then probe and report the study.

    Args:
        path: a sweep file.
        words: `key=value`: this command's own, the engine's (`ray.cpus=1`), the evaluation's
            (`eval.n_tokens=4000`), and for every run all others.
        dry_run: print the jobs and what they would cost, and stop.
        retry: run failed jobs again; else they stay failed.

    Raises:
        UserError: bad input, before any job starts; or jobs that failed, after the last one.
    """
    if launcher() == "torchrun":
        raise UserError(
            "a sweep is launched once, not by torchrun: leave torchrun out, the sweep starts it for each "
            "job of several train.devices"
        )
    launch_words, others = _pick_out(words, tuple(f"{name}=" for name in ("engine", "report")))
    config = load_typed(LaunchConfig, launch_words)
    evaluating, others = _pick_out(others, ("eval.",))
    evaluation = load_typed(EvalConfig, [w.removeprefix("eval.") for w in evaluating], "eval.yaml")
    engine = plugins.pick("soluscope.engines", config.engine)
    keys, others = _pick_out(
        others, tuple(f"{name}." for name in plugins.names("soluscope.engines"))
    )
    for word in keys:
        if not word.startswith(f"{config.engine}."):
            raise UserError(
                f"{word} is for engine={word.partition('.')[0]}, not engine={config.engine}"
            )
    params = load_typed(engine.params, [word.removeprefix(f"{config.engine}.") for word in keys])
    sweep = read_sweep(path, others)
    listed = [jobs.job_of(run_config) for run_config in sweep.configs]
    _check_study(sweep)
    if dry_run:
        _print_plan(sweep)
        return
    for mode in {run_config.wandb for run_config in sweep.configs}:
        check_login(mode)
    engine.check(params, sweep)
    _prepare(sweep)
    jobs.write_list(sweep.study_dir, sweep.name, listed)
    standings = {job.run: jobs.standing(sweep.study_dir, job) for job in listed}
    jobs.say(f"{sweep.name}: {jobs.counted([now.state for now in standings.values()])}")
    todo = []
    for run_config in sweep.configs:
        state = standings[run_config.run_name].state
        if state == "failed" and retry:
            Run(run_config.run_dir).forget_failure()
        if state != "done" and (state != "failed" or retry):
            todo.append(run_config)
    engine.run(
        sweep, todo, params, Evaluate(sweep.study_dir, tuple(listed), evaluation, config.report)
    )


def launch_help() -> str:
    """Every key of a launch, with its default and meaning."""
    parts = [*help_lines(LaunchConfig)]
    for name in plugins.names("soluscope.engines"):
        lines = list(help_lines(plugins.pick("soluscope.engines", name).params, f"{name}."))
        parts += ["", f"with engine={name}:", *lines] if lines else []
    return "\n".join(parts)


def _pick_out(words: Sequence[str], beginnings: tuple[str, ...]) -> tuple[list[str], list[str]]:
    picked = [word for word in words if word.startswith(beginnings)]
    return picked, [word for word in words if word not in picked]


def _check_study(sweep: Sweep) -> None:
    """Refuse a study of another sweep, and run folders of other configurations, before anything is written."""
    there = jobs.read_list(sweep.study_dir)[0]
    if there not in (None, sweep.name):
        raise UserError(
            f"{sweep.study_dir} is a study of the sweep {there!r}, this is {sweep.name!r}: choose another study="
        )
    for config in sweep.configs:
        run = Run(config.run_dir)
        if not (run.config_file.is_file() and (run.is_done() or run.checkpoint.is_file())):
            continue
        has = run.config
        if config.train.precision == "auto":  # resolved where it ran
            has = replace(has, train=replace(has.train, precision="auto"))
        differing = differences(has, config)
        if differing:
            raise UserError(
                f"{run.dir} is of another configuration ({differing[0]}): choose another study="
            )


def _prepare(sweep: Sweep) -> None:
    """Make the study's tokens and tokenizer, once for all jobs.

    Raises:
        UserError: if the jobs are of several corpora or vocabularies, or a row is longer than a split.
    """
    from soluscope.data.cache import SPLITS, cache_key, prepare, share_with_study

    first = sweep.configs[0]
    for config in sweep.configs:
        if config.tokens.prepared != first.tokens.prepared or (
            first.tokens.prepared is None and cache_key(config) != cache_key(first)
        ):
            raise UserError(
                f"{first.run_name} and {config.run_name} are of other tokens: runs of one study share "
                "data=, corpus.* and tokens.*; make a study of each"
            )
    cache = prepare(first)
    for ctx in sorted({config.model.ctx for config in sweep.configs}):
        for split in SPLITS:
            cache.rows(split, ctx)
    share_with_study(cache, sweep.study_dir)


def _print_plan(sweep: Sweep) -> None:
    """The jobs, where they stand, and their tokens and operations; below, those that are still to go."""
    made = jobs.new_table(f"{sweep.name} in {sweep.study_dir}", "run", "id", "state")
    for heading in ("tokens", "FLOPs"):
        made.add_column(heading, justify="right", no_wrap=True)
    left_tokens = left_flops = 0.0
    states = []
    for config in sweep.configs:
        job = jobs.job_of(config)
        now = jobs.standing(sweep.study_dir, job)
        tokens = job.steps * job.tokens_a_step
        flops = tokens * config.model.training_flops(_d_vocab(config))
        begun = f" {now.step}/{job.steps}" if 0 < now.step < job.steps else ""
        made.add_row(job.run, job.id, now.state + begun, f"{tokens:,}", f"{flops:.2e}")
        states.append(now.state)
        share = 0.0 if now.state == "done" else 1 - now.step / job.steps
        left_tokens, left_flops = left_tokens + share * tokens, left_flops + share * flops
    console = jobs.console()
    console.print(made)
    console.print(
        f"{jobs.counted(states)}; to go: {left_tokens:,.0f} tokens, {left_flops:.2e} FLOPs",
        highlight=False,
    )


def _d_vocab(config: Config) -> int:
    """Entries of the vocabulary: the cache's where it has been made, else what the configuration asks for."""
    from soluscope.data.cache import TokenCache, cache_key

    prepared = config.tokens.prepared
    path = Path(prepared) if prepared else Path(config.tokens.cache_dir) / cache_key(config)
    try:
        d_vocab: Any = TokenCache(path.expanduser()).meta["d_vocab"]
    except (OSError, ValueError, KeyError):
        return config.tokens.d_vocab
    return int(d_vocab)
