"""Removal of the per-token gain from the trained models of a study, step by step; an interrupted removal resumes.

runs/<study>/<run>/removal/<step>.parquet   losses minus the loss as trained, one row per token
runs/<study>/<run>/removal/<step>.jsonl     the numbers of the step; written last
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from soluscope.bars import Say
from soluscope.config import RemoveConfig
from soluscope.data import streams
from soluscope.errors import UserError
from soluscope.evaluation.elsewhere import check_writable
from soluscope.evaluation.one_run import (
    LEFT_BEHIND_S,
    check_device,
    device_of,
    n_threads,
    threads,
    tokens_of,
)
from soluscope.evaluation.pretrained_run import read_origin
from soluscope.evaluation.removed import FOLDER, UNTRAINED, tables_in
from soluscope.evaluation.stored import current, is_measured, rests_on, store
from soluscope.evaluation.suite import finished_runs, select_seeds, write_results
from soluscope.evaluation.summaries import about_run
from soluscope.files import digest
from soluscope.hooked.activations import HookedRun, observe
from soluscope.hooked.convert import SoluscopeTransformer, load_run, load_untrained
from soluscope.removal.losses import Losses, frozen, refitted
from soluscope.removal.numbers import NAMES, of_run
from soluscope.results import Removal, Removed
from soluscope.runs.folder import Run, lock
from soluscope.runs.weights import code_hash
from soluscope.terminal import answer


def remove(folder: Path, config: RemoveConfig, say: Say = answer) -> Path:
    """Remove the per-token gain of each finished run in a study, or of one run, and gather the results.

    A step is skipped if its results exist and were made with the same settings and code.

    Args:
        folder: a study or a run.
        config: settings of the removal.
        say: function called with each message.

    Returns:
        The study's results.jsonl.

    Raises:
        Busy: if another process evaluates the study, unless config.wait is true.
        UserError: if no run has a per-token gain, or a run or its tokens cannot be read.
    """
    runs = _removable(folder, say)
    check_device(config.evaluation)
    check_writable(runs)
    study_dir = runs[0].dir.parent
    with lock(study_dir, wait=config.wait, knob="give wait=yes to wait for it"):
        for number, run in enumerate(runs, 1):
            told = partial(_say_after, say, f"[{number}/{len(runs)}] {run.dir.name}:")
            with run.lock(LEFT_BEHIND_S), threads(n_threads()):
                _remove(run, config, told)
        return write_results(study_dir)


def _say_after(say: Say, prefix: str, text: str) -> None:
    say(f"{prefix} {text}")


def _removable(folder: Path, say: Say) -> list[Run]:
    """Return the finished runs with one layer and a per-token gain, without runs at select seeds."""
    finished = [run for run in finished_runs(folder, say) if read_origin(run.dir) is None]
    seeds = select_seeds(finished)
    normed = [
        run
        for run in finished
        if run.facts.role == "per_token" and run.config.seed not in seeds and run.config.probes
    ]
    runs = [run for run in normed if run.facts.n_layers == 1]
    for run in normed:
        if run not in runs:
            say(f"{run.dir.name} is left out: exact for one layer, has {run.facts.n_layers}")
    if not runs:
        raise UserError(
            f"no run in {folder} has one layer and a mid norm with a gain for each token: train a variant with the "
            "role per_token first (docs/protocol.md, section 3)"
        )
    return runs


def _remove(run: Run, config: RemoveConfig, say: Say) -> None:
    """Compute the steps that a run's folder lacks."""
    code = code_hash("removal/", "evaluation/removing.py")
    shared = digest([rests_on(run, config.evaluation), config.n_fit_tokens, code])
    with current(run.dir / FOLDER, shared, say) as folder:
        waiting = [name for name in _names(run) if not is_measured(folder, run, name, say)]
        if not waiting:
            say("done already")
            return
        texts = _Texts(run, config)
        base = Removal(**about_run(run.facts), value=None, unit="nats / token", step=Removed.FROZEN)
        for name in waiting:
            say(f"{name} ({_RESULTS[name][1]})")
            losses = _RESULTS[name][0](texts)
            losses.table.to_parquet(folder / f"{name}.parquet")
            store(folder, name, _records(folder, name, losses, base, config))


def _records(
    folder: Path, name: str, losses: Losses, base: Removal, config: RemoveConfig
) -> Sequence[Removal]:
    """Return the numbers of the step `name`, whose table and earlier tables lie in `folder`."""
    if name == UNTRAINED:
        tables = {Removed.FROZEN: losses.table}
    else:
        tables = tables_in(folder, 1 + [*NAMES.values()].index(name))
    last = [*tables][-1]
    rows = of_run(tables, replace(base, untrained=name == UNTRAINED), config.n_draws, config.seed)
    return [
        replace(row, note=losses.notes[row.final_norm] if row.before is None else "")
        for row in rows
        if row.step == last
    ]


class _Texts:
    """The activations of a run's model on the report split and on the select split, each computed once."""

    def __init__(self, run: Run, config: RemoveConfig) -> None:
        self.run, self.config = run, config
        self.device = device_of(config.evaluation)
        self.cache = tokens_of(run, config.prepared)
        self._trained: tuple[HookedRun, HookedRun] | None = None

    def trained(self) -> tuple[HookedRun, HookedRun]:
        """Return the trained model's activations on the report split and on the select split."""
        if self._trained is None:
            self._trained = self._of(load_run(self.run, self.device))
        return self._trained

    def untrained(self) -> tuple[HookedRun, HookedRun]:
        """Return the same of the run's own initialisation."""
        model = load_untrained(self.run, self.device)
        assert model is not None
        return self._of(model)

    def _of(self, model: SoluscopeTransformer) -> tuple[HookedRun, HookedRun]:
        ctx, c = self.run.facts.ctx, self.config
        width = min(ctx, max(streams.FEWEST_TOKENS, c.n_tokens // streams.N_ROWS))
        report = streams.from_cache(self.cache, "report", width, c.n_tokens, "natural")
        choosing = streams.from_cache(self.cache, "select", ctx, c.n_fit_tokens, "select")
        return observe(model, report), observe(model, choosing)


_RESULTS: dict[str, tuple[Callable[[_Texts], Losses], str]] = {
    NAMES[Removed.FROZEN]: (lambda texts: frozen(*texts.trained()), "one gain for all tokens"),
    NAMES[Removed.REFIT]: (lambda texts: refitted(*texts.trained()), "the readout is fitted again"),
    UNTRAINED: (lambda texts: frozen(*texts.untrained()), "one gain in its initialisation"),
}
"""Results of a run by the names of their files, in the order in which they are made."""


def _names(run: Run) -> list[str]:
    """Return the names of a run's results. A run that began with another run's weights has no initialisation."""
    return [name for name in _RESULTS if name != UNTRAINED or run.config.init_dir is None]
