"""From the words of a command to a running sweep: everything is checked before any job starts.

Finished runs are not repeated, and interrupted runs resume. The run folders show which runs these are.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from soluscope import plugins
from soluscope.config import Config, EvalConfig, check, differences, load_evaluation, load_typed
from soluscope.config_help import help_lines
from soluscope.errors import UserError
from soluscope.launching import jobs, registering
from soluscope.launching.sweep import Sweep, choosing, read_sweep, reporting, searching
from soluscope.report.plan import cannot_reject
from soluscope.runs import registration
from soluscope.runs.claims import apart
from soluscope.runs.folder import Run, check_study_links, lock
from soluscope.terminal import answer, say
from soluscope.text import plural
from soluscope.training.processes import launcher
from soluscope.training.wandb_run import check_login
from soluscope.wandb_client import place

UNFINISHED = ("running", "resume", "waiting")
"""States of jobs that are not done and have not failed."""
MOST_TIMED_FLOPS = 1e12
"""Largest step that is timed on a CPU: some seconds each on one core."""
HELD = ".sweep"
"""Folder in a study whose lock a launch holds until its engine has run the jobs or handed them over."""


@dataclass(frozen=True)
class ToWandb:
    """Things that a launch sends to wandb, beside the curves of the runs."""

    dashboard: str | None = None
    """Entity and project, as in my-team/soluscope, in which the study's dashboard is saved after the report."""

    def __post_init__(self) -> None:
        if self.dashboard is not None:
            place("wandb.dashboard=", self.dashboard)


@dataclass(frozen=True)
class LaunchConfig:
    engine: str = "inline"
    """Engine that runs the jobs: name of a file in engines/. The keys of each engine are listed below."""
    report: bool = True
    """true: each job probes its run, and a report is written. `eval.*` are the keys of `soluscope probe`."""
    depart: str | None = None
    """Reason for launching something else than the study's preregistration; the report lists it. null: refuse."""
    wait: bool = False
    """true: wait while another launch or evaluation of the study is at work. false: refuse."""
    wandb: ToWandb = field(default_factory=ToWandb)

    def __post_init__(self) -> None:
        check(
            self.report or self.wandb.dashboard is None,
            "wandb.dashboard= needs the study's comparison, but report=false: remove one of the two",
        )


@dataclass(frozen=True)
class Evaluate:
    """Work after the last job: comparison and report, and probes of runs that were not probed by their jobs."""

    does: ClassVar[str] = "compares and reports"

    study_dir: Path
    jobs: tuple[jobs.Job, ...]
    evaluation: EvalConfig
    report: bool
    dashboard: str | None = None
    """Entity and project of the study's dashboard in wandb; None: it is not saved."""
    may_diverge: bool = False
    """True in a search, which tries rates that are too high: a diverged run is left out."""

    def to_json(self) -> str:
        """Return this work as one line of JSON, which `after_from_json` reads."""
        return json.dumps(asdict(self) | {"study_dir": str(self.study_dir)})

    def __call__(self) -> None:
        """Probe and report the study if all jobs are done.

        Raises:
            UserError: if jobs have failed or are not finished; the message names them.
        """
        _check_done(self.study_dir, self.jobs, self.may_diverge)
        if not self.report:
            answer(f"{self.study_dir}: {jobs.counted(['done'] * len(self.jobs))}")
            return
        from soluscope import report
        from soluscope.evaluation import suite

        written = suite.evaluate(self.study_dir, self.evaluation, say)
        answer(*report.brief(written.parent, self.study_dir))
        if self.dashboard is not None:
            from soluscope.report import dashboard

            knob = "wandb.dashboard="
            url = dashboard.publish(written.parent, place(knob, self.dashboard), knob)
            answer(f"dashboard: {url}")


@dataclass(frozen=True)
class SecondStage:
    """Work after the jobs at select seeds: further points of a search, or the chosen arms at other seeds."""

    does: ClassVar[str] = "chooses arms and starts their jobs"

    path: Path
    words: tuple[str, ...]
    retry: bool
    plan: _Plan | None = None
    """The plan of the launch in whose process this is called; it holds the study. None on another machine."""

    def to_json(self) -> str:
        """Return this work as one line of JSON, which `after_from_json` reads."""
        return json.dumps({"path": str(self.path), "words": self.words, "retry": self.retry})

    def __call__(self) -> None:
        """Choose arms and train them, if all arms are trained at the select seeds.

        Raises:
            UserError: if jobs have failed or are not finished; the message names them.
        """
        if self.plan is None:
            launch(self.path, self.words, retry=self.retry)
        else:
            _next_stage(self, self.plan, self.retry)


def after_from_json(text: str) -> Evaluate | SecondStage:
    """Return the work that `Evaluate.to_json` or `SecondStage.to_json` has described."""
    values = json.loads(text)
    if "path" in values:
        return SecondStage(Path(values["path"]), tuple(values["words"]), values["retry"])
    return Evaluate(
        Path(values["study_dir"]),
        tuple(jobs.Job(**job) for job in values["jobs"]),
        EvalConfig(**values["evaluation"]),
        values["report"],
        values["dashboard"],
        values["may_diverge"],
    )


@dataclass(frozen=True)
class _Plan:
    """A launch whose words have been read."""

    config: LaunchConfig
    engine: Any
    """`engines.Engine`: engines may import this module, so it may not import them."""
    params: Any
    evaluation: EvalConfig
    sweep: Sweep
    """With select seeds: the arms at the seeds that are reported."""
    first: Sweep | None
    """The arms at the select seeds; None without such seeds. With a search: the points tried and the next ones."""

    @property
    def sweeps(self) -> list[Sweep]:
        return [self.sweep] if self.first is None else [self.first, self.sweep]


def launch(
    path: Path,
    words: Sequence[str],
    dry_run: bool = False,
    retry: bool = False,
    preregister: bool = False,
) -> None:
    """Run the jobs of a sweep that are not done, then probe and report the study.

    With select seeds, the arms are first trained at these seeds. Then the arms with the least loss on the select
    split are trained at the sweep's own seeds.

    Args:
        path: a sweep file.
        words: `key=value` settings of the launch, of the engine (`ray.cpus=1`) and of the evaluation
            (`eval.n_tokens=4000`); all other words apply to every run.
        dry_run: print the jobs with their tokens and FLOPs, and stop.
        retry: run failed jobs again; otherwise they stay failed.
        preregister: write the study's plan with a checksum, and stop. Later launches must follow it.

    Raises:
        Busy: if another launch of the study is at work, unless the words have wait=yes.
        UserError: for bad input, before any job starts; or for failed jobs, after the last job.
    """
    plan = _read(path, words)
    for sweep in plan.sweeps:
        _check_study(sweep)
    if preregister:
        _preregister(plan)
        return
    _check_registration(plan, write=not dry_run)
    if dry_run:
        _print_plan(plan)
        return
    modes = {config.wandb for sweep in plan.sweeps for config in sweep.configs}
    for mode in modes | ({plan.evaluation.wandb} if plan.config.report else set()):
        check_login(mode)
    if plan.config.wandb.dashboard is not None:
        from soluscope.report import dashboard

        dashboard.sign_in("wandb.dashboard=", "remove wandb.dashboard=")
    for sweep in plan.sweeps:
        plan.engine.check(plan.params, sweep)
        _check_tokens(sweep)
    study_dir, wait = plan.sweep.study_dir, plan.config.wait
    check_study_links(study_dir)
    with lock(study_dir / HELD, wait, "give wait=yes to wait for it, or set study="):
        _prepare(plan.sweep)
        if plan.first is None:
            _run(plan, plan.sweep, retry, _evaluation(plan, plan.sweep))
        else:
            _run(plan, plan.first, retry, SecondStage(path, tuple(words), retry, plan))


def _read(path: Path, words: Sequence[str]) -> _Plan:
    """Return the launch that the words describe.

    Raises:
        UserError: for bad words.
    """
    if launcher() == "torchrun":
        raise UserError(
            "a sweep must be launched once, but torchrun starts it several times: launch it without torchrun; "
            "the sweep starts torchrun for each job with several train.devices"
        )
    launch_words, others = _pick_out(
        words,
        tuple(f"{name}=" for name in ("engine", "report", "wait", "depart", "wandb.dashboard")),
    )
    config = load_typed(LaunchConfig, launch_words)
    evaluating, others = _pick_out(others, ("eval.",))
    evaluation = load_evaluation(EvalConfig, [w.removeprefix("eval.") for w in evaluating])
    engine: Any = plugins.pick("soluscope.engines", config.engine)
    keys, others = _pick_out(
        others, tuple(f"{name}." for name in plugins.names("soluscope.engines"))
    )
    for word in keys:
        if not word.startswith(f"{config.engine}."):
            raise UserError(
                f"{word} applies only to engine={word.partition('.')[0]}, but engine={config.engine}: remove "
                "the word or change engine="
            )
    params: Any = load_typed(
        engine.params, [word.removeprefix(f"{config.engine}.") for word in keys]
    )
    sweep = read_sweep(path, others)
    evaluation = replace(evaluation, wait=config.wait or evaluation.wait)
    first = None
    if sweep.search is not None:
        first = searching(sweep, {})
    elif sweep.select_seeds:
        first = choosing(sweep)
    return _Plan(config, engine, params, evaluation, sweep, first)


def _run(plan: _Plan, sweep: Sweep, retry: bool, after: Evaluate | SecondStage) -> None:
    """Run the jobs of one stage that are not done, and then `after`."""
    listed = [jobs.job_of(config) for config in sweep.configs]
    jobs.write_list(sweep.study_dir, sweep.name, listed)
    standings = {job.run: jobs.standing(sweep.study_dir, job) for job in listed}
    say(f"{sweep.name}: {jobs.counted([now.state for now in standings.values()])}")
    todo = []
    for config in sweep.configs:
        state = standings[config.run_name].state
        if state == "failed" and retry:
            Run(config.run_dir).forget_failure()
        task = _task(plan, config)
        if (
            (state == "done" and not _is_probed(task))
            or state in UNFINISHED
            or (state == "failed" and retry)
        ):
            todo.append(task)
    if isinstance(after, SecondStage) and not todo:
        after()  # no engine is needed to continue
    else:
        plan.engine.run(sweep, todo, plan.params, after)


def _task(plan: _Plan, config: Config) -> jobs.Task:
    """Return the work of a job: training, and with report=true evaluation, at a select seed of the losses alone.

    With out=, the runs' own folders stay as they are, and the evaluation comes after the last job.
    """
    evaluation = plan.evaluation
    if not plan.config.report or evaluation.out is not None:
        return jobs.Task(config)
    if config.seed in config.select_seeds or not config.probes:
        evaluation = replace(evaluation, probes=[])
    return jobs.Task(config, evaluation)


def _is_probed(task: jobs.Task) -> bool:
    """Return whether a trained run has all results of its task's evaluation."""
    if task.evaluation is None:
        return True
    from soluscope.evaluation.one_run import is_evaluated

    return is_evaluated(Run(task.config.run_dir), task.evaluation)


def _next_stage(work: SecondStage, plan: _Plan, retry: bool) -> None:
    """Train the next points of a search, or the arms that are chosen at the select seeds, and report them."""
    from soluscope.evaluation import suite

    assert plan.first is not None
    study_dir, tried = plan.sweep.study_dir, plan.first
    _check_done(
        study_dir, [jobs.job_of(config) for config in tried.configs], tried.search is not None
    )
    choices = suite.choose(study_dir, plan.evaluation, say)
    losses = {**choices.losses, **dict.fromkeys(_diverged(tried), math.inf)}
    if plan.sweep.search is not None:
        tried = searching(plan.sweep, losses)
        if {config.run_name for config in tried.configs} - {c.run_name for c in plan.first.configs}:
            _run(plan, tried, retry, replace(work, plan=replace(plan, first=tried)))
            return
    here = {config.arm for config in tried.configs}
    arms = here & choices.arms
    say(f"chosen at the select seeds: {', '.join(sorted(arms))} ({len(arms)} of {len(here)} arms)")
    chosen = reporting(plan.sweep, replace(choices, losses=losses))
    _run(plan, chosen, retry, _evaluation(plan, tried, chosen))


def _diverged(sweep: Sweep) -> list[str]:
    """Return the arms with a run whose loss diverged."""
    return [config.arm for config in sweep.configs if Run(config.run_dir).has_diverged()]


def _evaluation(plan: _Plan, *sweeps: Sweep) -> Evaluate:
    listed = tuple(jobs.job_of(config) for sweep in sweeps for config in sweep.configs)
    launched = plan.config
    return Evaluate(
        plan.sweep.study_dir,
        listed,
        plan.evaluation,
        launched.report,
        launched.wandb.dashboard,
        plan.sweep.search is not None,
    )


def _check_done(study_dir: Path, listed: Sequence[jobs.Job], may_diverge: bool) -> None:
    """Refuse to continue while jobs have failed or are not finished.

    With `may_diverge`, diverged runs are left out.

    Raises:
        UserError: naming these jobs.
    """
    if may_diverge:
        listed = [job for job in listed if not Run(study_dir / job.run).has_diverged()]
    standings = [jobs.standing(study_dir, job) for job in listed]
    behind = [
        f"{job.run} ({now.error or now.state})"
        for job, now in zip(listed, standings, strict=True)
        if now.state != "done"
    ]
    if behind:
        failed = any(now.state == "failed" for now in standings)
        raise UserError(
            f"{jobs.counted([now.state for now in standings])}; not done: {'; '.join(behind)}. "
            f"Run the same command again{' with --retry-failed' if failed else ''}, or "
            f"'soluscope probe {study_dir}' to probe the finished runs"
        )


def launch_help() -> str:
    """Return every key of a launch, with its default and meaning."""
    parts = [*help_lines(LaunchConfig)]
    for name in plugins.names("soluscope.engines"):
        lines = list(help_lines(plugins.pick("soluscope.engines", name).params, f"{name}."))
        parts += ["", f"with engine={name}:", *lines] if lines else []
    return "\n".join(parts)


def _pick_out(words: Sequence[str], beginnings: tuple[str, ...]) -> tuple[list[str], list[str]]:
    picked = [word for word in words if word.startswith(beginnings)]
    return picked, [word for word in words if word not in picked]


def _check_study(sweep: Sweep) -> None:
    """Refuse a study of another sweep, and run folders with other configurations, before anything is written."""
    there = jobs.read_list(sweep.study_dir)[0]
    if there not in (None, sweep.name):
        raise UserError(
            f"{sweep.study_dir} is a study of the sweep {there!r}, but this sweep is {sweep.name!r}: choose "
            "another study="
        )
    for config in sweep.configs:
        run = Run(config.run_dir)
        if not (run.config_file.is_file() and (run.is_done() or run.checkpoint.is_file())):
            continue
        saved = run.config
        if config.train.precision == "auto":  # the saved configuration has the resolved precision
            saved = replace(saved, train=replace(saved.train, precision="auto"))
        differing = differences(saved, config)
        if differing:
            raise UserError(
                f"{run.dir} has a different configuration ({differing[0]}): choose another study="
            )


def _check_tokens(sweep: Sweep) -> None:
    """Refuse jobs with different corpora or vocabularies."""
    from soluscope.data.cache import cache_key

    first = sweep.configs[0]
    for config in sweep.configs:
        if config.tokens.prepared != first.tokens.prepared or (
            first.tokens.prepared is None and cache_key(config) != cache_key(first)
        ):
            raise UserError(
                f"{first.run_name} and {config.run_name} have different tokens, but runs of one study must "
                "share data=, corpus.* and tokens.*: use a separate study for each"
            )


def _prepare(sweep: Sweep) -> None:
    """Prepare the study's tokens and tokenizer, once for all jobs.

    Raises:
        UserError: if a row is longer than a split.
    """
    from soluscope.data.cache import SPLITS, prepare, share_with_study

    cache = prepare(sweep.configs[0])
    for ctx in sorted({config.model.ctx for config in sweep.configs}):
        for split in SPLITS:
            cache.rows(split, ctx)
    share_with_study(cache, sweep.study_dir)


def _print_plan(plan: _Plan) -> None:
    """Print the jobs with their states, tokens and FLOPs, and below them the remaining tokens and FLOPs."""
    sweep = plan.first or plan.sweep
    heading = f"{sweep.name} in {sweep.study_dir}" + (", at the select seeds" * bool(plan.first))
    table = jobs.new_table(heading, "run", "id", "state")
    for name in ("tokens", "FLOPs"):
        table.add_column(name, justify="right", no_wrap=True)
    left_tokens = left_flops = 0.0
    states = []
    for config in sweep.configs:
        job = jobs.job_of(config)
        now = jobs.standing(sweep.study_dir, job)
        tokens = job.steps * job.tokens_a_step
        flops = tokens * config.model.training_flops(_d_vocab(config))
        begun = f" {now.step}/{job.steps}" if 0 < now.step < job.steps else ""
        table.add_row(job.run, job.id, now.state + begun, f"{tokens:,}", f"{flops:.2e}")
        states.append(now.state)
        share = 0.0 if now.state == "done" else 1 - now.step / job.steps
        left_tokens, left_flops = left_tokens + share * tokens, left_flops + share * flops
    console = jobs.console()
    console.print(jobs.fitted(table, console.width))
    console.print(
        f"{jobs.counted(states)}; to go: {left_tokens:,.0f} tokens, {left_flops:.2e} FLOPs",
        highlight=False,
    )
    if states.count("done") < len(states) and plan.engine.at_once is not None:
        console.print(_hours(plan, sweep, left_tokens), highlight=False)
    console.print(_apart(plan.sweep), highlight=False)
    if plan.sweep.search is not None:
        console.print(
            "These are the first points of a search. It continues from the best ones until each has a worse one on "
            "either side, which takes about three times as many jobs again.",
            highlight=False,
        )
    arms: dict[str, set[int]] = {}
    for config in plan.sweep.configs:
        arms.setdefault(config.arm, set()).add(config.seed)
    if plan.first:
        n = len({config.seed for config in plan.sweep.configs})
        search = plan.sweep.search
        chosen = f"the chosen arms, at most {len(arms)},"
        if search is not None:
            designs = f"{len(search.designs)} {plural(len(search.designs), 'design')}"
            chosen = f"the best points of {len(arms)} arms in {designs}"
            chosen += (
                f" and {len(search.line.values)} points of the line of each" if search.line else ""
            )
        console.print(
            f"Then {chosen} are trained at {n} {plural(n, 'seed')} that are reported.",
            highlight=False,
        )
    tested = {
        config.arm
        for config in plan.sweep.configs
        if plugins.pick("soluscope.variants", config.variant).role == "per_token"
    }
    if tested and (few := cannot_reject(min(map(len, arms.values())), len(tested))):
        console.print(few, highlight=False)


def _apart(sweep: Sweep) -> str:
    """Return a sentence on the settings in which the arms of a sweep differ."""
    found = apart(sweep.configs)
    tuned = () if sweep.search is None else tuple(sweep.search.axes)
    claimed = sorted({*found.claimed, *tuned})
    text = f"The arms differ in {', '.join(claimed)}" if claimed else "The arms do not differ"
    if found.unclaimed:
        others = ", ".join(found.unclaimed)
        return f"{text}; also in {others}, so a difference may not come from the variants alone."
    return f"{text}, and in nothing else."


def _preregister(plan: _Plan) -> None:
    """Write the study's plan.

    Raises:
        UserError: if the study has runs at reported seeds, or is registered already.
    """
    sweep = plan.sweep
    if early := registering.begun(sweep):
        raise UserError(
            f"{sweep.study_dir} has runs at reported seeds already ({', '.join(early[:3])}), so a plan would come "
            "after them: set study= for a new study"
        )
    made = registration.register(sweep.study_dir, registering.plan_of(sweep, plan.evaluation))
    answer(
        f"registered: {sweep.study_dir / registration.NAME}",
        f"sha256 of the plan: {made.sha256}",
        "Publish this checksum, for example in a commit, before you launch the sweep.",
    )


def _check_registration(plan: _Plan, write: bool) -> None:
    """Refuse a launch that differs from the study's registered plan, or store the reason for it.

    Raises:
        UserError: naming the first difference, unless a reason is given.
    """
    registered = registration.read(plan.sweep.study_dir)
    if registered is None:
        return
    differing = registering.departures(registered, plan.sweep, plan.evaluation)
    if differing and plan.config.depart is None:
        more = f", and {len(differing) - 1} more differences" if len(differing) > 1 else ""
        path = plan.sweep.study_dir / registration.NAME
        raise UserError(
            f"this launch departs from {path}: {differing[0]}{more}. Launch what was registered, or give "
            "depart='the reason', which the report lists"
        )
    if differing and write:
        registration.depart(plan.sweep.study_dir, registered, differing, plan.config.depart or "")


def _hours(plan: _Plan, sweep: Sweep, left_tokens: float) -> str:
    """Return a sentence on the time that training the rest takes here, from timed steps of the first job.

    On a CPU, a step of SoLU-1L would take minutes and gigabytes, so it is not timed there.
    """
    from soluscope.training.device import on_cuda
    from soluscope.training.timing import seconds_per_step

    config = sweep.configs[0]
    n_at_once = plan.engine.at_once(plan.params, sweep)
    tokens = jobs.job_of(config).tokens_a_step
    flops = tokens * config.model.training_flops(_d_vocab(config))
    if flops > MOST_TIMED_FLOPS and not on_cuda(config):
        return (
            f"The time is not estimated: a step of {config.run_name} has {flops:.1e} FLOPs, too many to time on a "
            "CPU. Give the command on the machine with the GPU."
        )
    seconds = seconds_per_step(config, _d_vocab(config), alone=n_at_once == 1)
    steps = left_tokens / tokens
    hours = steps * seconds / n_at_once / 3600
    return (
        f"Training takes about {hours:.2g} hours here: {n_at_once} {plural(n_at_once, 'job')} at once, "
        f"{1000 * seconds:.0f} ms per step of {config.run_name}. Probing comes on top."
    )


def _d_vocab(config: Config) -> int:
    """Return the size of the vocabulary: of the token cache if it exists, else tokens.d_vocab."""
    from soluscope.data.cache import TokenCache, cache_key

    prepared = config.tokens.prepared
    path = Path(prepared) if prepared else Path(config.tokens.cache_dir) / cache_key(config)
    try:
        d_vocab: Any = TokenCache(path).meta["d_vocab"]
    except (OSError, ValueError, KeyError):
        return config.tokens.d_vocab
    return int(d_vocab)
