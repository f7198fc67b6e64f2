"""Removal of the per-token gain, or of all per-token scales, from a study's models; an interrupted removal resumes.

runs/<study>/<run>/removal/<step>.parquet   losses minus the loss as trained, one row per token
runs/<study>/<run>/removal/<step>.jsonl     the numbers of the step; written last
runs/<study>/<run>/removal-all/             the same for the removal of all per-token scales
runs/<study>-removed/                       the models that are trained further, as runs of another study
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import takewhile
from pathlib import Path

import torch

from soluscope.bars import Say
from soluscope.config import CONSTANT, Config, RemoveConfig
from soluscope.data import streams
from soluscope.errors import UserError
from soluscope.evaluation import further
from soluscope.evaluation.claims import probes_with_claims, tested
from soluscope.evaluation.elsewhere import check_writable
from soluscope.evaluation.one_run import (
    LEFT_BEHIND_S,
    check_device,
    device_of,
    evaluate_run,
    n_threads,
    threads,
    tokens_of,
)
from soluscope.evaluation.pretrained_run import read_origin
from soluscope.evaluation.removed import FOLDERS, UNTRAINED, remedy, tables_in
from soluscope.evaluation.stored import current, is_measured, rests_on, store, write_table
from soluscope.evaluation.suite import finished_runs, select_seeds, write_results
from soluscope.evaluation.summaries import about_run
from soluscope.files import digest
from soluscope.hooked.ablation import best_gain
from soluscope.hooked.activations import HookedRun, observe
from soluscope.hooked.convert import SoluscopeTransformer, load_run, load_untrained
from soluscope.removal.fine_tune import kept, steps_for, with_gain, with_one_gain, without_norms
from soluscope.removal.losses import Losses, fine_tuned, frozen, refitted
from soluscope.removal.numbers import STEPS, name_of_tuning, of_run, step_of
from soluscope.results import ClaimTested, Removal, Removed
from soluscope.runs.folder import Run, lock
from soluscope.runs.weights import code_hash
from soluscope.terminal import answer
from soluscope.training.run import train


def remove(folder: Path, config: RemoveConfig, say: Say = answer) -> Path:
    """Remove the per-token gain, or all per-token scales, of each finished run in a study, or of one run.

    A step is skipped if its results exist and were made with the same settings and code.

    Args:
        folder: a study or a run.
        config: settings of the removal.
        say: function called with each message.

    Returns:
        The study's results.jsonl.

    Raises:
        Busy: if another process evaluates the study, unless config.wait is true.
        UserError: if no run has what is to be removed, or a run or its tokens cannot be read.
    """
    runs = _removable(folder, config.norms, say)
    check_device(config.evaluation)
    check_writable(runs)
    study_dir = runs[0].dir.parent
    with lock(study_dir, wait=config.wait, knob="give wait=yes to wait for it"):
        for number, run in enumerate(runs, 1):
            told = partial(_say_after, say, f"[{number}/{len(runs)}] {run.dir.name}:")
            with run.lock(LEFT_BEHIND_S), threads(n_threads()):
                _remove(run, config, told)
            for each in further.trained_further([run]):
                _measure(each, config, told)
            for line in further.doubled([run]):
                told(line)
        return write_results(study_dir)


def _say_after(say: Say, prefix: str, text: str) -> None:
    say(f"{prefix} {text}")


def _removable(folder: Path, norms: str, say: Say) -> list[Run]:
    """Return the finished runs that have what is to be removed, without runs at select seeds.

    This is a per-token gain, in models with one layer; or any per-token scale.
    """
    finished = [run for run in finished_runs(folder, say) if read_origin(run.dir) is None]
    seeds = select_seeds(finished)
    normed = [
        run
        for run in finished
        if (norms == "all" or run.facts.role == "per_token")
        and run.config.model.norms != CONSTANT
        and run.config.seed not in seeds
        and run.config.probes
    ]
    runs = [run for run in normed if norms == "all" or run.facts.n_layers == 1]
    for run in normed:
        if run not in runs:
            say(f"{run.dir.name} is left out: exact for one layer, has {run.facts.n_layers}")
    if runs:
        return runs
    if norms == "all":
        raise UserError(
            f"no run in {folder} has a per-token scale: name a study with trained runs that are probed"
        )
    raise UserError(
        f"no run in {folder} has one layer and a mid norm with a gain for each token: train a variant with the "
        "role per_token first (docs/protocol.md, section 3)"
    )


def _remove(run: Run, config: RemoveConfig, say: Say) -> None:
    """Compute the steps that a run's folder lacks."""
    probes = (f"probes/{name}.py" for name in probes_with_claims())
    code = code_hash("removal/", "training/", "model.py", "constant_norm.py", *probes)
    fitted_on = config.n_fit_tokens if config.norms == "mid" else 0
    shared = digest([rests_on(run, config.evaluation), fitted_on, code])
    place = run.dir / FOLDERS[config.norms]
    with current(place, shared, say) as folder:
        texts = _Texts(run, config)
        results = texts.results()
        waiting = [
            name for name in results if not is_measured(folder, run, name, remedy(place), say)
        ]
        if not waiting:
            say("done already")
        base = Removal(**about_run(run.facts), value=None, unit="nats / token", step=Removed.FROZEN)
        for name in waiting:
            told, compute = results[name]
            say(f"{name} ({told})")
            losses = compute()
            write_table(folder / f"{name}.parquet", losses.table)
            numbers = _records(folder, name, losses, base, config)
            store(folder, name, [*numbers, *losses.claims])


def _measure(each: further.Further, config: RemoveConfig, say: Say) -> None:
    """Measure the losses of a run that was trained further, for the comparison of its origin's study."""
    if not further.is_measured(each):
        losses = replace(
            config.evaluation, probes=[], n_loss_tokens=config.n_loss_tokens, wandb="off"
        )
        evaluate_run(each.run, losses, say, lambda done, of, name: None)
    if why := further.obstacle(each):
        say(why)


def _records(
    folder: Path, name: str, losses: Losses, base: Removal, config: RemoveConfig
) -> Sequence[Removal]:
    """Return the numbers of the result `name`; earlier tables lie in `folder`."""
    before = takewhile(lambda step: step != name, STEPS)
    earlier = [each for each in before if (folder / f"{each}.jsonl").is_file()]
    tables = {} if name == UNTRAINED else tables_in(folder, earlier)
    if name == UNTRAINED:
        base = replace(base, untrained=True)
    tables["frozen" if name == UNTRAINED else name] = losses.table
    step, n_tuned = step_of([*tables][-1])
    return [
        replace(row, note=losses.notes[row.final_norm] if row.before is None else "")
        for row in of_run(tables, base, config.n_draws, config.seed)
        if (row.step, row.n_tuned) == (step, n_tuned)
    ]


class _Texts:
    """A run's model on the report split and on the select split, and its results on them."""

    def __init__(self, run: Run, config: RemoveConfig) -> None:
        self.run, self.config = run, config
        self.device = device_of(config.evaluation)
        self.cache = tokens_of(run, config.prepared)
        self._trained: tuple[HookedRun, HookedRun] | None = None

    def trained(self) -> tuple[HookedRun, HookedRun]:
        """Return the trained model's activations on the report split and on the select split."""
        if self._trained is None:
            model = load_run(self.run, self.device)
            self._trained = self._on_report(model), self._on_select(model)
        return self._trained

    def results(self) -> dict[str, tuple[str, Callable[[], Losses]]]:
        """Return the results of the run by name, in their order: a remark, and the function that computes each.

        A run that began with another run's weights has no initialisation.
        """
        if self.config.norms == "all":
            name = self._name_of(Removed.ALL)
            return {name: ("two models are trained further", self._without_norms)}
        frozen_step, refit_step = STEPS
        found: dict[str, tuple[str, Callable[[], Losses]]] = {
            frozen_step: ("one gain for all tokens", lambda: frozen(*self.trained())),
            refit_step: ("the readout is fitted again", lambda: refitted(*self.trained())),
        }
        if self.run.config.init_dir is None:
            found[UNTRAINED] = (
                "one gain in its initialisation",
                lambda: frozen(*self._untrained()),
            )
        if self.run.facts.twin and self.steps:
            name = self._name_of(Removed.FINE_TUNED)
            found[name] = ("two models are trained further", self._fine_tuned)
        return found

    @property
    def steps(self) -> int:
        """Return the optimizer steps of the further training; 0 for none."""
        n_tokens = self.config.fine_tune_tokens
        return 0 if n_tokens == 0 else steps_for(self.run, n_tokens)

    @property
    def n_tuned(self) -> int:
        """Return the number of tokens of the further training."""
        return self.steps * self.run.config.train.batch_size * self.run.facts.ctx

    def _name_of(self, step: Removed) -> str:
        return name_of_tuning(step, self.n_tuned, self.config.lr_share)

    def _untrained(self) -> tuple[HookedRun, HookedRun]:
        model = load_untrained(self.run, self.device)
        assert model is not None
        return self._on_report(model), self._on_select(model)

    def _trained_further(self, config: Config) -> SoluscopeTransformer:
        return load_run(Run(train(config)), self.device)

    def _fine_tuned(self) -> Losses:
        """Return the losses after further training with one gain, and with the per-token gain kept."""
        report, choosing = self.trained()
        gain = float(
            f"{best_gain(choosing):.6g}"
        )  # the same setting when a killed training is resumed
        settings = self.steps, self.config.lr_share
        one, own = (
            self._on_report(self._trained_further(config))
            for config in (with_gain(self.run, gain, *settings), kept(self.run, *settings))
        )
        from_start = {
            run.facts.arm: self._on_report(load_run(run, self.device))
            for run in with_one_gain(self.run, finished_runs(self.run.dir.parent))
        }
        note = f"one gain of {gain:g}; peak rate {self.config.lr_share:g} of the run's"
        return Losses(fine_tuned(report, one, own, from_start), {"live": note})

    def _without_norms(self) -> Losses:
        """Return the losses after further training that removes all scales, and the tests of the claims in fp64."""
        settings = self.steps, self.config.lr_share
        model = self._trained_further(without_norms(self.run, *settings))
        models = (
            load_run(self.run, self.device),
            self._trained_further(kept(self.run, *settings)),
            model,
        )
        runs = [
            self._on_report(each.to(torch.float64, print_details=False)) for each in models
        ]  # before, kept, after
        base = ClaimTested(
            **about_run(self.run.facts), probe="", quantity="", unit="", claim="", n_tuned=self.n_tuned,
        )  # fmt: skip
        before, own, without = runs
        claims = tested(model, before, own, without, base, self.config.n_draws, self.config.seed)
        note = f"peak rate {self.config.lr_share:g} of the run's"
        return Losses(fine_tuned(before, without, own, {}), {"live": note}, tuple(claims))

    def _on_report(self, model: SoluscopeTransformer) -> HookedRun:
        n_tokens = self.config.n_tokens
        width = min(self.run.facts.ctx, max(streams.FEWEST_TOKENS, n_tokens // streams.N_ROWS))
        return observe(model, streams.from_cache(self.cache, "report", width, n_tokens, "natural"))

    def _on_select(self, model: SoluscopeTransformer) -> HookedRun:
        ctx, n_tokens = self.run.facts.ctx, self.config.n_fit_tokens
        return observe(model, streams.from_cache(self.cache, "select", ctx, n_tokens, "select"))
