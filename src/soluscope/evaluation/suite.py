"""Evaluation of run folders, probe by probe, to the records of a study; an interrupted evaluation resumes.

A run folder belongs to a trained run or to a pretrained model (pretrained_run.py).

runs/<study>/<run>/probes/<probe>.parquet          one row per token
runs/<study>/<run>/probes/<probe>-neurons.parquet  one row per neuron, for probes with per-neuron results
runs/<study>/<run>/probes/<probe>.jsonl            the probe's description, then its measurements; written
                                                   last, so its presence means that the probe is done
runs/<study>/<run>/probes/loss.parquet             one row per document, which comparisons resample
runs/<study>/<run>/probes/tokens.parquet           one row per token, which comparisons by token read
runs/<study>/<run>/probes/SHA256SUMS               checksums of these files
runs/<study>/<run>/.probes.new/                    results with other settings or code, until they are complete
runs/<study>/.controls/controls-<probe>.jsonl      the probe's results on models with known answers
runs/<study>/<run>/removal/                        results of `soluscope remove` (removing.py)
runs/<study>/rating/rating.jsonl                   people's ratings of neurons, if there are any
runs/<study>/results.jsonl                         all records of the study, comparisons included
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from soluscope import plugins, results
from soluscope.bars import Bars, Say, bars
from soluscope.comparison.compare import SETTINGS, Choices, Lineage, choices, compare, confirm
from soluscope.comparison.doses import doses
from soluscope.comparison.dynamics import dynamics
from soluscope.comparison.where import where
from soluscope.config import CONSTANT, EvalConfig, PretrainedConfig, check, rate_origin
from soluscope.cores import n_cores
from soluscope.errors import UserError
from soluscope.evaluation import further, provenance, removed
from soluscope.evaluation.calibration import check_gates, false_positives
from soluscope.evaluation.dynamics import steps_of
from soluscope.evaluation.elsewhere import check_writable, linked
from soluscope.evaluation.one_run import (
    Step,
    asked_probes,
    check_device,
    described,
    device_of,
    evaluate_run,
    is_evaluated,
    n_threads,
    threads,
    tokens_of,
)
from soluscope.evaluation.pretrained_run import ORIGIN, make_run, read_origin
from soluscope.evaluation.stored import (
    COMPUTES,
    PACKAGE,
    check_sums,
    current,
    names_in,
    probe_files,
    probing,
    read_dynamics,
    read_losses,
    read_stored,
    read_token_losses,
    store,
)
from soluscope.evaluation.summaries import stored_words
from soluscope.files import check_folder
from soluscope.memory import OF_PROCESS, check_draws, of_evaluation, of_machine
from soluscope.results import (
    PROXIES,
    RATINGS,
    FalsePositives,
    GateResult,
    ProbeWords,
    Record,
    Registered,
    Untrained,
    of_kind,
)
from soluscope.runs import registration
from soluscope.runs.folder import FOUND_NEURONS, Busy, Run, check_study_links, lock
from soluscope.runs.weights import Facts, code_hash, commit
from soluscope.terminal import answer, console
from soluscope.text import plural
from soluscope.training.wandb_run import check_login
from soluscope.variants import label_of
from soluscope.workers import Work, ending, side_by_side

CONTROLS = ".controls"


def evaluate(folder: Path, config: EvalConfig, say: Say = answer, step: Step | None = None) -> Path:
    """Probe every finished run below `folder` (or the run `folder` itself), then compare the study's runs.

    A probe is skipped if its results on a run exist and were made with the same configuration, so an
    interrupted evaluation resumes where it stopped.

    Args:
        folder: a study or a run.
        config: settings of the evaluation.
        say: function called with each message, and with lines of progress if stderr is not a terminal.
        step: function called before each result; with it, all runs are evaluated in this process.

    Returns:
        The study's results.jsonl, or with out= that of the folder `out`.

    Raises:
        Busy: if another process evaluates the study, unless config.wait is true.
        UserError: if there is no finished run, a run cannot be read, its tokens are gone, it cannot be evaluated
            here with these settings, or the results cannot be written. Stored results are then unchanged.
    """
    runs = _writable_runs(folder, config, say)
    study_dir = runs[0].dir.parent
    with _held(study_dir, config):
        _check(runs, config)
        _calibrated("controls", asked_probes(config), study_dir, say)
        _evaluate_runs(runs, config, say, step)
        return write_results(study_dir)


def choose(study_dir: Path, config: EvalConfig, say: Say = answer) -> Choices:
    """Measure the losses of a study's runs at its select seeds, and choose arms.

    Raises:
        Busy: if another process evaluates the study, unless config.wait is true.
        UserError: for the reasons that `evaluate` and `comparison.compare.choices` give.
    """
    with _held(study_dir, config):
        finished = finished_runs(study_dir)
        seeds = select_seeds(finished)
        runs = [run for run in finished if _is_for_choosing(run, seeds)]
        _check(runs, config)
        _evaluate_runs(runs, config, say)
        losses = [read_losses(run.dir / "probes", run).assign(**_settings(run)) for run in runs]
        lineages = _lineages(run.facts for run in runs)
        return choices(pd.concat(losses, ignore_index=True), lineages, seeds)


def select_seeds(runs: Iterable[Run]) -> frozenset[int]:
    """Return the seeds that any of a study's runs names as select seeds. Pretrained models name none."""
    trained = (run for run in runs if read_origin(run.dir) is None)
    return frozenset(seed for run in trained for seed in run.config.select_seeds)


def _has_only_losses(run: Run, seeds: frozenset[int]) -> bool:
    return read_origin(run.dir) is None and (run.config.seed in seeds or not run.config.probes)


def _is_for_choosing(run: Run, seeds: frozenset[int]) -> bool:
    return read_origin(run.dir) is None and run.config.seed in seeds


def evaluate_pretrained(
    name: str, config: PretrainedConfig, say: Say = answer, step: Step | None = None
) -> Path:
    """Probe a pretrained model in its own study, and write the study's report.

    An interrupted evaluation resumes where it stopped.

    Args:
        name: as for `load_pretrained`.
        config: settings of the probes, the text, and the studies to show beside the model.
        say: function called with each message, and with lines of progress if stderr is not a terminal.
        step: as for `evaluate`.

    Returns:
        The study's report.html.

    Raises:
        UserError: if there is no such model, the model cannot be probed, or there is no text.
    """
    from soluscope.report import publish

    check_device(config)
    run_dir = make_run(name, config, say)
    probing = EvalConfig(**{each.name: getattr(config, each.name) for each in fields(EvalConfig)})
    return publish(evaluate(run_dir, probing, say, step).parent)


def _say_after(say: Say, prefix: str, text: str) -> None:
    say(f"{prefix} {text}")


def finished_runs(folder: Path, say: Say | None = None) -> list[Run]:
    """Return the finished runs and pretrained models: `folder` itself, or the folders directly in it.

    Args:
        folder: a run, a study, or the run folder of a pretrained model.
        say: function called with a line about each run that is left out, because it is not finished or broken.

    Raises:
        UserError: if there is no finished run, or one has a link that leads out of the study.
    """
    if folder.is_symlink() or not folder.name:  # "." has no parent
        folder = folder.resolve()
    if Run(folder).is_done() or (folder / ORIGIN).is_file():
        runs = [Run(folder)]
    else:
        runs = []
        for run in map(Run, sorted(path for path in folder.glob("*") if path.is_dir())):
            try:
                if not (run.dir / ORIGIN).is_file():
                    run.check_done()
                runs.append(run)
            except UserError as error:
                if say and run.config_file.is_file():
                    say(f"{run.dir.name} is left out: {error}")
    if not runs:
        raise UserError(f"no finished run in {folder}: train some with 'soluscope train' first")
    check_study_links(runs[0].dir.parent, *runs)
    return runs


def _held(study_dir: Path, config: EvalConfig) -> AbstractContextManager[None]:
    """Hold a study while it is evaluated or its controls are stored in it."""
    return lock(study_dir, wait=config.wait, knob="give wait=yes to wait for it")


def _writable_runs(folder: Path, config: EvalConfig, say: Say) -> list[Run]:
    """Return the finished runs in `folder`, or with out= the folders in which they are evaluated instead."""
    runs = finished_runs(folder, say)
    out = config.out
    if config.step is not None:
        _check_step(runs, config.step)
        study_dir = runs[0].dir.resolve().parent
        out = out or str(study_dir.with_name(f"{study_dir.name}-step{config.step}"))
    if out is not None:
        runs = linked(runs, Path(out))
    check_writable(runs)
    return runs


def _check_step(runs: Iterable[Run], step: int) -> None:
    """Refuse a step of which a run has no weights, before anything is computed.

    Raises:
        UserError: naming the run and its steps.
    """
    for run in runs:
        kept = [] if read_origin(run.dir) else steps_of(run)
        if step not in kept:
            steps = ", ".join(map(str, kept)) or "none"
            raise UserError(
                f"{run.dir} has no weights of step {step}: set step= to one of its steps ({steps}), or train with "
                "train.snapshots="
            )


def calibrate(what: str, config: EvalConfig, folder: Path | None, say: Say = answer) -> None:
    """Print the calibration of the probes; with a study, store it for the study's report.

    The calibration `what` is `controls` or `false-positives`.

    Args:
        config: settings; `probes` names the probes to calibrate, by default all.
        folder: a study, or a run in it. Results that the same code has stored there are reused.
        say: function called with each line of progress.

    Raises:
        Busy: if another process evaluates the study, unless config.wait is true.
        UserError: if there is no finished run in `folder`; or if a control fails, after all results are
            printed.
    """
    from soluscope.report import matrix

    study_dir = _writable_runs(folder, config, say)[0].dir.parent if folder else None
    with _held(study_dir, config) if study_dir else nullcontext():
        records = _calibrated(what, asked_probes(config), study_dir, say)
        console().print(matrix(records))
        if study_dir and any(study_dir.glob("*/probes/loss.jsonl")):
            write_results(study_dir)
    failed = sorted({gate.probe for gate in of_kind(records, GateResult) if not gate.passed})
    if failed:
        raise UserError(
            f"probes that failed a control: {', '.join(failed)}; fix them before using their results"
        )


def _calibrated(what: str, names: Sequence[str], study_dir: Path | None, say: Say) -> list[Record]:
    """Return the probes' descriptions, and their results on the controls or their false positives.

    The records are read from the study if the same code has stored them there.
    """
    ask = check_gates if what == "controls" else false_positives
    study = study_dir.name if study_dir else ""
    code = code_hash(*COMPUTES, "controls/", but=probe_files())
    with current(study_dir / CONTROLS, code, say) if study_dir else nullcontext() as folder:
        stored = {
            name: _stored(folder, f"{what}-{name}", say) if folder else None for name in names
        }
        waiting = [name for name in names if stored[name] is None]
        if not waiting:
            return [record for name in names for record in stored[name] or ()]
        with bars({what: 1.0}, say) as shown, threads(n_threads()):
            shown.begin(what, f"{what} of {', '.join(waiting)}")
            for number, name in enumerate(waiting):
                shown.update(what, number, len(waiting), name)
                probe = plugins.pick(PACKAGE, name)
                made: list[Record] = [stored_words(name, probe, study), *ask(name, study=study)]
                if folder:
                    store(folder, f"{what}-{name}", made)
                stored[name] = made
    return [record for name in names for record in stored[name] or ()]


def _stored(folder: Path, name: str, say: Say) -> list[Record] | None:
    """Return the records of a calibration that is stored in a study, or None without complete records."""
    if not (folder / f"{name}.jsonl").is_file():
        return None
    try:
        return read_stored(folder, name, probing(folder.parent))
    except UserError as error:
        say(f"{name}.jsonl is computed again: {error}")
        return None


def write_results(study_dir: Path) -> Path:
    """Gather the records of all evaluated runs, compare the runs, and write results.jsonl."""
    records: list[Record] = []
    for path in sorted((study_dir / CONTROLS).glob("*.jsonl")):
        records += read_stored(path.parent, path.stem, probing(study_dir))
    compared: list[Run] = []
    beside: dict[str, None] = {}
    runs = finished_runs(study_dir)
    seeds = select_seeds(runs)
    for run in runs:
        folder = run.dir / "probes"
        if not (folder / "loss.jsonl").is_file():
            continue  # not evaluated yet, or interrupted before there was anything to compare
        if not _is_for_choosing(run, seeds):
            for path in sorted(folder.glob("*.jsonl")):
                records += read_stored(folder, path.stem, probing(study_dir))
            records += _found_neurons(run)
        if origin := read_origin(run.dir):  # other tokens than any trained run's, so not compared
            beside |= dict.fromkeys(origin.beside)
        else:
            compared.append(run)
    records += removed.of_study(runs)
    if compared:
        reported = [run for run in compared if not _is_for_choosing(run, seeds)]
        longer = [*further.compared(reported)]
        records += itertools.chain(*(further.loss_records(each) for each, _ in longer))
        records += _registered(study_dir, compared)
        facts, configs = [run.facts for run in compared], [run.config for run in compared]
        records += provenance.of_study(study_dir, facts, configs)
        losses = _losses(compared, longer)
        comparisons = compare(study_dir.name, losses.table, commit(), losses.lineages, seeds)
        by_token, by_step = (
            partial(_tables, reported, read) for read in (read_token_losses, read_dynamics)
        )
        records += [*comparisons, *where(comparisons, by_token)]
        records += dynamics(records, by_step)
        records += doses(records)
        probes = {name: plugins.pick(PACKAGE, name) for name in plugins.names(PACKAGE)}
        tested = {name: probe.tested for name, probe in probes.items() if probe.confirmatory}
        records += confirm(records, tested)
    for name, command in {RATINGS: "rate {} --analyse", PROXIES: "proxy {}"}.items():
        if name in names_in(study_dir / RATINGS):
            remedy = f"create it with 'soluscope {command.format(study_dir)}', or delete it"
            records += read_stored(study_dir / RATINGS, name, remedy)
    for other in beside:
        records += _new_to(records, results.read(Path(other) / "results.jsonl"))
    path = study_dir / "results.jsonl"
    results.write(path, _words_once(records))
    return path


class Losses(NamedTuple):
    """Stored losses of a study's runs, as `compare` takes them."""

    table: pd.DataFrame
    lineages: dict[str, Lineage]


def losses_of(study_dir: Path) -> Losses:
    """Return the losses that a study's comparison rests on: one row per run, split and document.

    Raises:
        UserError: if no run is evaluated, or a file is missing or broken.
    """
    runs = finished_runs(study_dir)
    seeds = select_seeds(runs)
    compared = [
        run
        for run in runs
        if (run.dir / "probes" / "loss.jsonl").is_file() and not read_origin(run.dir)
    ]
    check(bool(compared), f"{study_dir} has no evaluated run: run 'soluscope probe {study_dir}'")
    reported = [run for run in compared if not _is_for_choosing(run, seeds)]
    return _losses(compared, further.compared(reported))


def _losses(
    compared: Sequence[Run], longer: Iterable[tuple[further.Further, pd.DataFrame]]
) -> Losses:
    """Return the losses of runs and of runs that were trained further."""
    lineages = _lineages(run.facts for run in compared)
    tables = [read_losses(run.dir / "probes", run).assign(**_settings(run)) for run in compared]
    for each, table in longer:
        lineages[each.arm] = each.lineage
        settings = _settings(each.run) | {
            "tokens": each.origin.facts.tokens, "further_tokens": each.run.facts.tokens, "rate": each.rate,
        }  # fmt: skip
        tables.append(table.assign(**settings))
    return Losses(pd.concat(tables, ignore_index=True), lineages)


def _tables(
    runs: Iterable[Run], read: Callable[[Path, Run], pd.DataFrame | None], arm: str
) -> dict[int, pd.DataFrame]:
    """Return the tables that `read` reads for an arm's runs, by seed."""
    of_arm = [run for run in runs if run.facts.arm == arm]
    tables = {run.facts.seed: read(run.dir / "probes", run) for run in of_arm}
    return {seed: table for seed, table in tables.items() if table is not None}


def _found_neurons(run: Run) -> list[Record]:
    """Return the neurons of a run that the report shows, and how readable its neurons are; [] without these files.

    Raises:
        UserError: if a file is not as it was written.
    """
    found: list[Record] = []
    # The lists of neurons are of the trained model, never of its initialisation.
    for name, kind in zip(FOUND_NEURONS, (Record, Untrained), strict=True):
        path = run.dir / name
        for folder in (path.parent.parent, path.parent):
            check_folder(folder)
        if path.parent.is_dir():
            remedy = f"compute it with 'soluscope neurons {run.dir}', or delete {path.parent}"
            check_sums(path.parent, path.stem, remedy)
            is_empty = path.is_file() and path.stat().st_size == 0  # no neuron has a rule
            found += [] if is_empty else of_kind(results.read(path, remedy, whole=True), kind)
    return found


def _registered(study_dir: Path, compared: Iterable[Run]) -> list[Registered]:
    """Return the study's registration, with the difference between its seeds and those of the runs, or []."""
    found = registration.read(study_dir)
    if found is None:
        return []
    seeds = {run.config.seed for run in compared}
    planned = {*found.plan["seeds"], *found.plan["select_seeds"]}
    left = [f"seeds: registered {sorted(planned)}, there are {sorted(seeds)}"] * (seeds != planned)
    return [
        Registered(
            study=study_dir.name, commit=commit(), sha256=found.sha256, at=found.at,
            departures=(*found.departures, *left),
        )
    ]  # fmt: skip


def _new_to(records: Sequence[Record], others: Sequence[Record]) -> list[Record]:
    """Return another study's records that are new here, without calibrations of probes calibrated here."""
    calibrated = {
        (each.kind, each.probe) for each in records if isinstance(each, GateResult | FalsePositives)
    }
    here = {results.line(each) for each in records}
    return [
        each
        for each in others
        if (each.kind, getattr(each, "probe", "")) not in calibrated
        and results.line(each) not in here
    ]


def _words_once(records: Iterable[Record]) -> Iterator[Record]:
    """Yield the records, with only the first description of each probe; every file of its results has one."""
    seen = set()
    for each in records:
        if isinstance(each, ProbeWords):
            if each.probe in seen:
                continue
            seen.add(each.probe)
        yield each


def _lineages(compared: Iterable[Facts]) -> dict[str, Lineage]:
    """Return each variant's part in the comparison, keyed by the variant's name.

    Raises:
        UserError: if the variant's file changed role, twin or chain between two of its runs.
    """
    lineages: dict[str, Lineage] = {}
    first: dict[str, str] = {}
    for facts in compared:
        lineage = Lineage(facts.role, facts.twin, facts.chain, label_of(facts.variant))
        other = first.setdefault(facts.variant, facts.run)
        if lineages.setdefault(facts.variant, lineage) != lineage:
            raise UserError(
                f"runs {other!r} and {facts.run!r} of variant {facts.variant!r} differ in its role, twin "
                "or chain: delete the line 'role' from both model.json files, and the variant's current file "
                "applies to both"
            )
    return lineages


def _settings(run: Run) -> dict[str, float | str]:
    """Return the settings that distinguish a run's arm from other arms; nan for a setting it does not have."""
    facts, config = run.facts, run.config
    one_scale = replace(config.model, mlp_out_scale=1.0)
    family = replace(config, seed=0, train=replace(config.train, lr=None), model=one_scale)
    settings: dict[str, Any] = {name: getattr(facts, name, None) for name in SETTINGS}
    if getattr(config.mid, "gain", None) == "init":
        settings["matched_kappa"] = config.mid.dose(config.model.d_mlp)
    settings |= {
        "family": family.hash,
        "rate": rate_origin(config),
        "matched": isinstance(config.model.mlp_out_scale, str),
        "constant": config.model.norms == CONSTANT,
        "uniform": math.log(facts.d_vocab),
        "entropy_penalty": facts.entropy_penalty or None,
    }
    return {name: np.nan if value is None else value for name, value in settings.items()}


def _evaluate_runs(
    runs: Sequence[Run], config: EvalConfig, say: Say, step: Step | None = None
) -> None:
    """Probe runs, several at once if the settings allow; of those at select seeds, measure only the losses.

    Raises:
        UserError: if a run cannot be evaluated; the other runs are evaluated first.
    """
    seeds = select_seeds(finished_runs(runs[0].dir.parent)) if runs else frozenset()
    asked = {
        run.dir.name: replace(config, probes=[]) if _has_only_losses(run, seeds) else config
        for run in runs
    }
    n_at_once = 1 if step else min(_at_once(runs, config), len(runs))
    beside = [run for run in runs if n_at_once > 1 and not is_evaluated(run, asked[run.dir.name])]
    if len(beside) == 1:
        beside = []  # another process would take seconds to start
    with bars(dict.fromkeys(asked, 1.0), say) as shown:
        probing = _Probing(runs, shown, say, step)
        for run in runs:
            if run in beside:
                continue
            name = run.dir.name
            probing.began(name)
            try:
                evaluate_run(
                    run, asked[name], partial(probing.said, name), partial(probing.at, name)
                )
            except Busy as error:
                probing.busy[name] = error
            except UserError as error:
                probing.errors[name] = error
            probing.ended(name, None)
        works = [Work(run.dir.name, described(run, asked[run.dir.name])) for run in beside]
        side_by_side("soluscope.evaluation", works, n_at_once, probing)
    if before := len(runs) - len(probing.computed | probing.errors.keys() | probing.busy.keys()):
        counted = f"{before} of {len(runs)} runs" if len(runs) > 1 else runs[0].dir.name
        say(f"{counted}: probed already")
    if len(probing.busy) == len(runs):
        probing.errors |= probing.busy
    _check_evaluated(runs, probing.errors)


def _check_evaluated(runs: Sequence[Run], errors: Mapping[str, UserError]) -> None:
    """Raise the errors of the runs that could not be evaluated as one error."""
    if errors and len(runs) == 1:
        raise next(iter(errors.values()))
    if errors:
        told = "; ".join(f"{name}: {error}" for name, error in errors.items())
        raise UserError(f"{len(errors)} of {len(runs)} runs are not evaluated: {told}")


class _Probing:
    """The runs that are evaluated: the watcher of the workers, and the progress of this process."""

    def __init__(self, runs: Sequence[Run], shown: Bars, say: Say, step: Step | None) -> None:
        names = [run.dir.name for run in runs]
        self.prefixes = {
            name: f"[{number}/{len(names)}] {name}:" for number, name in enumerate(names, 1)
        }
        self.shown, self.say, self.step = shown, say, step
        self.errors: dict[str, UserError] = {}
        self.busy: dict[str, UserError] = {}
        """Runs at which another process is at work, such as the job that has trained them."""
        self.computed: set[str] = set()
        """Runs of which a result was computed."""

    def began(self, name: str) -> None: ...

    def said(self, name: str, text: str) -> None:
        self.say(f"{self.prefixes[name]} {text}")

    def at(self, name: str, done: int, of: int, result: str) -> None:
        if name not in self.computed:
            self.computed.add(name)
            self.shown.begin(name, f"{self.prefixes[name]} {of} {plural(of, 'result')} to compute")
        self.shown.update(name, done, of, result)
        if self.step:
            self.step(done, of, result)

    def heard(self, name: str, message: dict[str, Any]) -> None:
        if "error" in message:
            (self.busy if message["busy"] else self.errors)[name] = UserError(message["error"])
        elif "say" in message:
            self.said(name, message["say"])
        else:
            self.at(name, message["done"], message["of"], message["result"])

    def ended(self, name: str, status: int | None) -> None:
        if status is not None:
            self.errors.setdefault(name, UserError(ending(status)))
        outcome = "not probed" if name in self.errors else "probed"
        if name in self.busy:
            outcome = f"left out: {self.busy[name]}"
        told = name in self.computed or name in self.errors or name in self.busy
        self.shown.end(name, f"{self.prefixes[name]} {outcome}" if told else "")

    def look(self) -> None: ...


def _at_once(runs: Sequence[Run], config: EvalConfig) -> int:
    """Return the number of runs that are evaluated at once."""
    if config.jobs is not None:
        return config.jobs
    if device_of(config) != "cpu" or any(read_origin(run.dir) for run in runs):
        return 1
    needed = max((of_evaluation(run.facts.d_mlp, run.facts.d_vocab) for run in runs), default=0)
    fitting = of_machine() / (OF_PROCESS + needed)
    return max(1, int(min(n_cores() // n_threads(), fitting, len(runs))))


def _check(runs: Sequence[Run], config: EvalConfig) -> None:
    """Refuse an evaluation that cannot be made, before anything is computed or replaced.

    Raises:
        UserError: if a run or its tokens cannot be read, there is no such device, or the resamples do not fit into
            memory.
    """
    check_device(config)
    check_login(config.wandb)
    for run in runs:
        if read_origin(run.dir) is None:
            run.config  # noqa: B018 (its error names the file)
        n_documents = tokens_of(run, config.prepared).meta["splits"]["report"]["n_documents"]
        n_rows = max(config.n_tokens, config.n_loss_tokens) // run.facts.ctx
        check_draws(config.n_draws, min(n_documents, n_rows))
