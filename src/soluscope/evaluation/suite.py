"""Evaluation of run folders, probe by probe, to the records of a study; an interrupted evaluation resumes.

A run folder belongs to a trained run or to a pretrained model (pretrained_run.py).

runs/<study>/<run>/probes/<probe>.parquet          one row per token
runs/<study>/<run>/probes/<probe>-neurons.parquet  one row per neuron, for probes with per-neuron results
runs/<study>/<run>/probes/<probe>.jsonl            the probe's description, then its measurements; written
                                                   last, so its presence means that the probe is done
runs/<study>/<run>/probes/loss.parquet             one row per document, which comparisons resample
runs/<study>/<run>/.probes.new/                    results with other settings or code, until they are complete
runs/<study>/.controls/controls-<probe>.jsonl      the probe's results on models with known answers
runs/<study>/results.jsonl                         all records of the study, comparisons included
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from soluscope import plugins, results
from soluscope.bars import Bars, Say, bars
from soluscope.comparison.compare import SETTINGS, Lineage, chosen_arms, compare, confirm
from soluscope.config import EvalConfig, PretrainedConfig, rate_origin
from soluscope.cores import n_cores, omp_threads
from soluscope.data import streams
from soluscope.data.cache import TokenCache, of_study, open_cache, study_facts
from soluscope.data.tokenizer import from_bytes
from soluscope.errors import UserError
from soluscope.evaluation import pretrained_run
from soluscope.evaluation.calibration import check_gates, false_positives
from soluscope.evaluation.elsewhere import check_writable, linked
from soluscope.evaluation.loss import document_losses, mean_loss
from soluscope.evaluation.pretrained_run import ORIGIN, load_again, make_run, read_origin
from soluscope.evaluation.summaries import (
    about_run,
    against_untrained,
    stored_words,
    summarise,
    token_table,
)
from soluscope.evaluation.wandb_probes import send_probes
from soluscope.files import digest, read_json, reason, replacing, write_text
from soluscope.hooked.ablation import loss_at_post
from soluscope.hooked.activations import HookedRun, check_model, observe
from soluscope.hooked.convert import SoluscopeTransformer, load_run, load_untrained
from soluscope.memory import OF_PROCESS, check_draws, of_machine
from soluscope.probes import Probe
from soluscope.results import (
    FalsePositives,
    GateResult,
    LeftOut,
    Measurement,
    ProbeWords,
    Record,
    TokenValue,
    Untrained,
    of_kind,
)
from soluscope.runs.folder import Run, check_study_links, lock
from soluscope.runs.weights import Facts, code_hash, commit
from soluscope.terminal import answer, console
from soluscope.text import plural, readable
from soluscope.training.wandb_run import check_login
from soluscope.variants import label_of
from soluscope.workers import Work, ending, side_by_side, tell

PACKAGE = "soluscope.probes"
CONTROLS = ".controls"
MADE_WITH = "made_with.json"
NO_EFFECT = ("probes", "prepared", "device", "jobs", "out", "wait", "wandb")
"""Settings of an evaluation that do not change its results."""
TRAINING_POINTS = 60
LEFT_BEHIND_S = 20.0
"""Seconds within which a worker ends that an evaluation left behind when it was killed."""
OF_EVALUATION = 32
"""Bytes of memory of an evaluation per entry of W_out U; measured at SoLU-1L's shape (benchmarks/README.md)."""
COMPUTES = (
    "comparison/", "data/", "evaluation/", "hooked/", "model.py", "norms.py", "probes/", "results.py",
    "text.py", "variants/",
)  # fmt: skip
"""Folders and modules of the package that compute the stored results of a run or define their form. A
probe's own file affects only the results of that probe."""

Step = Callable[[int, int, str], None]
"""Function called before each result of a run, with the number of its results that are done, the number of all its
results that are to be computed, and the name of the next one."""


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
        _calibrated("controls", _asked(config), study_dir, say)
        _evaluate_runs(runs, config, say, step)
        return write_results(study_dir)


def choose(study_dir: Path, config: EvalConfig, say: Say = answer) -> set[str]:
    """Measure the losses of a study's runs at its select seeds, and return the names of the chosen arms.

    Raises:
        Busy: if another process evaluates the study, unless config.wait is true.
        UserError: for the reasons that `evaluate` and `comparison.compare.chosen_arms` give.
    """
    with _held(study_dir, config):
        seeds = select_seeds(finished_runs(study_dir))
        runs = [run for run in finished_runs(study_dir) if _is_for_choosing(run, seeds)]
        _check(runs, config)
        _evaluate_runs(runs, config, say)
        losses = [_read_losses(run.dir / "probes", run).assign(**_settings(run)) for run in runs]
        lineages = _lineages(run.facts for run in runs)
        return chosen_arms(pd.concat(losses, ignore_index=True), lineages, seeds)


def select_seeds(runs: Iterable[Run]) -> frozenset[int]:
    """Return the seeds that any of a study's runs names as select seeds. Pretrained models name none."""
    trained = (run for run in runs if read_origin(run.dir) is None)
    return frozenset(seed for run in trained for seed in run.config.select_seeds)


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

    _check_device(config)
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
    if config.out is not None:
        runs = linked(runs, Path(config.out))
    check_writable(runs)
    return runs


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
        records = _calibrated(what, _asked(config), study_dir, say)
        console().print(matrix(records))
        if study_dir and any(study_dir.glob("*/probes/loss.jsonl")):
            write_results(study_dir)
    failed = sorted({gate.probe for gate in of_kind(records, GateResult) if not gate.passed})
    if failed:
        raise UserError(
            f"probes that failed a control: {', '.join(failed)}; fix them before using their results"
        )


def _asked(config: EvalConfig) -> Sequence[str]:
    """Return the names of the probes that a configuration asks for."""
    return config.probes if config.probes is not None else plugins.names(PACKAGE)


def _calibrated(what: str, names: Sequence[str], study_dir: Path | None, say: Say) -> list[Record]:
    """Return the probes' descriptions, and their results on the controls or their false positives.

    The records are read from the study if the same code has stored them there.
    """
    ask = check_gates if what == "controls" else false_positives
    study = study_dir.name if study_dir else ""
    code = code_hash(*COMPUTES, "controls/", but=_probe_files())
    with _current(study_dir / CONTROLS, code, say) if study_dir else nullcontext() as folder:
        stored = {
            name: _stored(folder / f"{what}-{name}.jsonl", say) if folder else None
            for name in names
        }
        waiting = [name for name in names if stored[name] is None]
        if not waiting:
            return [record for name in names for record in stored[name] or ()]
        with bars({what: 1.0}, say) as shown:
            shown.begin(what, f"{what} of {', '.join(waiting)}")
            for number, name in enumerate(waiting):
                shown.update(what, number, len(waiting), name)
                probe = plugins.pick(PACKAGE, name)
                made: list[Record] = [stored_words(name, probe, study), *ask(name, study=study)]
                if folder:
                    results.write(folder / f"{what}-{name}.jsonl", made)
                stored[name] = made
    return [record for name in names for record in stored[name] or ()]


def _stored(path: Path, say: Say) -> list[Record] | None:
    """Return the records of a calibration that is stored in a study, or None without complete records."""
    if not path.is_file():
        return None
    try:
        return results.read(path, path.parents[1], whole=True)
    except UserError as error:
        say(f"{path.name} is computed again: {error}")
        return None


def write_results(study_dir: Path) -> Path:
    """Gather the records of all evaluated runs, compare the runs, and write results.jsonl."""
    records: list[Record] = []
    for path in sorted((study_dir / CONTROLS).glob("*.jsonl")):
        records += results.read(path, study_dir)
    losses = []
    compared: list[Facts] = []
    beside: dict[str, None] = {}
    runs = finished_runs(study_dir)
    seeds = select_seeds(runs)
    for run in runs:
        folder = run.dir / "probes"
        if not (folder / "loss.jsonl").is_file():
            continue  # not evaluated yet, or interrupted before there was anything to compare
        for path in sorted(folder.glob("*.jsonl")):
            records += [] if _is_for_choosing(run, seeds) else results.read(path, study_dir)
        if origin := read_origin(run.dir):  # other tokens than any trained run's, so not compared
            beside |= dict.fromkeys(origin.beside)
        else:
            compared.append(run.facts)
            losses.append(_read_losses(folder, run).assign(**_settings(run)))
    if losses:
        table = pd.concat(losses, ignore_index=True)
        records += compare(study_dir.name, table, commit(), _lineages(compared), seeds)
        probes = {name: plugins.pick(PACKAGE, name) for name in plugins.names(PACKAGE)}
        tested = {name: probe.tested for name, probe in probes.items() if probe.confirmatory}
        records += confirm(records, tested)
    for other in beside:
        records += _new_to(records, results.read(Path(other) / "results.jsonl"))
    path = study_dir / "results.jsonl"
    results.write(path, _words_once(records))
    return path


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
    family = replace(config, seed=0, train=replace(config.train, lr=None))
    settings: dict[str, Any] = {name: getattr(facts, name) for name in SETTINGS}
    settings |= {"family": family.hash, "rate": rate_origin(config)}
    return {name: np.nan if value is None else value for name, value in settings.items()}


# --- one run --------------------------------------------------------------------------------------


def _evaluate_runs(
    runs: Sequence[Run], config: EvalConfig, say: Say, step: Step | None = None
) -> None:
    """Probe runs, several at once if the settings allow; of those at select seeds, measure only the losses.

    Raises:
        UserError: if a run cannot be evaluated; the other runs are evaluated first.
    """
    seeds = select_seeds(finished_runs(runs[0].dir.parent)) if runs else frozenset()
    asked = {
        run.dir.name: replace(config, probes=[]) if _is_for_choosing(run, seeds) else config
        for run in runs
    }
    n_at_once = 1 if step else min(_at_once(runs, config), len(runs))
    with bars(dict.fromkeys(asked, 1.0), say) as shown:
        probing = _Probing(runs, shown, say, step)
        beside = []
        for run in runs:
            name = run.dir.name
            if n_at_once > 1 and not _is_probed(run, asked[name]):
                beside.append(run)
                continue
            probing.began(name)
            try:
                _evaluate_run(
                    run, asked[name], partial(probing.said, name), partial(probing.at, name)
                )
            except UserError as error:
                probing.errors[name] = error
            probing.ended(name, None)
        works = [Work(run.dir.name, _described(run, asked[run.dir.name])) for run in beside]
        side_by_side("soluscope.evaluation", works, n_at_once, probing)
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
            self.errors[name] = UserError(message["error"])
        elif "say" in message:
            self.said(name, message["say"])
        else:
            self.at(name, message["done"], message["of"], message["result"])

    def ended(self, name: str, status: int | None) -> None:
        if status is not None:
            self.errors.setdefault(name, UserError(ending(status)))
        outcome = "probed" if name in self.computed else "probed already"
        if name in self.errors:
            outcome = "not probed"
        self.shown.end(name, f"{self.prefixes[name]} {outcome}")

    def look(self) -> None: ...


def _at_once(runs: Sequence[Run], config: EvalConfig) -> int:
    """Return the number of runs that are evaluated at once."""
    if config.jobs is not None:
        return config.jobs
    if config.device != "cpu" or any(read_origin(run.dir) for run in runs):
        return 1
    needed = max((OF_EVALUATION * run.facts.d_mlp * run.facts.d_vocab for run in runs), default=0)
    fitting = of_machine() / (2 * OF_PROCESS + needed)
    return max(1, int(min(n_cores() // _n_threads(), fitting, len(runs))))


def _n_threads() -> int:
    """Return the number of CPU threads for each trained run: OMP_NUM_THREADS, or 1.

    The last bits of sums depend on this number, so it does not depend on how many runs are evaluated at once.
    """
    return omp_threads() or 1


def _is_probed(run: Run, config: EvalConfig) -> bool:
    """Return whether a run has all results of this configuration, made by the present code."""
    folder, origin = run.dir / "probes", read_origin(run.dir)
    return _made_with(folder) == _made_now(_rests_on(run, config)) and all(
        _is_measured(folder, run, name, lambda text: None) for name in _results_of(config, origin)
    )


def _results_of(config: EvalConfig, origin: pretrained_run.Origin | None) -> list[str]:
    """Return the names of the results of a run."""
    return [*(() if origin else ("training",)), "loss", "tokens", *_asked(config)]


def _described(run: Run, config: EvalConfig) -> str:
    """Return one line of JSON from which `evaluate_described` evaluates a run in another process."""
    return json.dumps({"run": str(run.dir), "evaluation": asdict(config)})


def evaluate_described(line: str) -> None:
    """Evaluate the run that `_described` has described, in a worker, and tell the launching process how it goes."""
    values = json.loads(line)

    def at(done: int, of: int, result: str) -> None:
        tell(done=done, of=of, result=result)

    try:
        run, config = Run(Path(values["run"])), EvalConfig(**values["evaluation"])
        _evaluate_run(run, config, lambda text: tell(say=text), at)
    except UserError as error:
        tell(error=str(error))
    except Exception as error:
        told = f"{type(error).__name__}: {reason(error)}"
        tell(error=f"{told}; jobs=1 shows where this happens")


def _evaluate_run(run: Run, config: EvalConfig, say: Say, step: Step) -> None:
    with run.lock(LEFT_BEHIND_S), _threads(run):
        _probe_run(run, config, say, step)
        send_probes(run, config.wandb)


@contextmanager
def _threads(run: Run) -> Iterator[None]:
    """Evaluate a trained run with `_n_threads`; a pretrained model gets all cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(before if read_origin(run.dir) else _n_threads())
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _check(runs: Sequence[Run], config: EvalConfig) -> None:
    """Refuse an evaluation that cannot be made, before anything is computed or replaced.

    Raises:
        UserError: if a run or its tokens cannot be read, there is no such device, or the resamples do not fit into
            memory.
    """
    _check_device(config)
    check_login(config.wandb)
    for run in runs:
        if read_origin(run.dir) is None:
            run.config  # noqa: B018 (its error names the file)
        n_documents = tokens_of(run, config.prepared).meta["splits"]["report"]["n_documents"]
        n_rows = max(config.n_tokens, config.n_loss_tokens) // run.facts.ctx
        check_draws(config.n_draws, min(n_documents, n_rows))


def _check_device(config: EvalConfig) -> None:
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda, but torch finds no GPU here: set device=cpu")


def _probe_run(run: Run, config: EvalConfig, say: Say, step: Step) -> None:
    with _current(run.dir / "probes", _rests_on(run, config), say) as folder:
        _probe_into(folder, run, config, say, step)


def _probe_into(folder: Path, run: Run, config: EvalConfig, say: Say, step: Step) -> None:
    """Write the results of a run that `folder` lacks."""
    origin = read_origin(run.dir)
    waiting = [
        name for name in _results_of(config, origin) if not _is_measured(folder, run, name, say)
    ]
    if not waiting:
        return
    about = about_run(run.facts, pretrained=origin is not None)
    model = load_again(run, origin, config.device) if origin else load_run(run, config.device)
    check_model(model)
    observed = _Observed(model, tokens_of(run, config.prepared), config, run)
    for number, name in enumerate(waiting):
        step(number, len(waiting), name)
        records: Sequence[Record]
        if name == "training":
            records = training_points(run, about)
        elif name == "loss" and origin:
            records = _pretrained(observed, folder, origin, about, config)
        elif name == "loss":
            records = [_loss(observed, folder, about, config)]
        elif name == "tokens":
            records = token_values(observed("natural"), about)
        else:
            records = _probe_records(name, observed, folder, about, config)
        results.write(folder / f"{name}.jsonl", records)


def _is_measured(folder: Path, run: Run, name: str, say: Say) -> bool:
    """Return whether the results of the probe `name` on a run are in `folder` and can be read."""
    path = folder / f"{name}.jsonl"
    if not path.is_file():
        return False
    try:
        results.read(path, run.dir.parent, whole=True)
        if name == "loss" and not (run.dir / ORIGIN).is_file():
            _read_losses(folder, run)
    except UserError as error:
        say(f"{name} is recomputed: {error}")
        return False
    return True


def _read_losses(folder: Path, run: Run) -> pd.DataFrame:
    """Return a trained run's losses by document, as `_loss` has saved them in `folder`.

    Raises:
        UserError: if the file is missing or broken, or belongs to another run.
    """
    path, facts = folder / "loss.parquet", run.facts
    about = {
        "run": facts.run, "arm": facts.arm, "variant": facts.variant, "seed": facts.seed,
        "config": facts.config,
    }  # fmt: skip
    try:
        if not path.is_file():
            raise ValueError("no such file")
        table = pd.read_parquet(path)
        numbers = table[["loss_sum", "n_tokens"]].to_numpy(float)
        if not np.isfinite(numbers).all() or not (table["n_tokens"] > 0).all():
            raise ValueError("its losses are not finite, or of no tokens")
        if set(table["split"]) != {"select", "report"}:
            raise ValueError("it does not hold the splits select and report")
        if not all(isinstance(document, str) for document in table["document"]):
            raise ValueError("its documents are not named")
        for name, value in about.items():
            if not (table[name] == value).all():
                raise ValueError(f"its {name} is not {value}")
    except Exception as error:  # pyarrow's own errors, and a table with other columns or types
        raise UserError(
            f"{path} is broken ({reason(error)}): compute it again with 'soluscope probe {run.dir}'"
        ) from error
    return table


@contextmanager
def _current(folder: Path, shared: str, say: Say) -> Iterator[Path]:
    """Yield a folder for results that holds only current results; at the end it is, or replaces, `folder`.

    Results that were made from other inputs or by other code stay in `folder` until the block has ended without
    an error. Until then, the new results lie beside it, where the next call continues.

    Args:
        folder: folder of files named after probes.
        shared: hash of the inputs and code of all results; a probe's own file affects only its own results.
        say: function called with a line about the results that are not current.
    """
    now = _made_now(shared)
    old, new = folder.with_name(f".{folder.name}.old"), folder.with_name(f".{folder.name}.new")
    if old.is_dir() and not folder.is_dir():  # a killed process was exchanging the two
        old.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
    before = _made_with(folder)
    if before in (None, now):
        write_text(folder / MADE_WITH, json.dumps(now) + "\n")
        shutil.rmtree(new, ignore_errors=True)
        yield folder
        return
    stale = {Path(path).stem for path in _probe_files() if before.get(path, now[path]) != now[path]}
    if not before:
        say(f"{folder / MADE_WITH} is missing or broken: all results are recomputed")
    elif before.get("shared") != shared:
        say("inputs or code have changed since last time: all results are recomputed")
    for name in sorted(stale) if before.get("shared") == shared else ():
        say(f"{name} has changed and is recomputed")
    if _made_with(new) != now:
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir()
        for path in folder.iterdir() if before.get("shared") == shared else ():
            if path.is_file() and _probe_of(path) not in stale and path.name != MADE_WITH:
                shutil.copy2(path, new)
        write_text(new / MADE_WITH, json.dumps(now) + "\n")
    yield new
    folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _made_now(shared: str) -> dict[str, str]:
    """Return the hashes of results that are made now: of their inputs and shared code, and of each probe's file."""
    return {"shared": shared} | {path: code_hash(path) for path in _probe_files()}


def _made_with(folder: Path) -> dict[str, str] | None:
    """Return the hashes of the inputs and code of a folder's results, or None for a folder without results.

    Results without readable hashes are not current.
    """
    try:
        return read_json(folder / MADE_WITH, dict[str, str], "its results are recomputed")
    except UserError:
        return {} if any(folder.glob("*.jsonl")) else None


def _probe_of(path: Path) -> str:
    """Return the name of the probe whose results a file holds."""
    name = path.stem.removeprefix("controls-").removeprefix("false-positives-")
    return name.removesuffix("-neurons")


def _probe_files() -> tuple[str, ...]:
    return tuple(f"probes/{name}.py" for name in plugins.names(PACKAGE))


def _rests_on(run: Run, config: EvalConfig) -> str:
    """Return a hash of the inputs and code of all summaries of a run, without the probes' own files."""
    settings = {k: v for k, v in asdict(config).items() if k not in NO_EFFECT}
    made_from = "done.json"
    if (run.dir / ORIGIN).is_file():
        made_from = "model.json"
        settings["tokens"] = study_facts(run.dir.parent)["key"]
    trained = digest((run.dir / made_from).read_text(encoding="utf8", errors="replace"))
    prompts = [streams.prompts(name) for name in streams.PROMPTS]
    code = code_hash(*COMPUTES, but=_probe_files())
    return digest([settings, trained, prompts, code])


def tokens_of(run: Run, prepared: str | None = None) -> TokenCache:
    """Return the held-out tokens of the corpus that the run was trained on, or the text of a pretrained model.

    The study's data.json identifies the tokens, so tokens of a changed corpus are never used instead.
    `pretrained_run` prepares a pretrained model's text.

    Args:
        run: a finished run, or the run folder of a pretrained model.
        prepared: folder of a token cache to use; by default the study's copy, or else the cache of the training.

    Raises:
        UserError: if these tokens are gone, because other tokens would give plausible but wrong numbers.
    """
    study_dir, facts, origin = run.dir.parent, run.facts, read_origin(run.dir)
    trained_on = study_facts(study_dir)
    cache = open_cache(Path(prepared)) if prepared else of_study(study_dir)
    if cache is None:
        command = f"soluscope probe {origin.name}" if origin else "soluscope train"
        raise UserError(
            f"the tokens {trained_on['path']} of {study_dir} are gone: set prepared= to the folder of the token "
            f"cache {trained_on['key']}, or prepare them again with the command '{command}' that made the run"
        )
    if origin:
        facts = replace(facts, tokenizer_hash=trained_on["tokenizer_hash"])
    same = (cache.meta["key"], cache.meta["tokenizer_hash"])
    if same != (trained_on["key"], facts.tokenizer_hash):
        raise UserError(
            f"{run.dir} was trained on the tokens {trained_on['key']}, but {cache.path} has other tokens: "
            "set prepared= to the folder of the right tokens"
        )
    for name in ("bos", "eos", "pad", "d_vocab", "shares", "splits"):
        if cache.meta.get(name) != trained_on.get(name, cache.meta.get(name)):
            raise UserError(
                f"{cache.path / 'meta.json'} and {study_dir / 'data.json'} differ in {name!r}: copy both again"
            )
    return cache


class _Observed:
    """The model's activations on each stream, computed on first use."""

    def __init__(
        self, model: SoluscopeTransformer, cache: TokenCache, config: EvalConfig, run: Run
    ) -> None:
        self.model, self.cache, self.config = model, cache, config
        self.tokenizer = from_bytes(
            cache.tokenizer_path.read_bytes(), f"cannot read {cache.tokenizer_path}"
        )
        self._initial = None if read_origin(run.dir) else load_untrained(run, config.device)
        self._runs: dict[str, HookedRun] = {}
        self._before: dict[str, HookedRun] = {}

    def __call__(self, name: str) -> HookedRun:
        if name not in self._runs:
            self._runs[name] = observe(self.model, self._stream(name))
        return self._runs[name]

    def untrained(self, name: str) -> HookedRun | None:
        """Return the activations of the run's own initialisation; None without one.

        A model that others have trained has none, and neither has a run that began with another run's weights.
        """
        if self._initial is None:
            return None
        if name not in self._before:
            self._before[name] = observe(self._initial, self._stream(name))
        return self._before[name]

    def _stream(self, name: str) -> streams.Stream:
        ctx, c = self.model.facts.ctx, self.config
        return streams.make(name, self.cache, self.tokenizer, ctx, c.n_tokens, c.seed)


def _probe_records(
    name: str, observed: _Observed, folder: Path, about: dict[str, Any], config: EvalConfig
) -> list[Record]:
    """Return the probe's description and its measurements on each of its streams, and save its tables."""
    probe: Probe = plugins.pick(PACKAGE, name)
    words = stored_words(name, probe, about["study"])
    left_out = partial(LeftOut, **about, probe=name)
    n_layers = observed.model.cfg.n_layers
    if probe.one_layer and n_layers > 1:
        return [words, left_out(note=f"exact for one layer only, and the model has {n_layers}")]
    records: list[Record] = []
    tables = {}
    twin = Untrained(**about, probe=name, quantity="", value=None, unit="", stream=probe.streams[0])
    for stream in probe.streams:
        try:
            run = observed(stream)
        except UserError as error:  # this corpus or tokenizer cannot provide the stream
            records.append(left_out(stream=stream, note=str(error)))
            continue
        base = Measurement(**about, probe=name, quantity="", value=None, unit="", stream=stream)
        measured = probe.measure(run)
        tables[stream] = token_table(run, measured).assign(stream=stream)
        records += summarise(
            probe, tables[stream], measured.estimates, base, config.n_draws, config.seed
        )
        if stream == probe.streams[0] and (initial := observed.untrained(stream)):
            before = probe.measure(initial)
            here = tables[stream], measured.estimates
            there = token_table(initial, before), before.estimates
            records += against_untrained(probe, here, there, twin, config.n_draws, config.seed)
        if measured.neurons and stream == probe.streams[0]:
            columns = {key: values.numpy() for key, values in measured.neurons.items()}
            _write_parquet(folder / f"{name}-neurons.parquet", pd.DataFrame(columns))
    if tables:
        _write_parquet(folder / f"{name}.parquet", pd.concat(tables.values(), ignore_index=True))
    if not records:
        records.append(left_out(note="its quantities are not defined for this model"))
    return [words, *records]


def token_values(run: HookedRun, about: dict[str, Any]) -> list[TokenValue]:
    """Return the per-token values of the first text of `run`, for the report's token view."""
    end = int(run.is_bos.nonzero()[1]) if run.is_bos.sum() > 1 else len(run.pos)
    text = run.subset(torch.arange(len(run.pos)) < end)
    columns = {
        "gain": ("1 / activation", text.gain),
        "r": ("share", text.engagement),
        "ablation effect": ("nats", loss_at_post(text, torch.zeros_like(text.post)) - text.loss),
    }
    return [
        TokenValue(
            **about, quantity=name, unit=unit, stream=run.stream, place=index, value=float(value),
            text=readable(text.vocab[int(text.tokens[index])]),
        )
        for name, (unit, values) in columns.items()
        for index, value in enumerate(values)
    ]  # fmt: skip


def _loss(
    observed: _Observed, folder: Path, about: dict[str, Any], config: EvalConfig
) -> Measurement:
    """Save the losses by document on both validation splits, and return their mean on the report split."""
    facts = observed.model.facts
    tables = [
        document_losses(observed.model, observed.cache, split, config).assign(split=split)
        for split in ("select", "report")
    ]
    table = pd.concat(tables, ignore_index=True).assign(
        run=facts.run, arm=facts.arm, variant=facts.variant, seed=facts.seed, config=facts.config
    )
    table["document"] = table["document"].astype(str)
    _write_parquet(folder / "loss.parquet", table)
    base = Measurement(**about, probe="loss", quantity="", value=None, unit="")
    return mean_loss(table[table["split"] == "report"], base, config)


def _pretrained(
    observed: _Observed,
    folder: Path,
    origin: pretrained_run.Origin,
    about: dict[str, Any],
    config: EvalConfig,
) -> list[Measurement]:
    """Save a pretrained model's losses by document, and return the known facts about the model."""
    table = document_losses(observed.model, observed.cache, "report", config)
    _write_parquet(folder / "loss.parquet", table)
    base = Measurement(**about, probe="pretrained", quantity="", value=None, unit="")
    facts, run = observed.model.facts, observed("natural")
    loss = mean_loss(table, base, config)
    return pretrained_run.measurements(facts, origin, observed.cache, loss, run)


def training_points(run: Run, about: dict[str, Any]) -> list[Measurement | LeftOut]:
    """Return the training curves: means over at most 60 stretches of metrics.jsonl.

    Without a row that can be read, a record gives the reason.
    """
    rows = run.rows()
    if not rows:
        note = f"{run.metrics.name} has no rows: it is missing or broken"
        return [LeftOut(**about, probe="training", note=note)]
    metrics = pd.DataFrame(rows)
    units = {"loss": "nats / token", "grad_norm": "norm", "r": "share", "gain": "1 / activation"}
    points: list[Measurement | LeftOut] = []
    for part in np.array_split(np.arange(len(metrics)), min(TRAINING_POINTS, len(metrics))):
        stretch = metrics.iloc[part]
        points += [
            Measurement(
                **about, probe="training", quantity=name, unit=unit, stream="train",
                x=float(stretch["tokens"].iloc[-1]), value=float(stretch[name].mean()), n=len(stretch),
            )
            for name, unit in units.items() if name in stretch
        ]  # fmt: skip
    return points


def _write_parquet(path: Path, table: pd.DataFrame) -> None:
    try:
        with replacing(path) as beside:
            table.to_parquet(beside, index=False)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; free disk space") from error
