"""The evaluation of one run: losses, training curve, values of tokens, and probes, stored in the run folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from threadpoolctl import threadpool_limits

from soluscope import plugins
from soluscope.bars import Say
from soluscope.config import EditorConfig, EvalConfig, NeuronsConfig
from soluscope.cores import omp_threads
from soluscope.data import streams
from soluscope.data.cache import TokenCache, of_study, open_cache, study_facts
from soluscope.data.tokenizer import from_bytes
from soluscope.errors import UserError
from soluscope.evaluation import dynamics, pretrained_run
from soluscope.evaluation.fitting import misfit
from soluscope.evaluation.loss import document_losses, mean_loss
from soluscope.evaluation.output_size import median_size
from soluscope.evaluation.pretrained_run import load_again, read_origin
from soluscope.evaluation.stored import (
    PACKAGE,
    current,
    is_measured,
    made_now,
    made_with,
    probing,
    rests_on,
    store,
    write_table,
)
from soluscope.evaluation.summaries import (
    about_run,
    against_untrained,
    stored_words,
    summarise,
    token_table,
)
from soluscope.evaluation.token_losses import token_losses
from soluscope.evaluation.wandb_probes import send_probes
from soluscope.files import reason
from soluscope.hooked.ablation import loss_at_post
from soluscope.hooked.activations import HookedRun, Text, check_model, observe, observe_blocks
from soluscope.hooked.convert import SoluscopeTransformer, load_run, load_untrained
from soluscope.probes import Measured, Probe
from soluscope.probes._per_token import PerToken
from soluscope.results import (
    DYNAMICS,
    HELD_OUT,
    LeftOut,
    Measurement,
    Record,
    TokenValue,
    Untrained,
)
from soluscope.runs.folder import Busy, Run
from soluscope.text import readable
from soluscope.workers import tell, tell_step

TRAINING_POINTS = 60
LEFT_BEHIND_S = 20.0
"""Seconds within which a worker ends that an evaluation left behind when it was killed."""
Step = Callable[[int, int, str], None]
"""Function called before each result of a run, with the number of its results that are done, the number of all its
results that are to be computed, and the name of the next one."""


def n_threads() -> int:
    """Return the number of CPU threads for each trained run: OMP_NUM_THREADS, or 1.

    The last bits of sums depend on this number, so it does not depend on how many runs are evaluated at once.
    """
    return omp_threads() or 1


def is_evaluated(run: Run, config: EvalConfig) -> bool:
    """Return whether a run has all results of this configuration, made by the present code."""
    folder, origin = run.dir / "probes", read_origin(run.dir)
    return made_with(folder) == made_now(rests_on(run, config)) and all(
        is_measured(folder, run, name, probing(run.dir.parent), lambda text: None)
        for name in _results_of(run, config, origin)
    )


def _results_of(run: Run, config: EvalConfig, origin: pretrained_run.Origin | None) -> list[str]:
    """Return the names of the results of a run."""
    of_training = [] if origin else ["training"]
    if of_training and run.snapshots() and config.step is None:
        of_training.append(DYNAMICS)
    return [*of_training, "loss", "tokens", *asked_probes(config)]


def asked_probes(config: EvalConfig) -> Sequence[str]:
    """Return the names of the probes that a configuration asks for."""
    return config.probes if config.probes is not None else plugins.names(PACKAGE)


def described(run: Run, config: EvalConfig) -> str:
    """Return one line of JSON from which `evaluate_described` evaluates a run in another process."""
    return json.dumps({"run": str(run.dir), "evaluation": asdict(config)})


def evaluate_described(line: str) -> None:
    """Evaluate the run that `described` has described, in a worker, and tell the launching process how it goes."""
    values = json.loads(line)
    try:
        run, config = Run(Path(values["run"])), EvalConfig(**values["evaluation"])
        evaluate_run(run, config, lambda text: tell(say=text), tell_step)
    except UserError as error:
        tell(error=str(error), busy=isinstance(error, Busy))
    except Exception as error:
        told = f"{type(error).__name__}: {reason(error)}"
        tell(error=f"{told}; jobs=1 shows where this happens", busy=False)


def evaluate_run(run: Run, config: EvalConfig, say: Say, step: Step) -> None:
    with run.lock(LEFT_BEHIND_S), threads(None if read_origin(run.dir) else n_threads()):
        _probe_run(run, config, say, step)
        send_probes(run, config.wandb)


@contextmanager
def threads(n: int | None) -> Iterator[None]:
    """Compute with `n` CPU threads until the block ends; None: with as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(n or before)
    try:
        with threadpool_limits(n):  # torch does not limit those of numpy and scipy
            yield
    finally:
        torch.set_num_threads(before)


def check_device(config: EvalConfig | NeuronsConfig | EditorConfig) -> None:
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda, but torch finds no GPU here: set device=cpu")


def device_of(config: EvalConfig | NeuronsConfig | EditorConfig) -> str:
    """Return the device on which models are evaluated here: `cpu` or `cuda`."""
    if config.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return config.device


def _probe_run(run: Run, config: EvalConfig, say: Say, step: Step) -> None:
    with current(run.dir / "probes", rests_on(run, config), say) as folder:
        _probe_into(folder, run, config, say, step)


def _probe_into(folder: Path, run: Run, config: EvalConfig, say: Say, step: Step) -> None:
    """Write the results of a run that `folder` lacks."""
    origin = read_origin(run.dir)
    waiting = [
        name
        for name in _results_of(run, config, origin)
        if not is_measured(folder, run, name, probing(run.dir.parent), say)
    ]
    if not waiting:
        return
    about = about_run(run.facts, pretrained=origin is not None)
    if config.step is not None:
        about["study"] = run.dir.parent.name
    device = device_of(config)
    model = load_again(run, origin, device) if origin else load_run(run, device, config.step)
    check_model(model)
    observed = _Observed(model, tokens_of(run, config.prepared), config, run)
    for number, name in enumerate(waiting):
        step(number, len(waiting), name)
        records: Sequence[Record]
        if name == "training":
            records = training_points(run, about)
        elif name == DYNAMICS:
            records = _dynamics(run, observed, folder, about, config)
        elif name == "loss" and origin:
            records = _pretrained(observed, folder, origin, about, config)
        elif name == "loss":
            records = [_loss(observed, folder, about, config)]
        elif name == "tokens":
            base = Measurement(**about, probe="", quantity="", value=None, unit="")
            blocks = iter(observed.blocks("natural"))
            first = next(blocks)
            size = median_size(chain([first], blocks), base, config)
            records = [*token_values(first, about), size]
            table = token_losses(model, observed.cache, config)
            write_table(folder / "tokens.parquet", table)
        else:
            records = _probe_records(name, observed, folder, about, config)
        store(folder, name, records)


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
    """Activations and measurements of the model, and of its initialisation, on each stream.

    A run is computed when a probe first needs the whole run, and is then kept. Other probes read a stream in blocks
    of rows, which are not kept.
    """

    def __init__(
        self, model: SoluscopeTransformer, cache: TokenCache, config: EvalConfig, run: Run
    ) -> None:
        self.model, self.cache, self.config = model, cache, config
        self.tokenizer = from_bytes(
            cache.tokenizer_path.read_bytes(), f"cannot read {cache.tokenizer_path}"
        )
        self._initial = None if read_origin(run.dir) else load_untrained(run, device_of(config))
        self._streams: dict[str, streams.Stream] = {}
        self._runs: dict[tuple[SoluscopeTransformer, str], HookedRun] = {}

    def blocks(self, name: str) -> Iterable[HookedRun]:
        """Return the model's activations on a stream in blocks of whole rows."""
        return self._blocks(self.model, name)

    def measured(self, probe: Probe, name: str) -> tuple[Text, Measured]:
        """Return a stream's text, and the probe's numbers on it."""
        return self._measured(self.model, probe, name)

    def untrained(self, probe: Probe, name: str) -> tuple[Text, Measured] | None:
        """Return the same for the run's own initialisation; None without one.

        A model that others have trained has none, and neither has a run that began with another run's weights.
        """
        return None if self._initial is None else self._measured(self._initial, probe, name)

    def _measured(
        self, model: SoluscopeTransformer, probe: Probe, name: str
    ) -> tuple[Text, Measured]:
        if isinstance(probe.measure, PerToken):
            return probe.measure.of_blocks(self._blocks(model, name))
        if (model, name) not in self._runs:
            self._runs[model, name] = observe(model, self._stream(name))
        run = self._runs[model, name]
        return run, probe.measure(run)

    def _blocks(self, model: SoluscopeTransformer, name: str) -> Iterable[HookedRun]:
        if (model, name) in self._runs:
            return [self._runs[model, name]]
        return observe_blocks(model, self._stream(name))

    def _stream(self, name: str) -> streams.Stream:
        ctx, c = self.model.facts.ctx, self.config
        if name not in self._streams:
            self._streams[name] = streams.make(
                name, self.cache, self.tokenizer, ctx, c.n_tokens, c.seed
            )
        return self._streams[name]


def _probe_records(
    name: str, observed: _Observed, folder: Path, about: dict[str, Any], config: EvalConfig
) -> list[Record]:
    """Return the probe's description and its measurements on each of its streams, and save its tables."""
    probe: Probe = plugins.pick(PACKAGE, name)
    words = stored_words(name, probe, about["study"])
    left_out = partial(LeftOut, **about, probe=name)
    if why := misfit(probe, observed.model):
        return [words, left_out(note=why)]
    records: list[Record] = []
    tables = {}
    for stream in probe.streams:
        try:
            text, measured = observed.measured(probe, stream)
        except UserError as error:  # this corpus or tokenizer cannot provide the stream
            records.append(left_out(stream=stream, note=str(error)))
            continue
        base = Measurement(**about, probe=name, quantity="", value=None, unit="", stream=stream)
        tables[stream] = token_table(text, measured).assign(stream=stream)
        records += summarise(
            probe, tables[stream], measured.estimates, base, config.n_draws, config.seed
        )
        if twins := observed.untrained(probe, stream):
            twin = Untrained(**about, probe=name, quantity="", value=None, unit="", stream=stream)
            here = tables[stream], measured.estimates
            there = token_table(*twins), twins[1].estimates
            records += against_untrained(probe, here, there, twin, config.n_draws, config.seed)
        if measured.neurons and stream == probe.streams[0]:
            columns = {key: values.numpy() for key, values in measured.neurons.items()}
            write_table(folder / f"{name}-neurons.parquet", pd.DataFrame(columns))
    if tables:
        write_table(folder / f"{name}.parquet", pd.concat(tables.values(), ignore_index=True))
    if not records:
        records.append(left_out(note="its quantities are not defined for this model"))
    return [words, *records]


def token_values(run: HookedRun, about: dict[str, Any]) -> list[TokenValue]:
    """Return the per-token values of the first text of `run`, for the report's token view."""
    end = int(run.is_bos.nonzero()[1]) if run.is_bos.sum() > 1 else len(run.pos)
    text = run.subset(torch.arange(end, device=run.device))
    columns = {
        "gain": ("1 / activation", text.gain),
        "r": ("share", text.engagement),
        "ablation effect": ("nats", loss_at_post(text, torch.zeros_like(text.post)) - text.loss),
    }
    return [
        TokenValue(
            **about, quantity=name, unit=unit, stream=run.stream, place=index, value=value,
            text=readable(text.vocab[int(text.tokens[index])]),
        )
        for name, (unit, values) in columns.items()
        if not values.isnan().all()  # the gain and r of a norm without one scale
        for index, value in enumerate(values.tolist())
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
    write_table(folder / "loss.parquet", table)
    base = Measurement(**about, probe="loss", quantity="", value=None, unit="")
    return mean_loss(table[table["split"] == "report"], base, config)


def _dynamics(
    run: Run, observed: _Observed, folder: Path, about: dict[str, Any], config: EvalConfig
) -> list[Measurement]:
    """Save the losses by document at the steps whose weights the run kept, and return its numbers there."""
    stream = streams.make(
        "natural", observed.cache, observed.tokenizer, run.facts.ctx, dynamics.N_TOKENS, config.seed
    )
    base = Measurement(**about, probe=DYNAMICS, quantity="", value=None, unit="", stream="natural")
    records, table = dynamics.dynamics(run, stream, base, config, device_of(config))
    write_table(folder / f"{DYNAMICS}.parquet", table)
    return records


def _pretrained(
    observed: _Observed,
    folder: Path,
    origin: pretrained_run.Origin,
    about: dict[str, Any],
    config: EvalConfig,
) -> list[Measurement]:
    """Save a pretrained model's losses by document, and return the known facts about the model."""
    table = document_losses(observed.model, observed.cache, "report", config)
    write_table(folder / "loss.parquet", table)
    base = Measurement(**about, probe="pretrained", quantity="", value=None, unit="")
    loss = mean_loss(table, base, config)
    return pretrained_run.measurements(
        observed.model.facts, origin, observed.cache, loss, observed.blocks("natural")
    )


def training_points(run: Run, about: dict[str, Any]) -> list[Measurement | LeftOut]:
    """Return the training curves: means over at most 60 stretches of metrics.jsonl, and the held-out losses.

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
    points += [
        Measurement(
            **about, probe="training", quantity=HELD_OUT, unit="nats / token", stream="select",
            x=float(row["tokens"]), value=row["held_out_loss"],
        )
        for row in rows if "held_out_loss" in row
    ]  # fmt: skip
    return points
